"""Revela as the paper writes it: every pair of passages at once, no slices, no recompute, one process.

The yardstick of the parity tests; shares nothing with the code it measures but the models.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from toolkit.methods.revela.keys import NearDuplicates, RevelaObjective
from toolkit.methods.revela.rows import RevelaBatch
from toolkit.models.encoder import Encoder

NAME = "dense_reference"


def dense_attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **more: Any):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
    if "store" in more:
        more["store"][module.layer_idx] = (k, v)
    if "pool" in more:
        out = out + in_batch_term(q, *more["pool"]["store"][module.layer_idx], scaling=scaling, **more["pool"]["how"])
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, dense_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def in_batch_term(q: Tensor, k: Tensor, v: Tensor, *, real: Tensor, w: Tensor, scaling: float, v_norm: bool) -> Tensor:
    """sum_j w_ij b_ij through the full [T, S, H, L, L] scores."""
    scores = torch.einsum("thad,shbd->tshab", q, k) * scaling
    attention = scores.masked_fill(~real.bool()[None, :, None, None, :], float("-inf")).softmax(-1)
    b = torch.einsum("tshab,shbd->tshad", attention, v)
    if v_norm:
        b = b / (torch.einsum("tshab,shb->tsha", attention, v.norm(dim=-1))[..., None] + 1e-6)
    return torch.einsum("ts,tshad->thad", w.to(q.dtype), b)


def next_token_sum(causal_lm: nn.Module, text: Any, **more: Any) -> Tensor:
    logits = causal_lm(**text._asdict(), use_cache=False, **more).logits
    logp = logits[:, :-1].log_softmax(-1).gather(-1, text.input_ids[:, 1:, None])[..., 0]
    return -(logp * text.attention_mask[:, 1:]).sum()


def revela_loss(
    encoder: Encoder,
    causal_lm: nn.Module,
    pools: list[RevelaBatch],
    how: RevelaObjective,
    near_duplicates: NearDuplicates | None = None,
) -> Tensor:
    """Mean over the pools of each pool's mean next-token loss."""
    losses = []
    causal_lm = causal_lm.get_base_model() if isinstance(causal_lm, PeftModel) else causal_lm
    for pool in pools:
        q, p = encoder(pool.query), encoder(pool.passage)
        similarity = similarities(q, p) / how.temperature
        masked = torch.eye(len(q), dtype=torch.bool)
        if near_duplicates is not None:
            agreed = (pool.signature[:, None] == pool.signature[None]).double().mean(-1)
            masked |= agreed >= near_duplicates.threshold
        some = ~masked.all(-1)  # rows with something left to read
        w = torch.zeros_like(similarity)
        w[some] = similarity[some].masked_fill(masked[some], float("-inf")).softmax(-1)
        w = torch.where(w.detach() > how.min_weight, w, 0)
        if how.max_sources is not None:
            rank = w.detach().neg().argsort(dim=1, stable=True).argsort(dim=1)
            w = torch.where(rank < how.max_sources, w, 0)
        store: dict[int, tuple[Tensor, Tensor]] = {}
        plain = next_token_sum(causal_lm, pool.text, store=store)
        if how.detach_kv:
            store = {layer: (k.detach(), v.detach()) for layer, (k, v) in store.items()}
        pair = {"store": store, "how": {"real": pool.text.attention_mask, "w": w, "v_norm": how.v_norm}}
        total = next_token_sum(causal_lm, pool.text, pool=pair) + (plain if how.dual_loss else 0)
        losses.append(total / pool.text.attention_mask[:, 1:].sum())
    return torch.stack(losses).mean()


def similarities(q: Tensor, p: Tensor) -> Tensor:
    return q @ p.T
