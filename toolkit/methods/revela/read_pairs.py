"""What target passages read of their sources in one layer: only the pairs that are kept, a few at a time.

Called by inbatch_attention.py. Legend of shapes: T target rows, S source passages, P kept pairs, H query heads, G
key/value heads, L length, d head dimension.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6  # added to the attended norm, as the authors do
PAD_CHANNELS = 8  # the value norm travels as an extra channel; kernels want head dimensions in multiples of 8
# Scores of a step by matmul: 1 MiB in fp32 on a CPU, which stay in its cache (4 MiB: 1.1 to 1.2 times the time, one
# layer of 16 passages); a GPU wants few calls.
MATMUL_SCORES = {"cpu": 2**18, "cuda": 2**27}
FLASH_ELEMENTS = 2**24  # query elements of a step by flash attention, which holds no scores: 32 MiB in bf16


class PoolLayer:
    """Keys and values of the pool in one layer, and the sum of their gradients, made as pairs are read backward.

    One buffer takes all gradients in place: as separate results, each slice of rows would hand autograd one as large as
    the whole pool's.

    Args:
        keys_values: [S, 2, G, L, d] without graph.
        ready: called before the first use, when keys and values may still be on their way.
    """

    def __init__(self, keys_values: Tensor, ready: Callable[[], Any] = lambda: None) -> None:
        self.keys_values = keys_values
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
        """The sum, in the dtype of the keys; zeros if no pair was read. All readers are through: nothing stays here."""
        whole, gradient = self.keys_values, self._gradient
        self.keys_values, self._gradient = whole[:0], None
        return torch.zeros_like(whole) if gradient is None else gradient.to(whole.dtype)


class Pairs(NamedTuple):
    """The kept pairs of a slice of target rows, from the longest source to the shortest."""

    target: Tensor  # int32 [P], row of the slice
    source: Tensor  # int32 [P], place in the pool's memory
    weight: Tensor  # [P], with graph
    target_length: np.ndarray  # int32 [P], real tokens; on the host, which cuts the steps
    source_length: np.ndarray  # int32 [P]


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
    order = torch.argsort(source - source_length[source] * len(source_length), stable=True)
    target, column, source = target[order], column[order], source[order]
    lengths = (length.int().cpu().numpy() for length in (target_length[target], source_length[source]))
    return Pairs(target.int(), source.int(), weights[target, column], *lengths)


def read_pairs(query: Tensor, ticket: Tensor, layer: PoolLayer, pairs: Pairs, scale: float, v_norm: bool) -> Tensor:
    """sum_j w_ij b_ij of every target i over its kept sources j: [T, H, L, d] in the dtype of `query`.

    b_ij = A_ij V_j / (A_ij ||V_j|| + 1e-6) with A_ij = softmax_k(scale Q_i K_j^T) over the real tokens of j; without
    `v_norm` A_ij V_j (Revela, section 3.2). What pairs read is computed again in the backward pass: kept are `query`,
    O(T H L d), and 20 bytes a pair. Weights and the sum are fp32 (fp64 for fp64).

    Args:
        query: [T, H, L, d].
        ticket: a tensor of one element that stands for keys and values in autograd's graph: whoever made it takes
            their gradient from `layer` once all readers are through.
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
        gradients = _gradients_by_flash if _by_flash(query) else _gradients_by_matmul
        for step in _steps(query, pairs):
            parts = _parts(query, layer, weight.detach(), pairs, step)
            found = gradients(parts, grad[pairs.target[step]], pairs, step, scale, v_norm, ctx.needs_input_grad[2])
            grad_query.index_add_(0, pairs.target[step], found.query.to(grad_query.dtype))
            grad_weight[step] = found.weight
            if found.key is not None and found.value is not None:
                layer.add_gradient(pairs.source[step], found.key, found.value)
        ticket = grad.new_zeros(1) if ctx.needs_input_grad[2] else None
        return grad_query.to(query.dtype), grad_weight, ticket, None, None, None, None


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _steps(query: Tensor, pairs: Pairs) -> Iterator[slice]:
    """Runs of pairs that are read in one call: by matmul of one source length, so that no key is padding."""
    _, H, L, d = query.shape
    lengths, first = pairs.source_length, 0
    while first < len(lengths):
        if _by_flash(query):
            last = min(first + max(1, FLASH_ELEMENTS // (H * L * d)), len(lengths))
        else:
            longest = int(lengths[first])  # falling, so that those of one length are a run
            run = int(np.searchsorted(-lengths, -longest, side="right"))
            last = min(first + max(1, MATMUL_SCORES[query.device.type] // (H * L * longest)), run)
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
    rows = layer.keys_values[:, :, :, : int(pairs.source_length[step.start])].index_select(0, pairs.source[step])
    return _Parts(query.index_select(0, pairs.target[step]), rows[:, 0], rows[:, 1], weight[step])


class _Gradients(NamedTuple):
    """Of the `_Parts` of the same names; of keys and values only where they are wanted."""

    query: Tensor
    key: Tensor | None
    value: Tensor | None
    weight: Tensor


def _read(parts: _Parts, pairs: Pairs, step: slice, scale: float, v_norm: bool) -> Tensor:
    """w_ij b_ij of the pairs of a step: [p, H, L, d] in the dtype of the sum."""
    if _by_flash(parts.query):
        return _read_by_flash(parts, pairs, step, scale, v_norm)
    value, bias = _norm_as_bias(parts.value) if v_norm else (parts.value, None)
    query = _fold(parts.query, parts.key.shape[1])
    read = (_attention(query * scale, parts.key, bias) @ value).reshape(parts.query.shape)
    return read.to(_sum_dtype(read.dtype)) * parts.weight[:, None, None, None]


# --------------------------------------------------------------------------- by products of matrices


def _fold(rows: Tensor, groups: int) -> Tensor:
    """[p, H, L, d] -> [p, G, (H/G) L, d]: keys and values of grouped heads are not repeated."""
    return rows.reshape(len(rows), groups, -1, rows.shape[-1])


def _norm_as_bias(value: Tensor) -> tuple[Tensor, Tensor]:
    """Values over their norms [p, G, l, d], and the key bias [p, G, 1, l] under which plain attention reads b_ij.

    Since A sums to 1, A ||V|| + eps = sum_k A_k (||V_k|| + eps): dividing by it is attention with the bias
    log(||V_k|| + eps) over the values V_k / (||V_k|| + eps), eps and all.
    """
    norm = torch.linalg.vector_norm(value, dim=-1, keepdim=True, dtype=_sum_dtype(value.dtype)) + NORM_EPS
    return (value / norm).to(value.dtype), norm.log().transpose(-1, -2)


def _attention(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T + bias) with all scores of a step at once; sources of one length.

    On a CPU faster than the library's fused attention, forward and backward.
    """
    scores = query @ key.transpose(-1, -2)
    if bias is not None:
        scores += bias
    return scores.softmax(-1, dtype=_sum_dtype(query.dtype)).to(query.dtype)


def _gradients_by_matmul(
    parts: _Parts, grad: Tensor, pairs: Pairs, step: slice, scale: float, v_norm: bool, of_sources: bool
) -> _Gradients:
    """The chain rule by hand: the scores are computed again, what was read is not (five products, not six)."""
    query, key, value, weight = parts
    with torch.enable_grad():
        value = value.detach().requires_grad_(of_sources)
        unit, bias = _norm_as_bias(value) if v_norm else (value, None)
    folded, grad = (_fold(rows, key.shape[1]) for rows in (query, grad.to(query.dtype)))
    factor = weight[:, None, None, None]
    attention = _attention(folded * scale, key, None if bias is None else bias.detach())
    pull = grad @ unit.detach().transpose(-1, -2)  # of w_ij, on each probability
    mean = (attention * pull).sum(-1, keepdim=True, dtype=_sum_dtype(query.dtype))
    of_scores = pull.sub_(mean).mul_(attention)
    of_query = ((of_scores @ key) * (factor * scale)).reshape(query.shape)
    of_weight = mean.sum((1, 2, 3))
    if not of_sources:
        return _Gradients(of_query, None, None, of_weight)
    of_key = of_scores.transpose(-1, -2) @ (folded * (factor * scale).to(folded.dtype))
    of_unit = attention.transpose(-1, -2) @ (grad * factor.to(grad.dtype))
    if bias is None:
        return _Gradients(of_query, of_key, of_unit, of_weight)
    of_bias = of_scores.sum(-2, keepdim=True, dtype=bias.dtype) * factor
    (of_value,) = torch.autograd.grad((unit, bias), (value,), (of_unit, of_bias))
    return _Gradients(of_query, of_key, of_value, of_weight)


# --------------------------------------------------------------------------- by the library's attention


def _read_by_flash(parts: _Parts, pairs: Pairs, step: slice, scale: float, v_norm: bool) -> Tensor:
    """The norms travel as one more value channel: a key bias in bf16 would be off by its own rounding."""
    query, key, value, weight = parts
    d = query.shape[-1]
    if v_norm:
        value = torch.cat([value, torch.linalg.vector_norm(value, dim=-1, keepdim=True)], -1)
    read = attend_by_flash(query, key, value, pairs.target_length[step], pairs.source_length[step], scale)
    read = read.to(_sum_dtype(read.dtype))
    factor = weight.to(read.dtype)[:, None, None, None]
    return read[..., :d] * (factor / (read[..., d:] + NORM_EPS)) if v_norm else read * factor


def _gradients_by_flash(
    parts: _Parts, grad: Tensor, pairs: Pairs, step: slice, scale: float, v_norm: bool, of_sources: bool
) -> _Gradients:
    parts = _Parts(*(x.detach() for x in parts))
    wanted = [x.requires_grad_() for x in (parts if of_sources else (parts.query, parts.weight))]
    with torch.enable_grad():
        read = _read_by_flash(parts, pairs, step, scale, v_norm)
    found = torch.autograd.grad(read, wanted, grad)
    return _Gradients(*found) if of_sources else _Gradients(found[0], None, None, found[1])


def attend_by_flash(
    query: Tensor, key: Tensor, value: Tensor, target_length: np.ndarray, source_length: np.ndarray, scale: float
) -> Tensor:
    """softmax(scale q k^T) v of any lengths, in one call of the library's attention over nested tensors (no padding).

    Queries that are padding read nothing.
    """
    p, H, L, _ = query.shape
    repeats, width = H // key.shape[1], value.shape[-1]
    channels = -(-width // PAD_CHANNELS) * PAD_CHANNELS
    real, of_target = _real_tokens(target_length, L, query.device)
    real_keys, of_source = _real_tokens(source_length, key.shape[2], query.device)
    q = _pack(query, real, of_target, target_length, channels)
    k, v = (_pack(x.repeat_interleave(repeats, 1), real_keys, of_source, source_length, channels) for x in (key, value))
    read = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).values()[..., :width]
    padded = read.new_zeros(p * L, H, width).index_copy(0, real, read)
    return padded.view(p, L, H, width).transpose(1, 2)


def _real_tokens(lengths: np.ndarray, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places of the real tokens of padded rows laid end to end, and where each row's begin among them."""
    ends = lengths.cumsum(dtype=np.int64)
    shift = np.arange(len(lengths)) * width - (ends - lengths)
    places = np.arange(ends[-1]) + np.repeat(shift, lengths)
    return torch.from_numpy(places).to(device), F.pad(torch.from_numpy(ends), (1, 0)).to(device)


def _pack(x: Tensor, real: Tensor, offsets: Tensor, lengths: np.ndarray, channels: int) -> Tensor:
    """Real tokens of [p, H, L, d] as a nested tensor [p, H, (length), channels]."""
    tokens = x.transpose(1, 2).flatten(0, 1).index_select(0, real)
    tokens = F.pad(tokens, (0, channels - x.shape[-1]))
    shortest, longest = int(lengths.min()), int(lengths.max())
    jagged = torch.nested.nested_tensor_from_jagged(tokens, offsets, min_seqlen=shortest, max_seqlen=longest)
    return jagged.transpose(1, 2)
