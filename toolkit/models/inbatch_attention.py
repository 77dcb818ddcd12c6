"""A causal language model whose attention also reads the other passages of its pool (Revela, arXiv 2506.16552).

Called by the Revela objective. Works on unmodified transformers models through the attention interface. Legend of
shapes: T target rows, S source passages, H query heads, G key/value heads, R = H / G, L length, d head dimension.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from toolkit.data.tokens import Tokens
from toolkit.losses.language import row_nll

INBATCH_ATTENTION = "inbatch"  # the name under which `attn_implementation` finds it
NORM_EPS = 1e-6  # added to the attended norm, as the authors do
PAD_CHANNELS = 8  # the value norm travels as an extra channel; kernels want head dimensions in multiples of 8


class PoolMemory(NamedTuple):
    """What pass 2 reads of the pool: the only state that passages share.

    keys_values [S, 2, layers, G, L, d]: keys after rotary embedding and values of pass 1; lengths: real tokens of each.
    """

    keys_values: Tensor
    lengths: tuple[int, ...]


class FirstPass(NamedTuple):
    """keys_values [rows, 2, layers, G, L, d]; nll [rows]: the plain loss of every row, summed over its tokens."""

    keys_values: Tensor
    nll: Tensor


class Others(NamedTuple):
    """The in-batch term of one forward: the pool and how much each row (of T) reads each passage (of S)."""

    memory: PoolMemory
    weights: Tensor  # [T, S]
    v_norm: bool


class InBatchLanguageModel(nn.Module):
    """A causal language model in two passes: keys and values of every passage, then next tokens given the others."""

    def __init__(self, causal_lm: nn.Module, v_norm: bool, logit_chunks: int = 1) -> None:
        """logit_chunks: as in losses.language.row_nll, for the tokens of one slice."""
        super().__init__()
        self.causal_lm = causal_lm
        self.v_norm = v_norm
        self.logit_chunks = logit_chunks

    def keys_values(self, tokens: Tokens, dual_loss: bool) -> FirstPass:
        """Pass 1, an ordinary causal forward.

        The plain loss carries a gradient only if `dual_loss`; else it is computed for the log alone.
        """
        kept: dict[int, Tensor] = {}
        states = self._states(tokens, keep=kept)
        with torch.set_grad_enabled(dual_loss and torch.is_grad_enabled()):
            nll = self._row_nll(states, tokens)
        return FirstPass(torch.stack([kept[layer] for layer in sorted(kept)], dim=2), nll)

    def row_nll(self, tokens: Tokens, weights: Tensor, memory: PoolMemory) -> Tensor:
        """Pass 2: row_nll [rows] where every layer adds what it reads of the pool, weighted by `weights` [rows, S]."""
        return self._row_nll(self._states(tokens, others=Others(memory, weights, self.v_norm)), tokens)

    def _states(self, tokens: Tokens, **extra: Any) -> Tensor:
        causal_lm = self.causal_lm.get_base_model() if isinstance(self.causal_lm, PeftModel) else self.causal_lm
        return causal_lm.model(**tokens._asdict(), use_cache=False, **extra).last_hidden_state  # pyright: ignore

    def _row_nll(self, states: Tensor, tokens: Tokens) -> Tensor:
        return row_nll(self.causal_lm.get_output_embeddings(), states, *tokens, self.logit_chunks)  # pyright: ignore


def attention_with_others(
    module: Any,
    query: Tensor,  # [T, H, L, d]
    key: Tensor,  # [T, G, L, d]
    value: Tensor,  # [T, G, L, d]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    keep: dict[int, Tensor] | None = None,
    others: Others | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal self-attention; keeps keys and values (`keep`, pass 1) or adds the in-batch term (`others`, pass 2).

    o_i = s_i + sum_j w_ij b_ij, before the output projection (specification of the method, section 3.2 of the paper).
    """
    repeats = query.shape[1] // key.shape[1]
    output = F.scaled_dot_product_attention(
        query,
        key.repeat_interleave(repeats, 1),
        value.repeat_interleave(repeats, 1),
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=attention_mask is None,
        scale=scaling,
    )
    if keep is not None:
        # Written, never appended: a layer runs again when its activations are recomputed.
        keep[module.layer_idx] = torch.stack([key, value], dim=1)
    if others is not None:
        keys, values = others.memory.keys_values[:, :, module.layer_idx].unbind(1)
        output = output + read_others(
            query, keys, values, others.memory.lengths, others.weights, scaling, others.v_norm
        )
    return output.transpose(1, 2).contiguous(), None


# Both are needed: without the mask a model under this attention would silently get none.
AttentionInterface.register(INBATCH_ATTENTION, attention_with_others)
AttentionMaskInterface.register(INBATCH_ATTENTION, sdpa_mask)


def read_others(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: tuple[int, ...],
    weights: Tensor,
    scaling: float | None,
    v_norm: bool,
) -> Tensor:
    """sum_j w_ij b_ij for every target i: [T, H, L, d] in the dtype of `query`.

    One attention call per source j, over all targets' queries as one sequence, without mask, recomputed in the backward
    pass: saved memory is O(T H L d), never T S L^2. Grouped heads are folded into the sequence, so keys and values are
    not copied. Weights and the sum are fp32 (fp64 for fp64).

    Shapes: query [T, H, L, d], keys and values [S, G, L, d], weights [T, S]; lengths: real tokens of each source.
    """
    T, H, L, d = query.shape
    S, G = keys.shape[:2]
    scale = d**-0.5 if scaling is None else scaling
    sequence = query.reshape(T, G, H // G, L, d).transpose(0, 1).reshape(1, G, T * (H // G) * L, d)
    if v_norm:  # the padded channels are zero in the keys too, so scores do not change
        sequence = F.pad(sequence, (0, PAD_CHANNELS))
    dtype = torch.promote_types(query.dtype, torch.float32)
    total = torch.zeros(G, T, (H // G) * L, d, dtype=dtype, device=query.device)
    for j in range(S):
        key, value = keys[j, None, :, : lengths[j]], values[j, None, :, : lengths[j]]
        weight = weights[:, j].to(dtype)
        total = total + checkpoint(
            _read_one, sequence, key, value, weight, scale, v_norm, use_reentrant=False, preserve_rng_state=False
        )  # pyright: ignore[reportOperatorIssue]
    return total.to(query.dtype).view(G, T, H // G, L, d).transpose(0, 1).reshape(T, H, L, d)


def _read_one(sequence: Tensor, key: Tensor, value: Tensor, weight: Tensor, scale: float, v_norm: bool) -> Tensor:
    """w_ij b_ij for one source j: [G, T, R L, d]; sequence [1, G, T R L, d (+ 8)], key and value [1, G, L_j, d]."""
    d = value.shape[-1]
    if v_norm:  # b_ij = A_ij V_j / (A_ij ||V_j|| + eps): the norms are one more value channel of the same call
        norm = torch.linalg.vector_norm(value, dim=-1, keepdim=True)
        value = F.pad(torch.cat([value, norm], -1), (0, PAD_CHANNELS - 1))
        key = F.pad(key, (0, PAD_CHANNELS))
    read = F.scaled_dot_product_attention(sequence, key, value, scale=scale)[0].to(weight.dtype)
    if v_norm:
        read = read[..., :d] / (read[..., d : d + 1] + NORM_EPS)
    rows = weight.shape[0]
    return read.view(read.shape[0], rows, -1, d) * weight[None, :, None, None]
