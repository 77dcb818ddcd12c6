"""Contrastive losses over a pool of any size: softmax statistics of scores that are made tile by tile, never R x C.

Pure functions of tensors for the objectives; gathering the pool and making the keys is the caller's work.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from toolkit.losses.masks import LEFT_OUT, Masks, Surrogate, finite, leave_out, leave_out_similar, limit_of, near_buffer

TILE = (2048, 2048)

Direction = Literal["query_to_document", "document_to_query", "query_to_query", "document_to_document"]


class Negatives(NamedTuple):
    """What a row's loss needs of its negatives, the columns that are not masked; each [rows]."""

    lse: Tensor  # logsumexp of the scaled scores; -inf if no column is left
    largest: Tensor  # largest raw (unscaled) score, no gradient; -inf if no column is left
    mean: Tensor | None  # mean of the scaled scores, 0 if no column is left; only with `with_mean`
    num_negatives: Tensor | None  # columns that are left, no gradient; only with `with_mean` or a surrogate
    num_masked: Tensor | None = None  # columns that the surrogate alone leaves out, no gradient; only with a surrogate


class InfoNCE(NamedTuple):
    """Loss of every row, and whether its best positive beats its largest negative document; each [rows].

    With a surrogate also the row's negative documents, and how many more there were before it masked them.
    """

    loss: Tensor
    correct: Tensor
    num_negatives: Tensor | None = None
    num_masked: Tensor | None = None


def negatives(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor | float,
    *,
    row_keys: Tensor | None = None,
    column_keys: Tensor | None = None,
    limit: Tensor | None = None,
    absent: Tensor | None = None,
    only: tuple[Tensor, Tensor] | None = None,
    surrogate: Surrogate | None = None,
    with_mean: bool = False,
    tile: tuple[int, int] = TILE,
) -> Negatives:
    """Softmax statistics of scale * <row, column> over the columns that are not masked, one tile of scores at a time.

    Scores are fp32 (fp64 if an input is fp64) and made again in the backward pass: beyond inputs and gradients it needs
    a few tiles, and an fp32 copy of the columns' gradient where that is narrower. What needs no gradient costs none.
    Exponents are taken of differences of raw scores, so that no norm and no temperature overflows.

    Args:
        rows: [R, dim].
        columns: [C, dim].
        scale: 1 / temperature, positive: a number, or a tensor without dimensions for a learned temperature.
        row_keys: int64 [R, a]; a column is left out of a row if any of its keys equals any of the row's.
        column_keys: int64 [C, b]; given with row_keys.
        limit: [R]; a column is left out of a row if its raw score is above the row's limit. No gradient.
        absent: bool [C]; columns that are left out of every row.
        only: int64 [R] and [C]; a column is left out of a row unless their numbers are the same.
        surrogate: leaves out columns that another model finds as near to the row as its own.
        with_mean: also the scaled scores' mean and count.
        tile: rows and columns of a tile.

    Raises:
        ValueError: if only one side has keys.
    """
    if (row_keys is None) != (column_keys is None):
        raise ValueError("negatives needs both row_keys and column_keys, or neither")
    if not isinstance(scale, Tensor):
        scale = torch.tensor(scale, dtype=torch.float64)
    masks = Masks(row_keys, column_keys, limit, absent, *(only or (None, None)), *(surrogate or ()))
    return Negatives(*_Negatives.apply(rows, columns, scale, with_mean, tile, *masks))  # pyright: ignore


