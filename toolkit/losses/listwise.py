"""List-wise losses over passages of several grades: a Wasserstein distance, KL (ListNet) and InfoNCE.

Pure functions of tensors: scores of own rows against the grades of a whole pool. How a pool that is spread over ranks
is gathered, the caller says.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

EPSILON = 1e-15  # added to squared singular values before the root, as in the authors' code


class _Target(NamedTuple):
    """Y = softmax of the grades, kept in blocks: row i has `own[i]` in its own columns and `rest[i]` in each other."""

    own: Tensor  # float64 [Q, K]; [Q, N] for grades of full width
    rest: Tensor  # float64 [Q]; 0 for grades of full width
    columns: int  # N


def wasserstein(
    scores: Tensor,
    grades: Tensor,
    temperature: float,
    *,
    label_scale: float = 1.0,
    in_batch_grade: float = 0.0,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Squared Wasserstein distance between Gaussian approximations, over queries, of predicted and graded lists.

    The rows of P = softmax(scores / temperature) and of Y = softmax(grades) are samples of N features. With their means
    m, A = P - m_P, B = Y - m_Y and f = 1 / (Q - 1) (1 for one query) the loss is

        |m_P - m_Y|^2 + f |A|^2 + f |B|^2 - 2 sum of sqrt(s^2 + 1e-15) over the singular values s of f A B^T

    as Esfandiarpoor et al. (arXiv 2503.23239) train with: neither a root nor a mean, -6.3e-8 where P = Y. It does not
    know which row belongs to which query, so it needs no number of the first own row either: exchanging the rows of P
    among queries changes nothing.

    P has the dtype of the scores, all after it is float64. Beside a few [R, N] of own rows it makes [Q, Q], and
    [Q / R, N] of gathered column sums; Y is never made.

    Args:
        scores: [R, N], float32 or float64: own queries against the passages of all, query after query.
        grades: [Q, K] with N = Q * K, of all queries: passages of other queries have `in_batch_grade`. Or [Q, N].
        temperature: scores are divided by it; grades are not.
        label_scale: grades are multiplied by it, in_batch_grade too.
        in_batch_grade: the grade of other queries' passages, where grades are [Q, K].
        gather: own rows [r, ...] -> those of all ranks in rank order, [ranks * r, ...], with a backward that sums over
            ranks; None: all rows are own ones. Called twice, by every rank.

    Returns:
        The loss of the whole pool, a float64 scalar, on every rank. Its gradient is to be averaged over ranks.

    Raises:
        ValueError: for scores of another dtype, and for grades that fit neither shape.
    """
    _check(scores, grades)
    gather = gather or _nothing_to_gather
    target = _target(grades, scores.shape[1], label_scale, in_batch_grade)
    queries = len(grades)
    share = 1 / max(1, queries - 1)
    p = (scores / temperature).softmax(1).double()
    mean = gather(p.sum(0, keepdim=True)).sum(0) / queries  # [N]
    target_mean = _mean(target)
    off = p - mean  # own rows of A
    own = torch.cat([_products(off, target) - (off @ target_mean)[:, None], off.square().sum(1, keepdim=True)], 1)
    every = gather(own)  # [Q, Q + 1]: A B^T, and the squared length of each row of A
    spread = every[:, -1].sum() + _squares(target) - queries * target_mean.square().sum()
    overlap: Any = _RootSum.apply(share * every[:, :-1])
    return (mean - target_mean).square().sum() + share * spread - 2 * overlap


def kl(
    scores: Tensor,
    grades: Tensor,
    temperature: float,
    *,
    first: int = 0,
    label_scale: float = 1.0,
    in_batch_grade: float = 0.0,
) -> Tensor:
    """KL(Y || P) of every own row, float64 [R]; P, Y and arguments as in `wasserstein`. ListNet has the same gradient.

    first: number of the first own row among the queries.
    """
    _check(scores, grades, first)
    y = _rows(_target(grades, scores.shape[1], label_scale, in_batch_grade), first, len(scores))
    log_p = (scores / temperature).log_softmax(1).double()
    return (torch.special.xlogy(y, y) - y * log_p).sum(1)


def infonce(scores: Tensor, size: int, temperature: float, *, first: int = 0) -> Tensor:
    """Cross entropy of every own row [R], in the scores' dtype: the first of a query's own `size` passages is the
    positive, every other column a negative. Arguments as in `kl`; ValueError as there.
    """
    _check_dtype(scores)
    rows = torch.arange(first, first + len(scores), device=scores.device)
    if (first + len(scores)) * size > scores.shape[1]:
        raise ValueError(f"{scores.shape[1]} columns hold no group of {size} for query {first + len(scores) - 1}")
    return F.cross_entropy(scores / temperature, rows * size, reduction="none")


