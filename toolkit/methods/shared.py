"""What the objectives of several methods build and run: the retriever, its vectors, chunks of vocabulary logits."""

from typing import Any

import torch
from torch import Tensor, nn

from toolkit.collectives import world_size
from toolkit.data.tokens import Tokens
from toolkit.losses.language import num_chunks
from toolkit.models.backbone import DTYPES, adapted, load_encoder_backbone
from toolkit.models.contextual_files import CONTEXT, is_contextual
from toolkit.models.encoder import Encoder
from toolkit.models.places import ModelSource
from toolkit.recipe.stage import Stage, batch_numbers
from toolkit.recipe.training import Batch
from toolkit.slicing import Slices, in_slices, most_tokens, plan_slices


def build_encoder(stage: Stage[Any, Any], seed: int, device: torch.device | str, source: ModelSource) -> Encoder:
    """The retriever of a stage in training mode; its adapter goes on, else a new one is made if the recipe asks.

    Raises:
        ValueError: for a retriever in two stages, of which a method that calls this would train one, and for models and
            adapters that do not fit.
    """
    trained = source.adapter or source.folder
    if is_contextual(trained):
        raise ValueError(
            f"start: {trained} reads texts with a context ({CONTEXT}), which {stage.objective.name} does not train; "
            "name another model, or a method that does"
        )
    backbone = load_encoder_backbone(source.folder, DTYPES[stage.precision], device)
    backbone = adapted(backbone, stage.lora, source.adapter, False, seed).train()
    if stage.activation_checkpointing:
        recompute_layers(backbone)
    return Encoder(backbone, stage.encoder_settings.pooling, stage.encoder_settings.normalize)


def encode(encoder: Encoder, tokens: Tokens, batch: Batch) -> tuple[Tensor, Slices]:
    """Vectors [rows, dim] under gradient caching, and the slices they ran in."""
    slices = plan_slices(tokens.attention_mask, batch.forward_rows, batch.forward_tokens)
    return in_slices(encoder, slices, tokens), slices


def logit_chunks(stage: Stage[Any, Any], max_tokens: int, vocabulary: int) -> int:
    """Chunks of the vocabulary logits of a slice of texts of at most `max_tokens`; the same on every rank."""
    rows = batch_numbers(stage, world_size())["rows_per_forward_per_rank"]
    return num_chunks(most_tokens(rows, max_tokens, stage.batch.forward_rows, stage.batch.forward_tokens), vocabulary)


def recompute_layers(model: nn.Module, **options: Any) -> None:
    """Recompute every layer in the backward pass, by checkpoints that may be nested (non-reentrant).

    options: of torch's checkpoint.
    """
    model.activation_checkpointing_enable({"use_reentrant": False} | options)  # pyright: ignore[reportCallIssue]
