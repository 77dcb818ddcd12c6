"""A model that embeds: encoder, tokenizer and settings together. Called by export, preparation and evaluation."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from toolkit.models.backbone import load_adapted, load_encoder_backbone, read_config
from toolkit.models.encoder import Encoder
from toolkit.models.lengths import check_length
from toolkit.models.vocabulary import model_tokenizer
from toolkit.recipe.models import EncoderSettings


class First(NamedTuple):
    """What the first stage of a contextual retriever needs besides its encoder."""

    tokenizer: Any  # the retriever's own, unless the stage has a model of its own
    identity: str  # 16 hex digits of the weights that it was loaded with: a context belongs to them


class Retriever(NamedTuple):
    """A model that embeds, with the tokenizer and the settings it was trained with."""

    encoder: Encoder
    tokenizer: Any
    settings: EncoderSettings
    first: First | None = None  # of a contextual retriever


def load_retriever(
    folder: str | Path,
    settings: EncoderSettings,
    dtype: torch.dtype,
    device: torch.device | str,
    adapter: Path | None = None,
) -> Retriever:
    """The retriever of a model folder, with the adapter of another one if given, in eval mode.

    Raises:
        ValueError: for an unsupported model type, weights or an adapter that do not fit, a tokenizer of another model,
            or eval_max_tokens above the model's positions.
    """
    config = read_config(folder)
    check_length(config, settings.eval_max_tokens)
    tokenizer = model_tokenizer(folder, config)
    plain = adapter is None
    backbone = load_encoder_backbone(folder, dtype, device) if plain else load_adapted(folder, adapter, dtype, device)
    encoder = Encoder(backbone, settings.pooling, settings.normalize, settings.truncate_dim).eval()
    return Retriever(encoder, tokenizer, settings)