def wasserstein_per_query(
    scores: Tensor,
    grades: Tensor,
    temperature: float,
    *,
    first: int = 0,
    label_scale: float = 1.0,
    in_batch_grade: float = 0.0,
) -> Tensor:
    """Least mean distance, in grades, over which the mass of each own row of P is moved to make it that of Y: [R].

    Exact optimal transport in one dimension: a passage lies at its grade (those of other queries at in_batch_grade),
    and the cost is the integral of |CDF of P - CDF of Y| over grades, float64. `label_scale` sharpens Y and moves no
    passage. It is 0 as soon as every grade has the mass that Y gives it: how a query's passages of one grade share
    their mass does not matter to it, nor how in-batch passages and own ones of in_batch_grade do.

    It is ours, and no paper's: every row is compared with the grades of its own query. P, Y and arguments as in `kl`.
    """
    _check(scores, grades, first)
    target = _target(grades, scores.shape[1], label_scale, in_batch_grade)
    own = slice(first, first + len(scores))
    p = (scores / temperature).softmax(1).double()
    at, y = grades[own].double(), target.own[own]
    if grades.shape[1] < scores.shape[1]:  # all in-batch passages lie at one place
        p = _collected(p, first, grades.shape[1])
        others = scores.shape[1] - grades.shape[1]
        at = F.pad(at, (0, 1), value=in_batch_grade)
        y = torch.cat([y, others * target.rest[own, None]], 1)
    at, order = at.sort(1)
    below = (p - y).gather(1, order).cumsum(1)[:, :-1]  # difference of the CDFs between one place and the next
    return (below.abs() * at.diff(dim=1)).sum(1)


def _check(scores: Tensor, grades: Tensor, first: int = 0) -> None:
    _check_dtype(scores)
    queries, width = grades.shape
    columns = scores.shape[1]
    if width != columns and queries * width != columns:
        raise ValueError(
            f"grades {list(grades.shape)} fit no {columns} columns; give [Q, K] with Q * K columns, or all"
        )
    if first + len(scores) > queries:
        raise ValueError(f"{len(scores)} rows from {first} on are more than the {queries} queries with grades")


def _check_dtype(scores: Tensor) -> None:
    if scores.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"scores are {scores.dtype}: their softmax would have about three digits, and its covariances would be "
            "noise; make them float32 (the vectors may stay as they are)"
        )


def _nothing_to_gather(x: Tensor) -> Tensor:
    return x


def _target(grades: Tensor, columns: int, label_scale: float, in_batch_grade: float) -> _Target:
    logits, others = label_scale * grades.double(), columns - grades.shape[1]
    of_others = logits.new_full((len(logits),), label_scale * in_batch_grade if others else float("-inf"))
    largest = torch.maximum(logits.amax(1), of_others)
    own, rest = (logits - largest[:, None]).exp(), (of_others - largest).exp()
    total = own.sum(1) + others * rest
    return _Target(own / total[:, None], rest / total, columns)


def _rows(target: _Target, first: int, rows: int) -> Tensor:
    """Some rows of Y: [rows, N]."""
    own, size = target.own[first : first + rows], target.own.shape[1]
    if size == target.columns:
        return own
    y = target.rest[first : first + rows, None].expand(-1, target.columns).clone()
    return y.scatter_(1, _own_columns(first, rows, size, y.device), own)


def _own_columns(first: int, rows: int, size: int, device: torch.device) -> Tensor:
    """Columns of the passages of each own query: int64 [rows, size]."""
    return torch.arange(first * size, (first + rows) * size, device=device).view(rows, size)


def _mean(target: _Target) -> Tensor:
    """Mean of the rows of Y: [N]."""
    own, rest, columns = target
    if own.shape[1] == columns:
        return own.mean(0)
    return ((own - rest[:, None]).flatten() + rest.sum()) / len(own)


def _squares(target: _Target) -> Tensor:
    """Sum of the squares of Y."""
    own, rest, columns = target
    return own.square().sum() + (columns - own.shape[1]) * rest.square().sum()


def _products(rows: Tensor, target: _Target) -> Tensor:
    """rows [R, N] times Y transposed, [R, Q], in O(R N) where Y is in blocks."""
    own, rest, columns = target
    if own.shape[1] == columns:
        return rows @ own.T
    blocks = rows.view(len(rows), *own.shape)
    return torch.einsum("rqk,qk->rq", blocks, own - rest[:, None]) + rows.sum(1, keepdim=True) * rest


def _collected(p: Tensor, first: int, size: int) -> Tensor:
    """Masses of the own passages of every row, and of all others together: [R, N] -> [R, size + 1]."""
    columns = _own_columns(first, len(p), size, p.device)
    others = p.scatter(1, columns, 0).sum(1, keepdim=True)
    return torch.cat([p.gather(1, columns), others], 1)


class _RootSum(torch.autograd.Function):
    """Sum of sqrt(s^2 + EPSILON) over the singular values s of a square matrix; NaN if an entry is not finite.

    Its gradient U diag(s / sqrt(s^2 + EPSILON)) V^T is smooth, also where singular values are equal or zero.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        if not bool(matrix.isfinite().all()):  # the solver would raise; what is not finite is the engine's to judge
            ctx.save_for_backward(torch.full_like(matrix, float("nan")))
            return matrix.new_tensor(float("nan"))
        u, s, v = torch.linalg.svd(matrix)
        root = (s.square() + EPSILON).sqrt()
        ctx.save_for_backward((u * (s / root)) @ v)
        return root.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (direction,) = ctx.saved_tensors
        return grads[0] * direction
