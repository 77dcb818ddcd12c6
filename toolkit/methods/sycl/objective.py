"""SyCL (arXiv 2503.23239): a weighted sum of list-wise losses over the passages of a pool and their grades."""

import torch
from torch import Tensor

from toolkit.collectives import gather, gather_with_grad, pool_mean, rank
from toolkit.data.graded import GradedBatch
from toolkit.losses.listwise import infonce, kl, wasserstein, wasserstein_per_query
from toolkit.methods.objective import Loss, Objective
from toolkit.methods.shared import encode
from toolkit.methods.sycl.keys import SyclObjective
from toolkit.models.encoder import Encoder
from toolkit.recipe.training import Batch
from toolkit.slicing import padding


class Sycl(Objective):
    """Own queries against the passages of the whole pool; each loss is that of the pool."""

    def __init__(self, encoder: Encoder, settings: SyclObjective, batch: Batch) -> None:
        super().__init__()
        self.encoder = encoder
        self.settings = settings
        self.batch = batch

    def forward(self, batch: GradedBatch) -> Loss:
        query, of_queries = encode(self.encoder, batch.query, self.batch)  # [rows, dim]
        passage, of_passages = encode(self.encoder, batch.passage, self.batch)  # [rows * size, dim]
        dtype = torch.promote_types(query.dtype, torch.float32)  # P of bf16 scores would have three digits
        query, passage, grade, first = query.to(dtype), passage.to(dtype), batch.grade, 0
        if self.batch.span == "world":
            passage, grade, first = gather_with_grad(passage), gather(grade), rank() * len(query)
        with torch.autocast(query.device.type, enabled=False):  # it would make the scores in bf16 again
            scores = query @ passage.T  # [rows, rows of the pool * size]
            total, parts = self.losses(scores, grade, first)
        parts |= {
            "accuracy": _best_first(scores.detach(), grade, first),
            "pair_order": _pairs_in_order(scores.detach(), grade, first),
            "padding": padding([of_queries, of_passages], query.device),
        }
        return Loss(total, parts)

    def losses(self, scores: Tensor, grade: Tensor, first: int) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """The weighted sum, and each loss without its weight for the log: own scores, the grades of the whole pool."""
        settings, span = self.settings, self.batch.span
        rows = torch.tensor(float(len(scores)), device=scores.device)
        how = {"label_scale": settings.label_scale, "in_batch_grade": settings.in_batch_grade}
        total, parts = scores.new_zeros((), dtype=torch.float64), {}
        for name, weight in settings.losses.weights().items():
            if name == "wasserstein":
                # Every rank has the pool's loss itself. Its gathers sum gradients over ranks, as many equal losses as
                # there are ranks, and the engine's mean divides by that number: no factor, as `pool_mean` needs one
                # for sums of own rows.
                gathers = gather_with_grad if span == "world" else None
                loss = wasserstein(scores, grade, settings.temperature, **how, gather=gathers)
                parts[name] = (loss.detach(), torch.ones_like(rows))
            else:
                if name == "infonce":
                    of_rows = infonce(scores, grade.shape[1], settings.temperature, first=first)
                else:
                    fn = kl if name == "kl" else wasserstein_per_query
                    of_rows = fn(scores, grade, settings.temperature, first=first, **how)
                loss = pool_mean(of_rows.sum(), rows, span)
                parts[name] = (of_rows.detach().sum(), rows)
            total = total + weight * loss
        return total, parts


def _own_scores(scores: Tensor, first: int, size: int) -> Tensor:
    """Scores of each own query with its own passages: [rows, size]."""
    columns = torch.arange(first * size, (first + len(scores)) * size, device=scores.device)
    return scores.gather(1, columns.view(-1, size))


def _best_first(scores: Tensor, grade: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """(queries whose highest score in the pool is that of an own passage of their highest grade, queries)."""
    grade = grade[first : first + len(scores)]
    best = grade == grade.amax(1, keepdim=True)
    highest = _own_scores(scores, first, grade.shape[1]).masked_fill(~best, float("-inf")).amax(1)
    return (highest >= scores.amax(1)).float().sum(), torch.tensor(float(len(scores)), device=scores.device)


def _pairs_in_order(scores: Tensor, grade: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """(pairs of a query's own passages whose scores order them as their grades do, pairs of different grades)."""
    grade = grade[first : first + len(scores)]
    own = _own_scores(scores, first, grade.shape[1])
    above = grade[:, :, None] > grade[:, None, :]
    in_order = above & (own[:, :, None] > own[:, None, :])
    pairs = above.float().sum().clamp(min=torch.finfo(torch.float32).tiny)  # of one grade alone: 0 of hardly any
    return in_order.float().sum(), pairs
