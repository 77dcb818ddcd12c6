"""Where a model is: a folder, an adapter with its base, or the hub, and what keeps it from being read there.

Called by whatever finds a model for training, for evaluation or for a look ahead.
"""

import json
from pathlib import Path
from typing import NamedTuple

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from toolkit.models.formats import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONTEXT_WEIGHTS, pickled_adapter
from toolkit.recipe.errors import RecipeError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


class ModelSource(NamedTuple):
    """A model on disk."""

    folder: Path  # config.json, safetensors, tokenizer
    name: str  # what an adapter names as its base: the hub id, or the absolute folder
    adapter: Path | None = None  # an adapter to continue: folder of an export


def holds_bare_adapter(folder: Path) -> bool:
    """True for an adapter without full weights beside it."""
    full = [path for path in folder.glob("*.safetensors") if path.name not in (ADAPTER_WEIGHTS, CONTEXT_WEIGHTS)]
    return (folder / ADAPTER_CONFIG).is_file() and not full


def base_of_adapter(folder: Path) -> str:
    """Absolute folder or hub id of the model that the adapter in a folder applies to.

    Raises:
        RecipeError: if the folder names none, names one that is gone, or lacks the adapter's weights.
    """
    path = folder / ADAPTER_CONFIG
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        name = None
    if not isinstance(name, str) or not name:
        raise RecipeError(f"{path}: names no base model; write its hub id or folder into base_model_name_or_path")
    if Path(name).is_absolute() and not (Path(name) / "config.json").is_file():
        raise RecipeError(
            f"{path}: the base model {name} is gone; put it back, or write its new place into base_model_name_or_path"
        )
    if problem := pickled_adapter(folder):
        raise RecipeError(problem)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise RecipeError(f"{folder}: lacks the adapter's weights ({ADAPTER_WEIGHTS}); put them back")
    return name


def hub_problem(hub: str, error: Exception, instead: str = 'write {"folder": "<path>"}') -> str:
    """What kept a model on the hub from being read, and the way out, in one line."""
    local = f"or put the model in a folder and {instead}"
    page = f"https://huggingface.co/{hub}"
    match error:
        case GatedRepoError():
            return f"access is restricted; ask for it at {page} and set HF_TOKEN to a token of that account, {local}"
        case RepositoryNotFoundError():
            return f"not found on the hub; mend the id, set HF_TOKEN if it is private, {local}"
        case HFValidationError():
            return f"not a hub id (owner/name); mend it, {local}"
        case LocalEntryNotFoundError():
            return f"the hub cannot be reached and the model is not in the local cache; connect to the network, {local}"
        case HfHubHTTPError():
            status = error.response.status_code
            fix = f"ask for access at {page} and set HF_TOKEN" if status in (401, 403) else "try again later"
            return f"the hub answered with HTTP status {status}; {fix}, {local}"
        case _:
            return f"the download broke off ({type(error).__name__}); start again to go on with it, {local}"
