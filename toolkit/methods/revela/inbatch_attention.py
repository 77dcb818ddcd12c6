"""A causal language model whose attention also reads the other passages of its pool (Revela, arXiv 2506.16552).

Called by the Revela objective. Works on unmodified transformers models through the attention interface. Legend of
shapes: T target rows, S source passages, H query heads, G key/value heads, L length, d head dimension.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from toolkit.data.tokens import Tokens
from toolkit.losses.language import row_nll
from toolkit.methods.revela.read_pairs import Pairs, PoolLayer, pair_up, read_pairs

INBATCH_ATTENTION = "inbatch"  # the name under which `attn_implementation` finds it


class PoolMemory(NamedTuple):
    """What pass 2 reads of the pool: the only state that passages share."""

    layers: list[PoolLayer]  # keys after rotary embedding, and values, of pass 1
    ticket: Tensor  # stands for them in the graph
    place: Tensor  # int64 [pool], where the layers hold each passage that some row of this rank reads
    length: Tensor  # int64 [S], real tokens of each passage that is held


class FirstPass(NamedTuple):
    """keys_values [rows, 2, layers, G, L, d]; nll [rows]: the plain loss of every row, summed over its tokens."""

    keys_values: Tensor
    nll: Tensor


class Others(NamedTuple):
    """The in-batch term of one forward: the pool, and what the rows read of it."""

    memory: PoolMemory
    pairs: Pairs
    v_norm: bool


class Kept:
    """Keys and values of a forward, layer by layer, until they are taken.

    A layer runs again when its activations are recomputed: what it found is in the graph already, and not kept.
    """

    def __init__(self) -> None:
        self._layers: dict[int, Tensor] | None = {}

    def put(self, layer: int, key: Tensor, value: Tensor) -> None:
        if self._layers is not None:
            self._layers[layer] = torch.stack([key, value], dim=1)

    def take(self) -> Tensor:
        """[rows, 2, layers, G, L, d]."""
        assert self._layers is not None
        layers, self._layers = self._layers, None
        return torch.stack([layers[layer] for layer in sorted(layers)], dim=2)


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
        kept = Kept()
        states = self._states(tokens, keep=kept)
        keys_values = kept.take()
        with torch.set_grad_enabled(dual_loss and torch.is_grad_enabled()):
            nll = self._row_nll(states, tokens)
        return FirstPass(keys_values, nll)

    def row_nll(self, tokens: Tokens, weights: Tensor, kept: Tensor, memory: PoolMemory) -> Tensor:
        """Pass 2: row_nll [T] where every layer adds what it reads of the pool, weighted by `weights`.

        Args:
            weights: [T, pool]; kept: bool [T, pool], the pairs that are read.
        """
        pairs = pair_up(weights, kept, memory.place, tokens.attention_mask.sum(1), memory.length)
        return self._row_nll(self._states(tokens, others=Others(memory, pairs, self.v_norm)), tokens)

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
    keep: Kept | None = None,
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
        keep.put(module.layer_idx, key, value)
    if others is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        memory = others.memory
        layer = memory.layers[module.layer_idx]
        output = output + read_pairs(query, memory.ticket, layer, others.pairs, scale, others.v_norm)
    return output.transpose(1, 2).contiguous(), None


# Both are needed: without the mask a model under this attention would silently get none.
AttentionInterface.register(INBATCH_ATTENTION, attention_with_others)
AttentionMaskInterface.register(INBATCH_ATTENTION, sdpa_mask)
