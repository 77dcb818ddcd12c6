"""Next-token prediction with all parameters: the pre-training that the methods start from."""

from pathlib import Path

import torch
from torch import Tensor, nn

from toolkit.collectives import pool_mean
from toolkit.data.spans import LanguageModelBatch
from toolkit.data.tokens import Tokens
from toolkit.losses.language import num_predicted, row_nll
from toolkit.models.backbone import DTYPES, load_causal_lm
from toolkit.models.encoder import Encoder
from toolkit.objectives import Loss, Objective
from toolkit.recipe import Stage
from toolkit.slicing import in_slices


class LanguageModel(Objective):
    """Mean next-token loss over the tokens of a pool."""

    def __init__(
        self, causal_lm: nn.Module, pooling: str, normalize: bool, span: str, forward_rows: int | None
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.pooling = pooling
        self.normalize = normalize
        self.span = span
        self.forward_rows = forward_rows

    @property
    def encoder(self) -> Encoder:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The language model without its head; made on demand, so that no weight is registered twice."""
        return Encoder(self.causal_lm.model, self.pooling, self.normalize)  # pyright: ignore[reportArgumentType]

    def forward(self, batch: LanguageModelBatch) -> Loss:
        nll = in_slices(self._row_nll, self.forward_rows, batch.text).sum()
        tokens = num_predicted(batch.text.attention_mask)
        return Loss(pool_mean(nll, tokens, self.span), {"plain_nll": (nll.detach(), tokens)})

    def _row_nll(self, text: Tokens) -> Tensor:
        return row_nll(self.causal_lm(**text._asdict(), use_cache=False).logits, *text)


def build_language_model(stage: Stage, device: torch.device | str, folder: Path) -> LanguageModel:
    """The objective of a `language_model` stage, in training mode."""
    causal_lm = load_causal_lm(folder, DTYPES[stage.precision], "sdpa", device).train()
    if stage.activation_checkpointing:
        recompute_layers(causal_lm)
    encoder, batch = stage.encoder, stage.batch
    return LanguageModel(causal_lm, encoder.pooling, encoder.normalize, batch.span, batch.forward_rows)


def recompute_layers(model: nn.Module) -> None:
    """Recompute every layer in the backward pass, by checkpoints that may be nested (non-reentrant)."""
    model.activation_checkpointing_enable({"use_reentrant": False})  # pyright: ignore[reportCallIssue]
