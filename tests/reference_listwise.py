"""The list-wise losses written plainly: every score and every grade in one matrix, one query after another.

The yardstick of the tests; shares nothing with the code it measures but the encoder and its pooling.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from toolkit.data.graded import GradedBatch
from toolkit.methods.sycl.keys import SyclObjective
from toolkit.models.encoder import Encoder


def widened(grades: Tensor, columns: int, in_batch_grade: float = 0.0) -> Tensor:
    """[Q, K] -> [Q, columns] in fp64, row i's grades in its own columns; what is wide already stays so."""
    if grades.shape[1] == columns:
        return grades.double()
    rows = []
    for i, row in enumerate(grades.double()):
        wide = torch.full((columns,), in_batch_grade, dtype=torch.float64)
        wide[i * len(row) : (i + 1) * len(row)] = row
        rows.append(wide)
    return torch.stack(rows)


def distributions(
    scores: Tensor, grades: Tensor, temperature: float, label_scale: float = 1.0, in_batch_grade: float = 0.0
) -> tuple[Tensor, Tensor]:
    """P and Y, both fp64 [Q, N]."""
    wide = widened(grades, scores.shape[1], in_batch_grade)
    return (scores / temperature).softmax(1).double(), (label_scale * wide).softmax(1)


def plain_wasserstein(scores: Tensor, grades: Tensor, temperature: float, **how: float) -> Tensor:
    """By the singular values of G; the authors take the eigenvalues of G G^T, with more rounding where they are 0."""
    p, y = distributions(scores, grades, temperature, **how)
    a, b = p - p.mean(0), y - y.mean(0)
    share = 1 / (len(p) - 1) if len(p) > 1 else 1.0
    g = share * a @ b.T
    roots = (torch.linalg.svdvals(g).square() + 1e-15).sqrt().sum()
    means = (p.mean(0) - y.mean(0)).square().sum()
    return means + share * a.square().sum() + share * b.square().sum() - 2 * roots


def plain_kl(scores: Tensor, grades: Tensor, temperature: float, **how: float) -> Tensor:
    p, y = distributions(scores, grades, temperature, **how)
    return (y * (y.log() - p.log())).sum() / len(p)


def plain_infonce(scores: Tensor, grades: Tensor, temperature: float) -> Tensor:
    size = grades.shape[1]
    losses = [(row / temperature).logsumexp(0) - row[i * size] / temperature for i, row in enumerate(scores)]
    return torch.stack(losses).mean()


def plain_per_query(scores: Tensor, grades: Tensor, temperature: float, **how: float) -> Tensor:
    """The integral over grades of |CDF of P - CDF of Y|, one interval between two grades after another."""
    p, y = distributions(scores, grades, temperature, **how)
    at = widened(grades, scores.shape[1], how.get("in_batch_grade", 0.0))
    losses = []
    for p_row, y_row, place in zip(p, y, at, strict=True):
        grid = place.unique().tolist()
        total = p_row.new_zeros(())
        for low, high in pairwise(grid):
            total = total + (high - low) * (p_row[place <= low].sum() - y_row[place <= low].sum()).abs()
        losses.append(total)
    return torch.stack(losses).mean()


PLAIN: dict[str, Any] = {
    "wasserstein": plain_wasserstein,
    "kl": plain_kl,
    "infonce": plain_infonce,
    "wasserstein_per_query": plain_per_query,
}


def sycl_loss(encoder: Encoder, pools: list[GradedBatch], settings: SyclObjective) -> Tensor:
    """Mean over pools of the weighted sum of the losses."""
    losses = []
    for pool in pools:
        scores = encoder(pool.query) @ encoder(pool.passage).T
        total = scores.sum() * 0
        for name, weight in settings.losses.weights().items():
            how = {"label_scale": settings.label_scale, "in_batch_grade": settings.in_batch_grade}
            total = total + weight * PLAIN[name](
                scores, pool.grade, settings.temperature, **({} if name == "infonce" else how)
            )
        losses.append(total)
    return torch.stack(losses).mean()
