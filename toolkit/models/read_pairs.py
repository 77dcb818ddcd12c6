"""What target passages read of their sources in one layer: only the pairs that are kept, a few at a time.

Called by inbatch_attention.py. Legend of shapes: T target rows, S source passages, P kept pairs, H query heads, G
key/value heads, R = H / G, L length, d head dimension.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6  # added to the attended norm, as the authors do
PAD_CHANNELS = 8  # the value norm travels as an extra channel; kernels want head dimensions in multiples of 8
MATMUL_SCORES = 2**21  # scores of a step by matmul: 8 MiB in fp32; 1 to 32 times that measured the same on a CPU
FLASH_ELEMENTS = 2**27  # query elements of a step by flash attention, which holds no scores: 256 MiB in bf16


class PoolLayer:
    """Keys and values of the pool in one layer, and the sum of their gradients, made as pairs are read backward.

    One buffer takes all gradients in place: as separate results, each slice of rows would hand autograd one as large as
    the whole pool's.

    Args:
        ticket: a tensor of one element that stands for `keys_values` in autograd's graph: whoever made it gets
            `take_gradient` as the gradient once all readers are through.
        ready: called before the first use, when keys and values may still be on their way.
    """

    def __init__(self, keys_values: Tensor, ready: Callable[[], Any] = lambda: None) -> None:
        self.keys_values = keys_values  # [S, 2, G, L, d], no graph
        self.ready = ready
        self._gradient: Tensor | None = None

    def add_gradient(self, source: Tensor, key: Tensor, value: Tensor) -> None:
        """Add gradients [P, G, l, d] of the keys and values of sources [P]; summed in fp32 (fp64 for fp64)."""
        if self._gradient is None:
            self._gradient = torch.zeros_like(self.keys_values, dtype=_sum_dtype(key.dtype))
        length = key.shape[2]
        for side, gradient in enumerate((key, value)):
            self._gradient[:, side, :, :length].index_add_(0, source, gradient.to(self._gradient.dtype))

    def take_gradient(self) -> Tensor:
        """The sum so far, in the dtype of the keys; zeros if no pair was read."""
        gradient, self._gradient = self._gradient, None
        return torch.zeros_like(self.keys_values) if gradient is None else gradient.to(self.keys_values.dtype)


class Pairs(NamedTuple):
    """The kept pairs of a slice of target rows, from the longest source to the shortest."""

    target: Tensor  # int64 [P], row of the slice
    source: Tensor  # int64 [P], place in the pool's memory
    weight: Tensor  # [P], with graph
    target_length: Tensor  # int64 [P], real tokens
    source_length: Tensor  # int64 [P]
    target_lengths: list[int]  # the same on the host
    source_lengths: list[int]


def keep(weights: Tensor, min_weight: float, max_sources: int | None) -> Tensor:
    """Which pairs are read: weight above `min_weight`, at most the `max_sources` largest of a row; bool [T, S].

    With min_weight 0 and no cap nothing but zeros is left out: exact, since the gradient of a similarity carries its
    weight as a factor.
    """
    kept = weights > min_weight
    if max_sources is not None and max_sources < weights.shape[1]:
        largest = weights.sort(dim=1, descending=True, stable=True).indices[:, :max_sources]  # of equals the first
        kept &= torch.zeros_like(kept).scatter_(1, largest, True)
    return kept


def pair_up(weights: Tensor, kept: Tensor, place: Tensor, target_length: Tensor, source_length: Tensor) -> Pairs:
    """The kept pairs of a slice of target rows.

    Args:
        weights: [T, S] with graph; kept: bool [T, S].
        place: int64 [S], where the memory holds each passage of the pool.
        target_length: int64 [T]; source_length: int64 of each place of the memory.
    """
    target, column = kept.nonzero(as_tuple=True)
    source = place[column]
    # Always in this order, so that pairs of weight 0 change no bit of a sum by their absence.
    order = torch.argsort((source_length.max() - source_length[source]) * len(source_length) + source, stable=True)
    target, column, source = target[order], column[order], source[order]
    lengths = target_length[target], source_length[source]
    return Pairs(target, source, weights[target, column], *lengths, *(each.tolist() for each in lengths))


def read_pairs(query: Tensor, ticket: Tensor, layer: PoolLayer, pairs: Pairs, scale: float, v_norm: bool) -> Tensor:
    """sum_j w_ij b_ij of every target i over its kept sources j: [T, H, L, d] in the dtype of `query`.

    b_ij = A_ij V_j / (A_ij ||V_j|| + 1e-6) with A_ij = softmax_k(scale Q_i K_j^T) over the real tokens of j; without
    `v_norm` A_ij V_j (Revela, section 3.2). Nothing of the pairs is kept for the backward pass, which computes them
    again: saved memory is `query` and the weights, O(T H L d). Weights and the sum are fp32 (fp64 for fp64).

    Args:
        query: [T, H, L, d]; ticket: see PoolLayer.
    """
    return _ReadPairs.apply(query, pairs.weight, ticket, layer, pairs, scale, v_norm)  # pyright: ignore


class _ReadPairs(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        query: Tensor,
        weight: Tensor,
        ticket: Tensor,
        layer: PoolLayer,
        pairs: Pairs,
        scale: float,
        v_norm: bool,
    ) -> Tensor:
        ctx.save_for_backward(query, weight)
        ctx.how = layer, pairs, scale, v_norm
        layer.ready()
        total = torch.zeros_like(query, dtype=_sum_dtype(query.dtype))
        for step in _steps(query, pairs):
            read = _read(_parts(query, layer, weight, pairs, step), pairs, step, scale, v_norm)
            total.index_add_(0, pairs.target[step], read)
        return total.to(query.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, weight = ctx.saved_tensors
        layer, pairs, scale, v_norm = ctx.how
        grad = grad.to(_sum_dtype(grad.dtype))
        grad_query, grad_weight = torch.zeros_like(grad), torch.zeros_like(weight)
        for step in _steps(query, pairs):
            parts = _Parts(*(x.detach().requires_grad_() for x in _parts(query, layer, weight, pairs, step)))
            with torch.enable_grad():
                read = _read(parts, pairs, step, scale, v_norm)
            of_query, key, value, grad_weight[step] = torch.autograd.grad(read, parts, grad[pairs.target[step]])
            grad_query.index_add_(0, pairs.target[step], of_query.to(grad_query.dtype))
            if ctx.needs_input_grad[2]:
                layer.add_gradient(pairs.source[step], key, value)
        ticket = grad.new_zeros(1) if ctx.needs_input_grad[2] else None
        return grad_query.to(query.dtype), grad_weight, ticket, None, None, None, None


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _steps(query: Tensor, pairs: Pairs) -> Iterator[slice]:
    """Runs of pairs that are read in one call: by matmul of one source length, so that no key is padding."""
    _, H, L, d = query.shape
    lengths, first = pairs.source_lengths, 0
    while first < len(lengths):
        if _by_flash(query):
            last = min(first + max(1, FLASH_ELEMENTS // (H * L * d)), len(lengths))
        else:
            last = first + 1
            most = first + max(1, MATMUL_SCORES // (H * L * lengths[first]))
            while last < min(most, len(lengths)) and lengths[last] == lengths[first]:
                last += 1
        yield slice(first, last)
        first = last


def _by_flash(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


class _Parts(NamedTuple):
    """Copies of what the pairs of a step read."""

    query: Tensor  # [p, H, L, d]
    key: Tensor  # [p, G, l, d]
    value: Tensor
    weight: Tensor  # [p]


def _parts(query: Tensor, layer: PoolLayer, weight: Tensor, pairs: Pairs, step: slice) -> _Parts:
    rows = layer.keys_values[:, :, :, : pairs.source_lengths[step.start]].index_select(0, pairs.source[step])
    return _Parts(query.index_select(0, pairs.target[step]), rows[:, 0], rows[:, 1], weight[step])


def _read(parts: _Parts, pairs: Pairs, step: slice, scale: float, v_norm: bool) -> Tensor:
    """w_ij b_ij of the pairs of a step: [p, H, L, d] in the dtype of the sum."""
    query, key, value, weight = parts
    d = query.shape[-1]
    if v_norm:  # the norms are one more value channel of the same attention
        value = torch.cat([value, torch.linalg.vector_norm(value, dim=-1, keepdim=True)], -1)
    read = (attend_by_flash if _by_flash(query) else attend_by_matmul)(query, key, value, pairs, step, scale)
    read = read.to(_sum_dtype(read.dtype))
    factor = weight.to(read.dtype)[:, None, None, None]
    return read[..., :d] * (factor / (read[..., d:] + NORM_EPS)) if v_norm else read * factor


def attend_by_matmul(query: Tensor, key: Tensor, value: Tensor, pairs: Pairs, step: slice, scale: float) -> Tensor:
    """softmax(scale q k^T) v with all scores of a step at once; sources of one length.

    On a CPU 1.3 times as fast as the library's fused attention, forward and backward.
    """
    p, H, L, _ = query.shape
    G = key.shape[1]
    folded = (query * scale).reshape(p, G, (H // G) * L, -1)  # grouped heads: keys and values are not repeated
    attention = (folded @ key.transpose(-1, -2)).softmax(-1, dtype=_sum_dtype(query.dtype)).to(query.dtype)
    return (attention @ value).reshape(p, H, L, -1)


def attend_by_flash(query: Tensor, key: Tensor, value: Tensor, pairs: Pairs, step: slice, scale: float) -> Tensor:
    """The same of any lengths in one call of the library's attention over sequences without padding (nested tensors).

    Queries that are padding read nothing.
    """
    p, H, L, _ = query.shape
    repeats, width = H // key.shape[1], value.shape[-1]
    channels = -(-width // PAD_CHANNELS) * PAD_CHANNELS
    of_target, of_source = pairs.target_lengths[step], pairs.source_lengths[step]
    real = _real_tokens(pairs.target_length[step], of_target, L)
    real_keys = _real_tokens(pairs.source_length[step], of_source, key.shape[2])
    q = _pack(query, real, pairs.target_length[step], of_target, channels)
    k, v = (
        _pack(x.repeat_interleave(repeats, 1), real_keys, pairs.source_length[step], of_source, channels)
        for x in (key, value)
    )
    read = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).values()[..., :width]
    padded = read.new_zeros(p * L, H, width).index_copy(0, real, read)
    return padded.view(p, L, H, width).transpose(1, 2)


def _real_tokens(length: Tensor, lengths: list[int], width: int) -> Tensor:
    """Places of the real tokens of padded rows laid end to end; no wait for the device, whose count is on the host."""
    rows = torch.arange(len(lengths), device=length.device)
    row = rows.repeat_interleave(length, output_size=sum(lengths))
    return torch.arange(len(row), device=length.device) + (rows * width - (length.cumsum(0) - length))[row]


def _pack(x: Tensor, real: Tensor, length: Tensor, lengths: list[int], channels: int) -> Tensor:
    """Real tokens of [p, H, L, d] as a nested tensor [p, H, (length), channels]."""
    tokens = F.pad(x.transpose(1, 2).flatten(0, 1)[real], (0, channels - x.shape[-1]))
    jagged = torch.nested.nested_tensor_from_jagged(
        tokens, F.pad(length.cumsum(0), (1, 0)), min_seqlen=min(lengths), max_seqlen=max(lengths)
    )
    return jagged.transpose(1, 2)
