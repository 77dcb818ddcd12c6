"""The retriever: a backbone, a pooling, maybe a dense layer, and a normalisation."""

import copy
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.data.tokens import Tokens
from toolkit.models.pooling import pool


class Encoder(nn.Module):
    """Tokens -> vectors [rows, dim], unit length if `normalize` (fp32; fp64 for an fp64 backbone).

    truncate_dim: dimensions that are kept, the first; None: all. They are scaled to unit length afterwards.
    dense: of the pooled vector, as a published model may have it; training makes none.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pooling: str,
        normalize: bool,
        truncate_dim: int | None = None,
        dense: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.normalize = normalize
        self.truncate_dim = truncate_dim
        self.dense = dense

    def changed(self, pooling: str, normalize: bool, truncate_dim: int | None) -> Self:
        """The same backbone with other settings; the weights are shared."""
        found = copy.copy(self)
        found.pooling, found.normalize, found.truncate_dim = pooling, normalize, truncate_dim
        return found

    def forward(self, tokens: Tokens) -> Tensor:
        states = self.backbone(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False
        ).last_hidden_state
        vectors = pool(states, tokens.attention_mask, self.pooling)
        if self.dense is not None:
            vectors = self.dense(vectors.to(self.dense.weight.dtype)).to(vectors.dtype)
        vectors = vectors[:, : self.truncate_dim]
        return F.normalize(vectors, dim=-1) if self.normalize else vectors
