"""A trained retriever -> a folder that sentence-transformers and peft load, and back.

Called by training after each stage (write_export, on rank 0) and by evaluation (load_export). The folder is written
beside its place and renamed, so that it is there whole or not at all.
"""

import copy
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel, get_peft_model_state_dict
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from toolkit.export.card import model_card
from toolkit.export.sentence_layout import retriever_tokenizer, without_limits, write_layout
from toolkit.files import replace_text, replacing_folder
from toolkit.models.backbone import DTYPES, headless, headless_class, load_adapted, load_encoder_backbone
from toolkit.models.contextual import ContextualEncoder
from toolkit.models.contextual_files import FIRST_FOLDER, is_contextual, load_contextual, write_context
from toolkit.models.encoder import Encoder
from toolkit.models.formats import ADAPTER_WEIGHTS
from toolkit.models.in_context import KEPT, in_context, read_vectors
from toolkit.models.places import ModelSource, base_of_adapter
from toolkit.models.retriever import First, Retriever
from toolkit.models.sentence_settings import truncate_dim
from toolkit.models.two_adapters import FIRST
from toolkit.models.vocabulary import model_tokenizer
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.models import EncoderSettings

SHARD_SIZE = "5GB"  # largest weights file of a full model; the hub's usual size


class ContextualParts(NamedTuple):
    """What a retriever in two stages has besides the second stage's backbone."""

    encoder: ContextualEncoder  # gives the structure only
    state: dict[str, Tensor]  # gathered weights under the names of the encoder, the backbone's among them
    tokenizer: Path | None  # where that of a first stage with a model of its own lies


def write_export(
    folder: Path,
    *,
    backbone: nn.Module,
    state: dict[str, Tensor],
    settings: EncoderSettings,
    tokenizer: Any,
    base: ModelSource,
    dtype: torch.dtype,
    merged: bool,
    card: dict[str, Any],
    causal_lm: tuple[nn.Module, dict[str, Tensor]] | None = None,
    contextual: ContextualParts | None = None,
) -> None:
    """Write a retriever in sentence-transformers layout; only rank 0 calls it.

    Args:
        folder: becomes the export; an older one is replaced once the new one is complete.
        backbone: gives structure and adapter settings only, its own weights may be empty (ZeRO stage 3).
        state: gathered trainable weights under the names of `backbone.named_parameters()`, on any device.
        settings: how a text becomes one vector.
        tokenizer: the backbone's; it is copied, not changed.
        base: the model an adapter applies to; adapter_config.json names it, a folder by its absolute path.
        dtype: number format of the written weights and of the model that loads them.
        merged: with an adapter, also write folder/merged: full weights, adapter added in. Without one the folder
            itself holds the full weights.
        card: what the training loop knows of the run (keys: model_card.model_card).
        causal_lm: with its head and its weights, as `state`; written to folder/lm with the tokenizer as it is.
        contextual: of a retriever in two stages, what it has besides.

    Raises:
        ValueError: if `state` does not hold exactly the weights to write.
    """
    retriever_side = retriever_tokenizer(tokenizer, settings)
    adapted = isinstance(backbone, PeftModel)
    plain: Any = backbone.get_base_model() if adapted else backbone
    base_name = str(base.folder.resolve()) if Path(base.name).resolve() == base.folder.resolve() else base.name

    options = {"dtype": str(dtype).removeprefix("torch."), **headless(plain.config)}

    def describe(part: Path, place: Path, adapter: bool) -> None:
        write_layout(part, settings, retriever_side, plain.config.hidden_size, options, contextual is not None)
        if contextual is not None:
            _write_two_stages(part, backbone, contextual, base_name, dtype)
        loader = headless_class(plain.config).__name__
        context = None if contextual is None else contextual.encoder.settings
        text = model_card(place, card, settings, options, base_name, adapter, loader, context)
        (part / "README.md").write_text(text, encoding="utf-8")
        record = {"settings": settings.model_dump(), "dtype": dtype_name(dtype), "base": base_name}
        write_record(part, record | {"weights_sha256": _digest(part)})

    with replacing_folder(folder) as work:
        if adapted:
            _write_adapter(work, backbone, state, base_name, dtype, "default")
        else:
            _write_model(work, backbone, state, dtype)
        describe(work, folder, adapter=adapted)
        if adapted and merged:
            (work / "merged").mkdir()
            model: Any = _with_adapter(base.folder, work, dtype, "cpu").merge_and_unload()
            _write_model(work / "merged", model, model.state_dict(), dtype)
            describe(work / "merged", folder / "merged", adapter=False)
        if causal_lm is not None:
            (work / "lm").mkdir()
            _write_model(work / "lm", *causal_lm, dtype)
            without_limits(tokenizer).save_pretrained(work / "lm")


