"""Gradient caching: a function of rows run slice by slice, each slice recomputed in the backward pass.

Called inside an objective's forward, so that one engine(batch) and one backward serve every ZeRO stage.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from toolkit.collectives import max_over_ranks
from toolkit.data.tokens import Tokens

# A slice that holds this share of its budget ends before a row shorter than this share of its longest, which would be
# padded much. Far smaller slices would cost more than padding: each is a pass over all layers, at ZeRO-3 maybe a fetch.
ENOUGH_OF_BUDGET, SHORT_ROW = 0.25, 0.8


slices_run = 0
"""Slices that this process has run or begun, recomputed ones too: the same number on every rank of a run."""


class Slices(NamedTuple):
    """Which rows run together; `rows` None: all at once, their activations kept."""

    rows: list[Tensor] | None  # int64 row numbers of each slice; every row once
    lengths: list[int]  # Tokens of a slice are cut to so many columns
    num_tokens: int  # real tokens of all rows
    num_padded: int  # tokens that the slices run, padding included


def plan_slices(attention_mask: Tensor, forward_rows: int | None, forward_tokens: int | None) -> Slices:
    """Slices of right-padded rows: `forward_rows` in order, as wide as they came, or about `forward_tokens` padded
    tokens sorted by length, as wide as their longest.

    Every rank gets the same number of slices, as ZeRO-3 needs, so every rank calls it with as many rows. Slices decide
    memory and speed, never the result. A row longer than `forward_tokens` runs alone.

    Args:
        attention_mask: [rows, length].
        forward_rows, forward_tokens: at most one of them; both None keeps all activations.
    """
    lengths = attention_mask.sum(1).tolist()
    width, device = attention_mask.shape[1], attention_mask.device
    if forward_tokens is not None:
        groups = _by_length(lengths, forward_tokens, device)
        longest = [max(1, *(lengths[row] for row in group)) for group in groups]
    elif forward_rows is not None:
        groups = [list(range(i, min(i + forward_rows, len(lengths)))) for i in range(0, len(lengths), forward_rows)]
        longest = [width] * len(groups)
    else:
        return Slices(None, [width], sum(lengths), width * len(lengths))
    padded = sum(len(group) * length for group, length in zip(groups, longest, strict=True))
    return Slices([torch.tensor(group, device=device) for group in groups], longest, sum(lengths), padded)


def most_tokens(rows: int, max_tokens: int, forward_rows: int | None, forward_tokens: int | None) -> int:
    """Bound of the padded tokens of a slice that `plan_slices` makes of `rows` rows; the same on every rank."""
    if forward_tokens is not None:
        return min(max(forward_tokens, max_tokens), rows * max_tokens)
    return min(rows, forward_rows or rows) * max_tokens


def _by_length(lengths: list[int], budget: int, device: torch.device) -> list[list[int]]:
    """Rows from the longest to the shortest, cut where a slice would pass the budget or a row be padded much.

    As many slices on every rank.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups:
            count, longest = len(groups[-1]), lengths[groups[-1][0]]
            enough = count * longest >= ENOUGH_OF_BUDGET * budget
            if (count + 1) * longest <= budget and not (enough and lengths[row] < SHORT_ROW * longest):
                groups[-1].append(row)
                continue
        groups.append([row])
    wanted = max_over_ranks(len(groups), device)
    while len(groups) < wanted:  # ranks have as many rows, so there is always a slice of two rows to halve
        _, largest = max((len(group) * lengths[group[0]], i) for i, group in enumerate(groups) if len(group) > 1)
        half = len(groups[largest]) // 2
        groups[largest : largest + 1] = [groups[largest][:half], groups[largest][half:]]
    return groups


def in_slices(fn: Callable[..., Any], slices: Slices, *inputs: Any) -> Any:
    """Run `fn` over slices of rows and put what it returns back in order; exact in value and gradient.

    Activations of a slice live only during its own forward and its own recompute (GradCache, Gao et al. 2021,
    arXiv 2101.06983, written as non-reentrant checkpoints). Random number state is replayed, so dropout is the same in
    both. Uses may be nested.

    Args:
        fn: maps slices of the inputs to a tensor or a NamedTuple of tensors whose first dimension counts the rows.
        slices: of plan_slices.
        inputs: tensors or NamedTuples of tensors, all with the same number of rows; Tokens lose columns of padding.

    Raises:
        ValueError: if there are no rows or the inputs' row counts differ.
    """
    counts = {len(t) for x in inputs for t in (x if isinstance(x, tuple) else (x,))}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"in_slices needs inputs with one common, positive number of rows; found {sorted(counts)}")
    if slices.rows is None:
        _count_slice()
        return fn(*inputs)
    outputs = []
    for rows, length in zip(slices.rows, slices.lengths, strict=True):
        part = [x if isinstance(x, Tokens) else _rows(x, rows) for x in inputs]
        outputs.append(checkpoint(_of_rows, fn, rows, length, *part, use_reentrant=False, preserve_rng_state=True))
    back = torch.cat(slices.rows).argsort()
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs)[back]
    return type(outputs[0])(*(torch.cat(column)[back] for column in zip(*outputs, strict=True)))


def _of_rows(fn: Callable[..., Any], rows: Tensor, length: int, *part: Any) -> Any:
    """Texts are cut here, inside the checkpoint, which else would keep a second copy of them all."""
    _count_slice()
    return fn(*(Tokens(*(t[rows, :length] for t in x)) if isinstance(x, Tokens) else x for x in part))


def _count_slice() -> None:
    global slices_run
    slices_run += 1


def _rows(x: Any, rows: Tensor) -> Any:
    return type(x)(*(t[rows] for t in x)) if isinstance(x, tuple) else x[rows]


def padding(slices: list[Slices], device: torch.device) -> tuple[Tensor, Tensor]:
    """(padding tokens, all tokens that ran) of one forward, for the log: their ratio is the share wasted."""
    padded, real = sum(part.num_padded for part in slices), sum(part.num_tokens for part in slices)
    return torch.tensor(float(padded - real), device=device), torch.tensor(float(padded), device=device)