class _Negatives(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        with_mean: bool,
        tile: tuple[int, int],
        *masks: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        dtype, of_tile = _score_dtype(rows, columns), Masks(*masks)
        largest = rows.new_full((len(rows),), LEFT_OUT, dtype=dtype)
        total, mean, count, masked = (torch.zeros_like(largest) for _ in range(4))
        buffer, similar = _buffer(rows, columns, tile, dtype), near_buffer(of_tile, tile)
        for r in _slices(len(rows), tile[0]):
            part = rows[r].to(dtype)
            for c in _slices(len(columns), tile[1]):
                scores = _scores(buffer, part, columns[c].to(dtype))
                leave_out(scores, r, c, of_tile)
                if similar is not None:
                    masked[r] += leave_out_similar(scores, r, c, of_tile, similar)
                if with_mean or similar is not None:
                    left_out = scores == LEFT_OUT
                    if with_mean:
                        mean[r] += scores.masked_fill(left_out, 0).sum(1)
                    count[r] += left_out.logical_not_().sum(1)
                top = torch.maximum(largest[r], scores.amax(1))
                anchor = finite(top)
                total[r] *= (largest[r] - anchor).mul_(scale).exp_()
                total[r] += scores.sub_(anchor[:, None]).mul_(scale).exp_().sum(1)
                largest[r] = top
        ctx.save_for_backward(rows, columns, scale, largest, total, count, *masks)
        ctx.with_mean, ctx.tile = with_mean, tile
        ctx.mark_non_differentiable(largest, count, masked)
        mean.mul_(scale).div_(count.clamp(min=1))
        by_surrogate = similar is not None
        counts = count if with_mean or by_surrogate else None, masked if by_surrogate else None
        return largest * scale + total.log(), largest, mean if with_mean else None, *counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        rows, columns, scale, largest, total, count, *masks = ctx.saved_tensors
        of_tile = Masks(*masks)
        need_rows, need_columns, need_scale = ctx.needs_input_grad[:3]
        dtype, anchor = largest.dtype, finite(largest)
        weight = torch.where(total > 0, grads[0] * scale / total, 0)  # no column is left: no gradient, whatever came
        share = grads[2] * scale / count if ctx.with_mean else None
        grad_rows = torch.empty_like(rows) if need_rows else None
        grad_columns = torch.zeros_like(columns, dtype=dtype) if need_columns else None
        grad_scale = torch.zeros_like(scale, dtype=dtype, device=rows.device) if need_scale else None
        buffer, similar = _buffer(rows, columns, ctx.tile, dtype), near_buffer(of_tile, ctx.tile)
        for r in _slices(len(rows), ctx.tile[0]):
            part = rows[r].to(dtype)
            grad_part = torch.zeros_like(part)
            for c in _slices(len(columns), ctx.tile[1]):
                others = columns[c].to(dtype)
                scores = _scores(buffer, part, others)
                leave_out(scores, r, c, of_tile)
                if similar is not None:
                    leave_out_similar(scores, r, c, of_tile, similar)
                left_out = scores == LEFT_OUT if share is not None else None
                scores.sub_(anchor[r, None]).mul_(scale).exp_().mul_(weight[r, None])
                if share is not None and left_out is not None:
                    scores.add_(share[r, None]).masked_fill_(left_out, 0)
                if need_rows or need_scale:
                    grad_part.addmm_(scores, others)
                if grad_columns is not None:
                    grad_columns[c].addmm_(scores.T, part)
            if grad_rows is not None:
                grad_rows[r] = grad_part
            if grad_scale is not None:  # sum_j w_ij <row_i, column_j> = <row_i, sum_j w_ij column_j>
                grad_scale += grad_part.mul_(part).sum() / scale
        return (
            grad_rows,
            None if grad_columns is None else grad_columns.to(columns.dtype),
            None if grad_scale is None else grad_scale.to(scale),
            *(None for _ in range(2 + len(masks))),
        )


def _score_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def _slices(total: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, total)) for first in range(0, total, size)]


