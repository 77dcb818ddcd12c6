"""Stock transformers models in fp64 throughout: their norms and rotary embedding cast to fp32 whatever their dtype."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3


def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def rotary(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angles = position_ids[:, :, None].to(x.dtype) * self.inv_freq.to(x.dtype)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


@contextmanager
def fp64_inside() -> Iterator[None]:
    """Llama and Qwen3 compute in the dtype of their weights."""
    with ExitStack() as patches:
        for place, stand_in in {
            modeling_llama.LlamaRMSNorm: norm,
            modeling_llama.LlamaRotaryEmbedding: rotary,
            modeling_qwen3.Qwen3RMSNorm: norm,
            modeling_qwen3.Qwen3RotaryEmbedding: rotary,
        }.items():
            patches.enter_context(mock.patch.object(place, "forward", stand_in))
        yield
