"""The files of a contextual retriever: beside its backbone's own, what the context needs, and the first stage's model.

Example: context.json and context.safetensors in the folder, and below it first/, which holds a model or an adapter.
Written by export, read by whatever loads a retriever.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from toolkit.models.adapters import read_config
from toolkit.models.backbone import load_encoder_backbone
from toolkit.models.contextual import ContextualEncoder
from toolkit.models.formats import ADAPTER_WEIGHTS, CONTEXT_WEIGHTS
from toolkit.models.two_adapters import FIRST, add_first
from toolkit.recipe.context import ContextSettings
from toolkit.recipe.errors import RecipeError

CONTEXT = "context.json"
FIRST_FOLDER = FIRST  # below the retriever's: the first stage's model, or its adapter of the retriever's backbone
_OF_BACKBONES = ("backbone.", "first_backbone.")


class ContextFile(NamedTuple):
    """What context.json holds."""

    settings: ContextSettings
    instruction_end: int | None  # id of the colon, for pool after_instruction
    embedding_norm: float  # to which form projected scales


def is_contextual(folder: Path) -> bool:
    """Whether a folder holds a retriever in two stages."""
    return (folder / CONTEXT).is_file()


def read_context(folder: Path) -> ContextFile:
    """The context.json of a folder; RecipeError where it cannot be read."""
    path = folder / CONTEXT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = ContextSettings.model_validate(content.pop("settings"))
        return ContextFile(settings, **content)
    except (OSError, ValueError, ValidationError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise RecipeError(f"{path}: cannot be read ({reason}); export the stage again") from None


def write_context(folder: Path, encoder: ContextualEncoder, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Write context.json and context.safetensors: all that is no backbone's.

    Args:
        encoder: gives the structure alone.
        state: whole weights by their names in `encoder`, others among them.
        dtype: of the written weights.

    Raises:
        ValueError: if a weight is missing.
    """
    content = {
        "settings": encoder.settings.model_dump(),
        "instruction_end": encoder.instruction_end,
        "embedding_norm": encoder.embedding_norm,
    }
    names = own_names(encoder)
    if missing := [name for name in names if name not in state]:
        raise ValueError(f"the weights to export lack {', '.join(missing[:3])}")
    weights = {name: state[name].detach().to("cpu", dtype, copy=True).contiguous() for name in names}
    save_file(weights, folder / CONTEXT_WEIGHTS, metadata={"format": "pt"})
    (folder / CONTEXT).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def own_names(encoder: ContextualEncoder) -> list[str]:
    """Names of the weights that are no backbone's: heads, soft prompts, projector, null vector."""
    return [name for name, _ in encoder.named_parameters() if not name.startswith(_OF_BACKBONES)]


def load_contextual(
    folder: Path, backbone: Any, pooling: str, normalize: bool, dtype: torch.dtype, device: torch.device | str
) -> ContextualEncoder:
    """The encoder of a folder around its backbone, which is loaded already, with its adapter if it has one.

    Raises:
        RecipeError: for files that are damaged, missing or of another model.
        ValueError: as load_encoder_backbone.
    """
    found = read_context(folder)
    first = folder / FIRST_FOLDER
    own = not (first / ADAPTER_WEIGHTS).is_file()
    first_backbone = load_encoder_backbone(first, dtype, device) if own else None
    encoder = ContextualEncoder(
        backbone,
        first_backbone,
        found.settings,
        pooling,
        normalize,
        instruction_end=found.instruction_end,
    )
    encoder.embedding_norm = found.embedding_norm
    if not own:
        _load_first_adapter(backbone, first)
    _load_own(encoder, folder)
    return encoder.to(device, dtype).eval()


def _load_first_adapter(backbone: Any, folder: Path) -> None:
    config = read_config(folder)
    if not isinstance(backbone, PeftModel) or not isinstance(config, LoraConfig):
        raise RecipeError(f"{folder}: is a second adapter of a backbone that has none; export the stage again")
    add_first(backbone, config, seed=0)
    weights = load_file(folder / ADAPTER_WEIGHTS)
    wanted = get_peft_model_state_dict(backbone, adapter_name=FIRST, save_embedding_layers=False)
    _check_weights(wanted, weights, folder / ADAPTER_WEIGHTS)
    set_peft_model_state_dict(backbone, weights, adapter_name=FIRST)


def _load_own(encoder: ContextualEncoder, folder: Path) -> None:
    path = folder / CONTEXT_WEIGHTS
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"{path}: cannot be read ({type(error).__name__}); export the stage again") from None
    state = encoder.state_dict()
    _check_weights({name: state[name] for name in own_names(encoder)}, weights, path)
    encoder.load_state_dict(weights, strict=False)


def _check_weights(wanted: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    wrong = sorted(wanted.keys() ^ found.keys())
    wrong += [name for name in wanted.keys() & found.keys() if wanted[name].shape != found[name].shape]
    if wrong:
        raise RecipeError(f"{path}: is not of this model ({', '.join(wrong[:3])}); export the stage again")
