"""Next-token prediction with all parameters: the pre-training that the methods start from."""

from pathlib import Path

import torch
from torch import Tensor, nn

from toolkit.collectives import pool_mean, world_size
from toolkit.data.spans import LanguageModelBatch
from toolkit.data.tokens import Tokens
from toolkit.losses.language import num_chunks, num_predicted, row_nll
from toolkit.models.backbone import DTYPES, load_causal_lm, read_config
from toolkit.models.encoder import Encoder
from toolkit.objectives import Loss, Objective
from toolkit.recipe import Batch, LanguageModelObjective, Stage, batch_numbers
from toolkit.slicing import in_slices, most_tokens, padding, plan_slices


class LanguageModel(Objective):
    """Mean next-token loss over the tokens of a pool."""

    def __init__(self, causal_lm: nn.Module, pooling: str, normalize: bool, batch: Batch, logit_chunks: int) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.pooling = pooling
        self.normalize = normalize
        self.batch = batch
        self.logit_chunks = logit_chunks

    @property
    def encoder(self) -> Encoder:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The language model without its head; made on demand, so that no weight is registered twice."""
        return Encoder(self.causal_lm.model, self.pooling, self.normalize)  # pyright: ignore[reportArgumentType]

    def forward(self, batch: LanguageModelBatch) -> Loss:
        mask = batch.text.attention_mask
        slices = plan_slices(mask, self.batch.forward_rows, self.batch.forward_tokens)
        nll = in_slices(self._row_nll, slices, batch.text).sum()
        tokens = num_predicted(mask)
        parts = {"plain_nll": (nll.detach(), tokens), "padding": padding([slices], tokens.device)}
        return Loss(pool_mean(nll, tokens, self.batch.span), parts)

    def _row_nll(self, text: Tokens) -> Tensor:
        states = self.causal_lm.model(**text._asdict(), use_cache=False).last_hidden_state  # pyright: ignore
        return row_nll(self.causal_lm.get_output_embeddings(), states, *text, self.logit_chunks)  # pyright: ignore


def build_language_model(
    stage: Stage, settings: LanguageModelObjective, device: torch.device | str, folder: Path
) -> LanguageModel:
    """The objective of a `language_model` stage, in training mode."""
    causal_lm = load_causal_lm(folder, DTYPES[stage.precision], "sdpa", device).train()
    if stage.activation_checkpointing:
        recompute_layers(causal_lm)
    chunks = logit_chunks(stage, settings.max_tokens, read_config(folder).vocab_size)
    return LanguageModel(
        causal_lm, stage.encoder_settings.pooling, stage.encoder_settings.normalize, stage.batch, chunks
    )


def logit_chunks(stage: Stage, max_tokens: int, vocabulary: int) -> int:
    """Chunks of the vocabulary logits of a slice of texts of at most `max_tokens`; the same on every rank."""
    rows = batch_numbers(stage, world_size())["rows_per_forward_per_rank"]
    return num_chunks(most_tokens(rows, max_tokens, stage.batch.forward_rows, stage.batch.forward_tokens), vocabulary)


def recompute_layers(model: nn.Module) -> None:
    """Recompute every layer in the backward pass, by checkpoints that may be nested (non-reentrant)."""
    model.activation_checkpointing_enable({"use_reentrant": False})  # pyright: ignore[reportCallIssue]
