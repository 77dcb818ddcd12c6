"""One layer's in-batch term as the objective computes it, from plain tensors."""

import torch
from torch import Tensor

from toolkit.methods.revela.pool_memory import share_pool
from toolkit.methods.revela.read_pairs import keep, pair_up, read_pairs


def read_others(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], weights: Tensor, scale: float, v_norm: bool,
    kept: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[T, H, L, d] of query [T, H, L, d], keys and values [S, G, L, d], weights [T, S]; kept: bool [T, S]."""
    kept = keep(weights.detach(), 0.0, None) if kept is None else kept
    keys_values = torch.stack([key, value], 1)[:, :, None]
    memory, _ = share_pool(keys_values, torch.tensor(lengths, device=query.device), kept.any(0), "rank")
    target_length = torch.tensor([lengths[i % len(lengths)] for i in range(len(query))], device=query.device)
    pairs = pair_up(weights, kept, memory.place, target_length, memory.length)
    return read_pairs(query, memory.ticket, memory.layers[0], pairs, scale, v_norm)
