"""Columns that are left out of a row's softmax, tile by tile: by keys, by score, by owner, by a surrogate's cosines.

Called by the contrastive losses, in the forward pass and again in the backward pass.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LEFT_OUT = float("-inf")  # the score of a masked column


class Surrogate(NamedTuple):
    """What another model says of rows and columns; no gradient. Rows and columns of one owner are never masked."""

    rows: Tensor  # [R, s], of unit length
    columns: Tensor  # [C, s], of unit length
    limit: Tensor  # [R]; a column whose cosine with the row is at least this is left out
    row_owner: Tensor  # int64 [R]
    column_owner: Tensor  # int64 [C]


class Masks(NamedTuple):
    """Arguments of `negatives`, and those of its Surrogate, None where there is none."""

    row_keys: Tensor | None = None
    column_keys: Tensor | None = None
    limit: Tensor | None = None
    absent: Tensor | None = None
    only_row: Tensor | None = None
    only_column: Tensor | None = None
    surrogate_row: Tensor | None = None
    surrogate_column: Tensor | None = None
    surrogate_limit: Tensor | None = None
    row_owner: Tensor | None = None
    column_owner: Tensor | None = None


def leave_out(scores: Tensor, r: slice, c: slice, masks: Masks) -> None:
    """Set a tile's masked scores to -inf, in place, but for those that the surrogate masks."""
    if masks.limit is not None:
        scores.masked_fill_(scores > masks.limit[r, None], LEFT_OUT)
    if masks.absent is not None:
        scores.masked_fill_(masks.absent[c], LEFT_OUT)
    if masks.only_row is not None and masks.only_column is not None:
        scores.masked_fill_(masks.only_row[r, None] != masks.only_column[c], LEFT_OUT)
    if masks.row_keys is None or masks.column_keys is None:
        return
    row_keys, column_keys = masks.row_keys[r], masks.column_keys[c]
    # Keys coincide in few rows and columns of most tiles: find these first, and compare only them pair by pair.
    i = torch.isin(row_keys, column_keys).any(1).nonzero()[:, 0]
    if len(i) == 0:
        return
    j = torch.isin(column_keys, row_keys).any(1).nonzero()[:, 0]
    same = torch.zeros(len(i), len(j), dtype=torch.bool, device=scores.device)
    for a in row_keys[i].unbind(1):
        for b in column_keys[j].unbind(1):
            same |= a[:, None] == b
    left_out = torch.zeros_like(scores, dtype=torch.bool)
    left_out[i[:, None], j] = same
    scores.masked_fill_(left_out, LEFT_OUT)


def leave_out_similar(scores: Tensor, r: slice, c: slice, masks: Masks, buffer: Tensor) -> Tensor:
    """Set to -inf, in place, what the surrogate masks of what is left of a tile; of each row how many: [rows].

    `buffer` is of `near_buffer`. Two cosines that differ by rounding alone count as equal, so that a text with the
    positive's vector is masked at a margin of 0 in every shape of the tiles.
    """
    assert masks.surrogate_row is not None and masks.surrogate_column is not None and masks.surrogate_limit is not None
    assert masks.row_owner is not None and masks.column_owner is not None
    rows, columns = masks.surrogate_row[r], masks.surrogate_column[c]
    similar = torch.mm(rows, columns.T, out=buffer[: scores.numel()].view(scores.shape))  # not narrowed by autocast
    masked = similar >= (masks.surrogate_limit[r, None] - rounding(similar.dtype))
    masked &= masks.row_owner[r, None] != masks.column_owner[c]
    masked &= scores != LEFT_OUT
    scores.masked_fill_(masked, LEFT_OUT)
    return masked.sum(1)


def near_buffer(masks: Masks, tile: tuple[int, int]) -> Tensor | None:
    """Room for the cosines of a tile; None without a surrogate."""
    if masks.surrogate_row is None or masks.surrogate_column is None:
        return None
    rows, columns = masks.surrogate_row, masks.surrogate_column
    return rows.new_empty(min(len(rows), tile[0]) * min(len(columns), tile[1]))


def rounding(dtype: torch.dtype) -> float:
    """More than what rounding changes of a cosine of a few thousand dimensions."""
    return 16 * torch.finfo(dtype).eps


def relative_limit(row: Tensor, positive: Tensor, present: Tensor, margin: float) -> Tensor:
    """Of each row the least cosine with its positives, plus the margin: [R]; a row without positives has no limit.

    Args:
        row: [R, s], of unit length.
        positive: [R, P, s], of unit length.
        present: bool [R, P].
        margin: eps of Morris and Rush (arXiv 2410.02525): f(q, d') >= f(q, d) + eps is masked.
    """
    cosine = (row[:, None] * positive).sum(-1)
    return cosine.masked_fill(~present, float("inf")).amin(1) + margin


def finite(largest: Tensor) -> Tensor:
    """The largest score of each row; 0 where no column is left."""
    return largest.masked_fill(largest == LEFT_OUT, 0)


def limit_of(positive: Tensor, margin: float | None, threshold: float | None) -> Tensor | None:
    """The raw score above which a row's columns are left out; None: there is no such limit."""
    limit = None if margin is None else positive + margin
    if threshold is None:
        return limit
    return torch.full_like(positive, threshold) if limit is None else limit.clamp(max=threshold)