def load_export(folder: Path, device: torch.device | str) -> Retriever:
    """Load an export; an adapter stays unmerged, so that the numbers are those of training.

    Args:
        folder: written by `write_export`.
        device: where the weights go.

    Raises:
        RecipeError: if the folder is no export, was altered since, or the adapter's base is gone.
    """
    record = read_record(folder)
    if _digest(folder) != record["weights_sha256"]:
        raise RecipeError(f"{folder}: the weights differ from the digest in export.json; export the stage again")
    settings = read_settings(folder)
    dtype = DTYPES[record["dtype"]]
    if (folder / ADAPTER_WEIGHTS).is_file():
        backbone = _with_adapter(base_of_adapter(folder), folder, dtype, device)
    else:
        backbone = load_encoder_backbone(folder, dtype, device)
    config: Any = backbone.config
    tokenizer = model_tokenizer(folder, config)
    if is_contextual(folder):
        identity = record["weights_sha256"][:16]
        return _in_two_stages(folder, Retriever(Encoder(backbone, "", False), tokenizer, settings), identity)
    encoder = Encoder(backbone, settings.pooling, settings.normalize, settings.truncate_dim).eval()
    return Retriever(encoder, tokenizer, settings)


def _in_two_stages(folder: Path, plain: Retriever, identity: str) -> Retriever:
    """The retriever of a folder around its backbone, with the context that lies there, if one does."""
    settings, weight = plain.settings, next(plain.encoder.parameters())
    encoder = load_contextual(
        folder, plain.encoder.backbone, settings.pooling, settings.normalize, weight.dtype, weight.device
    )
    encoder.truncate_dim = settings.truncate_dim
    own = None if encoder.first_backbone is None else model_tokenizer(folder / FIRST_FOLDER)
    retriever = Retriever(encoder, plain.tokenizer, settings, First(own or plain.tokenizer, identity))
    kept = folder / KEPT
    return in_context(retriever, read_vectors(kept, retriever)) if kept.is_file() else retriever


def read_settings(folder: Path) -> EncoderSettings:
    """The settings of an export, with the truncate_dim that config_sentence_transformers.json was given since.

    Raises:
        RecipeError: as `read_record`, and for settings that are none.
    """
    kept = truncate_dim(folder)
    try:
        settings = EncoderSettings.model_validate(read_record(folder)["settings"])
        return settings if kept is None else settings.model_copy(update={"truncate_dim": kept})
    except ValidationError as error:
        keys = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors())
        raise RecipeError(f"{folder}/export.json: settings are altered ({keys}); export the stage again") from None