def _buffer(rows: Tensor, columns: Tensor, tile: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return rows.new_empty(min(len(rows), tile[0]) * min(len(columns), tile[1]), dtype=dtype)


def _scores(buffer: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Raw scores in the buffer; `out=` also keeps autocast from narrowing them."""
    shape = len(rows), len(columns)
    return torch.mm(rows, columns.T, out=buffer[: shape[0] * shape[1]].view(shape))


def cross_entropy(positive: Tensor, lse: Tensor) -> Tensor:
    """-log(e^p / (e^p + sum of e^negative)) for every positive against its row's negatives: [R, P].

    positive [R, P] are scaled scores; lse [R], [R, 1] or [R, P] is the negatives' logsumexp: -inf gives loss and
    gradient 0. (Positives [R] go with lse [R].)
    """
    return -F.logsigmoid(positive - _per_positive(lse, positive))  # softplus, without F.softplus's cut at 20


def smoothed(ce: Tensor, positive: Tensor, found: Negatives, smoothing: Tensor | float) -> Tensor:
    """Label smoothing over the 1 + N classes of a positive and its row's negatives, by F.cross_entropy's convention.

    (1 - eps) * ce + eps * mean over the classes of -log p; every -log p is ce + positive - score, so that only the
    negatives' mean is needed. ce and positive as in `cross_entropy`.

    Raises:
        ValueError: if `found` was made without `with_mean`.
    """
    if found.mean is None or found.num_negatives is None:
        raise ValueError("smoothed needs negatives(..., with_mean=True)")
    mean, num_negatives = _per_positive(found.mean, positive), _per_positive(found.num_negatives, positive)
    return ce + smoothing * num_negatives / (1 + num_negatives) * (positive - mean)


def _per_positive(row: Tensor, positive: Tensor) -> Tensor:
    return row[:, None] if row.ndim < positive.ndim else row


def relevance_weights(
    scores: Tensor, how: Literal["none", "linear", "softmax"], temperature: float | None, clamp: bool
) -> Tensor:
    """Weights of a query's positives by their relevance, each row's sum being 1: [B, K], detached.

    Lei et al. (2306.03166) weight the K views of a document `linear`ly, s / sum s: a negative score then has a
    negative weight and its siblings grow, and nothing guards a sum near 0. `softmax` is of s / temperature, `none` 1/K.

    Args:
        scores: [B, K], raw dot products of a query with the views of its own document.
        how: the weighting.
        temperature: of `softmax`.
        clamp: count scores below 0 as 0; a row of which nothing is left is weighted evenly.

    Raises:
        ValueError: if `softmax` has no temperature or `how` is unknown.
    """
    scores = scores.detach().to(_score_dtype(scores))
    even = torch.full_like(scores, 1 / scores.shape[1])
    if clamp:
        scores = scores.clamp(min=0)
    if how == "none":
        return even
    if how == "softmax" and temperature is not None:
        return (scores / temperature).softmax(1)
    if how == "linear":
        weights = scores / scores.sum(1, keepdim=True)
        return torch.where((scores == 0).all(1, keepdim=True), even, weights) if clamp else weights
    raise ValueError(f"relevance weights are none, linear, or softmax with a temperature; found {how}, {temperature}")


def info_nce(
    query: Tensor,
    positive: Tensor,
    present: Tensor,
    queries_all: Tensor,
    documents_all: Tensor,
    query_keys: Tensor,
    all_query_keys: Tensor,
    positive_keys: Tensor,
    document_keys: Tensor,
    scale: Tensor | float,
    *,
    absent: Tensor | None = None,
    only: tuple[Tensor, Tensor] | None = None,
    joint_positives: tuple[Tensor, Tensor] | None = None,
    surrogate: Surrogate | None = None,
    directions: tuple[Direction, ...] = ("query_to_document",),
    partition: Literal["separate", "joint"] = "separate",
    margin: float | None = None,
    threshold: float | None = None,
    tile: tuple[int, int] = TILE,
) -> InfoNCE:
    """InfoNCE of own rows against the whole pool, in one direction or several, averaged over a row's positives.

    The positive pair's score is <query, its positive> in every direction, and counts once. `separate` partition
    functions give the mean of the directions' losses; `joint` is one loss over all directions' negatives together
    (GTE, Li et al. 2023, arXiv 2308.03281). A column is no negative of a row if any key coincides; a document's row has
    the keys of its query as well as its own, so that a query's other positives are never negatives of one of them.

    Args:
        query: [R, dim], own rows.
        positive: [R, P, dim], own rows' positives.
        present: bool [R, P]; the loss of a row without positives is 0.
        queries_all: [Q, dim], the whole pool's queries, own ones among them, with gradient.
        documents_all: [D, dim], the whole pool's positives and negatives, own ones among them, with gradient.
        query_keys: int64 [R, a], of a query and of its positives; repeat one where a row has fewer.
        all_query_keys: int64 [Q, c], the same of queries_all.
        positive_keys: int64 [R, P, b].
        document_keys: int64 [D, b].
        scale: as in `negatives`.
        absent: bool [D], padding in documents_all: nobody's negatives.
        only: int64 [R] and [D]: of the documents with a row's number alone one can be its negative.
        joint_positives: int64 [R] and [D]: the positives of a row are the documents with its number, m in all, each a
            soft target of 1 / m: the loss is their mean -log p, with all of them and the negatives in one sum.
        surrogate: of the rows and documents_all: leaves out negatives.
        directions: from the row to its columns; query_to_document among them.
        partition: of several directions.
        margin: leave out columns with raw scores above that of the own positive (for rows of queries, the lowest) + it.
        threshold: leave out columns with raw scores above it.
        tile: as in `negatives`.

    Raises:
        ValueError: if directions are unknown, repeated or without query_to_document, if there are others with `only`,
            `joint_positives` or `surrogate`, which are for that one, or if partition is unknown.
    """
    known = ("query_to_document", "document_to_query", "query_to_query", "document_to_document")
    if not set(directions) <= set(known) or len(set(directions)) < len(directions) or known[0] not in directions:
        raise ValueError(f"directions are {', '.join(known)}, each once and the first always; found {directions}")
    if partition not in ("separate", "joint"):
        raise ValueError(f"partition is separate or joint; found {partition}")
    if len(directions) > 1 and not only is joint_positives is surrogate is None:
        raise ValueError(f"only, joint_positives and surrogate are for {known[0]} alone; found {directions}")
    count = positive.shape[1]
    dtype = _score_dtype(query, positive)
    raw = (query[:, None].to(dtype) * positive.to(dtype)).sum(-1)
    own = raw.detach()
    lowest, best = own.masked_fill(~present, float("inf")).amin(1), own.masked_fill(~present, float("-inf")).amax(1)
    pair_keys = torch.cat([positive_keys, query_keys[:, None].expand(-1, count, -1)], 2)
    of_row = {
        "query": (query, query_keys, limit_of(lowest, margin, threshold)),
        "document": (positive.flatten(0, 1), pair_keys.flatten(0, 1), limit_of(own.flatten(), margin, threshold)),
    }
    of_column = {"query": (queries_all, all_query_keys, None), "document": (documents_all, document_keys, absent)}
    found = {}
    for direction in directions:
        row, column = direction.split("_to_")
        rows, row_keys, limit = of_row[row]
        columns, column_keys, no_column = of_column[column]
        keys = {"row_keys": row_keys, "column_keys": column_keys, "only": only, "surrogate": surrogate}
        found[direction] = negatives(rows, columns, scale, **keys, limit=limit, absent=no_column, tile=tile)
    documents = found["query_to_document"]
    correct = best > documents.largest
    if joint_positives is not None:
        held = negatives(query, documents_all, scale, only=joint_positives, absent=absent, with_mean=True, tile=tile)
        return InfoNCE(_soft(held, documents), correct, documents.num_negatives, documents.num_masked)
    lse = torch.stack([found[d].lse.view(len(query), -1).expand(-1, count) for d in directions])
    if partition == "joint":
        lse = lse.logsumexp(0, keepdim=True)
    losses = torch.stack([cross_entropy(raw * scale, one) for one in lse]).mean(0)
    loss = torch.where(present, losses, 0).sum(1) / present.sum(1).clamp(min=1)
    return InfoNCE(loss, correct, documents.num_negatives, documents.num_masked)


def _soft(held: Negatives, found: Negatives) -> Tensor:
    """Cross entropy with even soft targets over the columns `held`, the rest being `found`; 0 for a row with none."""
    assert held.mean is not None and held.num_negatives is not None
    some = held.num_negatives > 0
    lse = torch.where(some, held.lse, 0)
    return torch.where(some, cross_entropy(lse, found.lse) + lse - held.mean, 0)
