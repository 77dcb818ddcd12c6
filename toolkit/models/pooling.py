"""Token states -> one vector per row."""

import torch
from torch import Tensor

POOLING_MODES = {"eos": "lasttoken", "mean": "mean", "cls": "cls"}  # our names and those of sentence-transformers


def pool(states: Tensor, attention_mask: Tensor, how: str) -> Tensor:
    """[rows, length, dim] and a right-padded mask [rows, length] -> [rows, dim] in fp32 (fp64 for fp64 states).

    how: "eos": state of the last real token; "cls": of the first; "mean": mean over real tokens, summed in fp32.
    """
    dtype = torch.promote_types(states.dtype, torch.float32)
    if how == "cls":
        return states[:, 0].to(dtype)
    if how == "eos":
        last = attention_mask.sum(1) - 1
        return states[torch.arange(len(states), device=states.device), last].to(dtype)
    mask = attention_mask[:, :, None].to(dtype)
    return (states.to(dtype) * mask).sum(1) / mask.sum(1)