def read_record(folder: Path) -> dict[str, Any]:
    """The content of export.json; raises RecipeError where there is none or it cannot be read."""
    path = folder / "export.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise RecipeError(f"{folder}: is no export (no export.json); give the export/ folder of a stage") from None
    except ValueError:
        raise RecipeError(f"{path}: is not valid JSON; export the stage again") from None
    missing = [key for key in ("settings", "dtype", "base", "weights_sha256") if key not in record]
    if missing or record["dtype"] not in DTYPES:
        raise RecipeError(f"{path}: {', '.join(missing) or 'dtype'} is missing or unknown; export the stage again")
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write export.json in one move."""
    replace_text(folder / "export.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _write_two_stages(folder: Path, backbone: nn.Module, parts: ContextualParts, base: str, dtype: torch.dtype) -> None:
    """What is no backbone's, and below the folder the first stage: its adapter, or its model and tokenizer."""
    encoder, state, tokenizer = parts
    write_context(folder, encoder, state, dtype)
    first = folder / FIRST_FOLDER
    first.mkdir()
    if encoder.first_backbone is None:
        assert isinstance(backbone, PeftModel)
        below = {name.removeprefix("backbone."): weight for name, weight in state.items()}
        _write_adapter(first, backbone, below, base, dtype, FIRST)
        return
    assert tokenizer is not None
    start = "first_backbone."
    below = {name.removeprefix(start): weight for name, weight in state.items() if name.startswith(start)}
    _write_model(first, encoder.first_backbone, below, dtype)
    without_limits(model_tokenizer(tokenizer)).save_pretrained(first)


def _write_adapter(
    folder: Path, backbone: PeftModel, state: dict[str, Tensor], base: str, dtype: torch.dtype, name: str
) -> None:
    # save_embedding_layers="auto" would ask the hub for the base's config
    which: Any = {"adapter_name": name, "save_embedding_layers": False}
    expected = get_peft_model_state_dict(backbone, dict(backbone.named_parameters()), **which)
    weights = get_peft_model_state_dict(backbone, dict(state), **which)
    _check_names(expected, weights)
    save_file(_on_cpu(weights, dtype), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy.copy(backbone.peft_config[name])
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    config.save_pretrained(str(folder))


def _write_model(folder: Path, model: nn.Module, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    config: Any = copy.deepcopy(model.config)
    # Written once, as the embedding; T5 names it twice.
    tied = {"lm_head.weight", "encoder.embed_tokens.weight"} if config.tie_word_embeddings else set()
    expected = [name for name, _ in model.named_parameters() if name not in tied]
    state = {name: weight for name, weight in state.items() if name not in tied}
    _check_names(expected, state)
    save_torch_state_dict(_on_cpu(state, dtype), folder, max_shard_size=SHARD_SIZE, metadata={"format": "pt"})
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    vars(config).pop("auto_map", None)  # a class of its own that was not trained
    config.save_pretrained(folder)


def _check_names(wanted: Iterable[str], given: Iterable[str]) -> None:
    expected, found = set(wanted), set(given)
    missing, unknown = sorted(expected - found), sorted(found - expected)
    if missing or unknown:
        raise ValueError(
            f"the weights to export lack {len(missing)} of {len(expected)} names ({', '.join(missing[:3])}) "
            f"and hold {len(unknown)} unknown ones ({', '.join(unknown[:3])})"
        )


def _on_cpu(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    # copied: gathered weights can be views of one flat buffer, which safetensors would take for shared weights
    return {name: weight.detach().to("cpu", dtype, copy=True).contiguous() for name, weight in weights.items()}


def _with_adapter(base: str | Path, folder: Path, dtype: torch.dtype, device: torch.device | str) -> PeftModel:
    try:
        return load_adapted(base, folder, dtype, device)
    except ValueError:
        if Path(base).is_dir():
            raise
        raise RecipeError(
            f"{folder}/adapter_config.json: the base model {base} is not on this machine; download it "
            f"(hf download {base}), or write its folder into base_model_name_or_path"
        ) from None


def dtype_name(dtype: torch.dtype) -> str:
    """The recipe's name of a number format."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def _digest(folder: Path) -> str:
    """SHA-256 over the weights files of a folder in the order of their names, then those of a first stage."""
    digest = hashlib.sha256()
    for path in (*sorted(folder.glob("*.safetensors")), *sorted(folder.glob(f"{FIRST_FOLDER}/*.safetensors"))):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
