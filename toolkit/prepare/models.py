"""Where the models of a stage are on disk: found, downloaded, or the export of the stage before. Called by training."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

from toolkit.collectives import on_rank_zero, rank
from toolkit.data.tokens import tokenize
from toolkit.files import expanded
from toolkit.models.backbone import read_config
from toolkit.models.formats import ADAPTER_CONFIG, pickled_model
from toolkit.models.places import TOKENIZER_FILES, ModelSource, base_of_adapter, holds_bare_adapter, hub_problem
from toolkit.models.vocabulary import model_tokenizer
from toolkit.ranks.together import on_every_rank, together
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.models import BuildStart, EncoderSettings, FolderStart, HubStart

MODEL_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model", "merges.txt", "vocab.txt"]
NOT_MODEL_FILES = ["*/*", "consolidated*", "*.bin", "*.py"]  # */*: other formats live in subfolders
_TOKENIZER_PARTS = ("tokenizer*", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")


def resolve_model(
    start: HubStart | FolderStart | BuildStart | Literal["previous"],
    *,
    previous: Path | None,
    previous_kind: Literal["encoder", "lm"],
    built: Path | None,
) -> ModelSource:
    """The model that a `start` key names, downloaded if need be (safetensors and json only, no code).

    Args:
        previous: folder of the stage before, for start "previous".
        previous_kind: "encoder": its export, "lm": its export/lm. An adapter, there or in a folder, comes with its base
            for an "encoder" and is refused for an "lm".
        built: what build_start returned, for start {"build": ...}.

    Raises:
        RecipeError: one line with the fix, the same on every rank.
    """
    match start:
        case HubStart():
            return ModelSource(_download(start.hub), start.hub)
        case FolderStart():
            return _export_or_model(expanded(start.folder), previous_kind)
        case BuildStart():
            assert built is not None
            return _in_folder(built)
        case "previous":
            assert previous is not None
            export = previous / "export" if previous_kind == "encoder" else previous / "export" / "lm"
            return _export_or_model(export, previous_kind)


def _export_or_model(folder: Path, kind: Literal["encoder", "lm"]) -> ModelSource:
    bare = kind == "encoder" and on_rank_zero(lambda: holds_bare_adapter(folder))
    return _with_adapter(folder) if bare else on_every_rank(lambda: _in_folder(folder))


def _in_folder(folder: Path) -> ModelSource:
    _check_model_folder(folder, str(folder))
    return ModelSource(folder.absolute(), str(folder.absolute()))


def _with_adapter(export: Path) -> ModelSource:
    name = on_every_rank(lambda: base_of_adapter(export))
    local = Path(name).is_absolute()
    base = on_every_rank(lambda: _in_folder(Path(name))) if local else ModelSource(_download(name), name)
    return base._replace(adapter=export.absolute())


def _check_model_folder(folder: Path, name: str) -> None:
    if not folder.is_dir():
        raise RecipeError(f"start: the folder {name} does not exist; name a folder that holds a model")
    if problem := pickled_model(folder):
        raise RecipeError(f"start: {problem}")
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any(folder.glob("*.safetensors")):
        missing.append("weights (*.safetensors; convert other formats with save_pretrained)")
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        missing.append("tokenizer (tokenizer.json)")
    if missing:
        adapter = (folder / ADAPTER_CONFIG).is_file()
        fix = (
            "it holds an adapter, so name its base or an export with merged weights"
            if adapter
            else "add what is missing"
        )
        raise RecipeError(f"start: {name} lacks {', '.join(missing)}; {fix}")


def _download(hub: str) -> Path:
    """The local snapshot of a hub model: rank 0 first, then the others, who find it done or have their own disk."""
    path = Path(together(lambda: _snapshot(hub)))
    return Path(on_every_rank(lambda: path if rank() == 0 else _snapshot(hub)))


def _snapshot(hub: str) -> str:
    try:
        path = snapshot_download(hub, allow_patterns=MODEL_FILES, ignore_patterns=NOT_MODEL_FILES)
    except (OSError, ValueError, HTTPError) as error:  # the hub's own errors are kinds of these
        raise RecipeError(f"start: {hub}: {hub_problem(hub, error)}") from None
    _check_model_folder(Path(path), hub)
    return path


def tokenizer_digest(folder: Path) -> str:
    """16 hex digits of the files that make a tokenizer."""
    files = sorted(path for path in folder.iterdir() if any(path.match(pattern) for pattern in _TOKENIZER_PARTS))
    hashes = [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files if path.is_file()]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]


def ids_digest(folder: Path) -> list[str | int]:
    """What decides the ids of a text for the model of a folder: its tokenizer, and how many ids have an embedding.

    Raises:
        RecipeError: for a config.json that cannot be read.
    """
    try:
        return [tokenizer_digest(folder), read_config(folder).vocab_size]
    except ValueError as error:
        raise RecipeError(f"start: {error}") from None


def text_ids(encoder: EncoderSettings, tokenizer_folder: Path) -> Callable[[list[str]], list[list[int]]]:
    """What gives texts that have their prefix the ids that the model of a folder reads in training.

    Raises:
        RecipeError: for a tokenizer that does not load.
    """
    try:
        tokenizer = model_tokenizer(tokenizer_folder)
    except ValueError as error:
        raise RecipeError(f"start: {error}") from None

    def ids(texts: list[str]) -> list[list[int]]:
        return tokenize(tokenizer, texts, "", encoder.max_tokens, encoder.append_eos)

    return ids
