"""Gradient caching: a function of rows run slice by slice, each slice recomputed in the backward pass.

Called inside an objective's forward, so that one engine(batch) and one backward serve every ZeRO stage.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_slices(fn: Callable[..., Any], rows_per_slice: int | None, *inputs: Any) -> Any:
    """Run `fn` over slices of rows and concatenate what it returns; exact in value and gradient.

    Activations of a slice live only during its own forward and its own recompute (GradCache, Gao et al. 2021,
    arXiv 2101.06983, written as non-reentrant checkpoints). Random number state is replayed, so dropout is the same in
    both. Uses may be nested.

    Args:
        fn: maps slices of the inputs to a tensor or a NamedTuple of tensors whose first dimension counts the rows.
        rows_per_slice: rows per slice; None calls `fn` once on everything and keeps its activations.
        inputs: tensors or NamedTuples of tensors, all with the same number of rows.

    Raises:
        ValueError: if there are no rows or the inputs' row counts differ.
    """
    counts = {len(t) for x in inputs for t in (x if isinstance(x, tuple) else (x,))}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"in_slices needs inputs with one common, positive number of rows; found {sorted(counts)}")
    if rows_per_slice is None:
        return fn(*inputs)
    (rows,) = counts
    outputs = []
    for first in range(0, rows, rows_per_slice):
        part = [_rows(x, first, first + rows_per_slice) for x in inputs]
        outputs.append(checkpoint(fn, *part, use_reentrant=False, preserve_rng_state=True))
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs)
    return type(outputs[0])(*(torch.cat(column) for column in zip(*outputs, strict=True)))


def _rows(x: Any, first: int, last: int) -> Any:
    return type(x)(*(t[first:last] for t in x)) if isinstance(x, tuple) else x[first:last]
