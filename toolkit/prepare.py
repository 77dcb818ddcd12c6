"""One-off artefacts of a stage, cached by digest below <run>/prepared/: passages, a built model; and where models are.

Called by training on every rank: rank 0 does the work, and if it fails every rank raises the same RecipeError.
"""

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from toolkit.collectives import first_of_any_rank, on_rank_zero, rank
from toolkit.data import stdlib_corpus
from toolkit.data.faults import keep_skipped, say_skipped, skipping
from toolkit.data.spans import PassageStore, write_store
from toolkit.data.texts import of_groups, passage_texts
from toolkit.files import expanded, replacing_folder
from toolkit.models.backbone import read_config
from toolkit.models.formats import ADAPTER_CONFIG, ADAPTER_WEIGHTS, pickled_adapter, pickled_model
from toolkit.prepare_sources import KnownSource, check_unchanged, known_sources
from toolkit.recipe import (
    BuildStart,
    Data,
    FolderStart,
    HubStart,
    RecipeError,
    StdlibSource,
)

MODEL_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model", "merges.txt", "vocab.txt"]
NOT_MODEL_FILES = ["*/*", "consolidated*", "*.bin", "*.py"]  # */*: other formats live in subfolders
_TOKENIZER_PARTS = ("tokenizer*", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

Store = TypeVar("Store")


class ModelSource(NamedTuple):
    """A model on disk."""

    folder: Path  # config.json, safetensors, tokenizer
    name: str  # what an adapter names as its base: the hub id, or the absolute folder
    adapter: Path | None = None  # an adapter to continue: folder of an export


# --------------------------------------------------------------------------- where models are


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


def holds_bare_adapter(folder: Path) -> bool:
    """True for an adapter without full weights beside it."""
    full = [path for path in folder.glob("*.safetensors") if path.name != ADAPTER_WEIGHTS]
    return (folder / ADAPTER_CONFIG).is_file() and not full


def _in_folder(folder: Path) -> ModelSource:
    _check_model_folder(folder, str(folder))
    return ModelSource(folder.absolute(), str(folder.absolute()))


def _with_adapter(export: Path) -> ModelSource:
    name = on_every_rank(lambda: base_of_adapter(export))
    local = Path(name).is_absolute()
    base = on_every_rank(lambda: _in_folder(Path(name))) if local else ModelSource(_download(name), name)
    return base._replace(adapter=export.absolute())


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


def on_every_rank(work: Callable[[], Any]) -> Any:
    """What `work` returns, on each rank its own; what one of them cannot read is a RecipeError on all of them."""
    result, problem = None, ""
    try:
        result = work()
    except (RecipeError, ValueError, ImportError, OSError) as error:
        problem = str(error) or type(error).__name__
    problem = first_of_any_rank(problem)
    if problem:
        raise RecipeError(problem)
    return result


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


def together(work: Callable[[], Any]) -> Any:
    """What `work` returns on rank 0, on every rank; what it cannot read or load is a RecipeError on every rank."""

    def outcome() -> list[Any]:
        try:
            return [work(), None]
        except (RecipeError, ValueError, ImportError) as error:
            return [None, str(error)]
        except OSError as error:
            place = error.filename or "the disk"
            return [None, f"{place}: cannot be used ({error.strerror}); mend it, or choose another --output"]

    result, problem = on_rank_zero(outcome)
    if problem is not None:
        raise RecipeError(problem)
    return result


def open_everywhere(folder: Path, open_store: Callable[[Path], Store]) -> Store:
    """What rank 0 stored, opened by each rank; a folder that one of them lacks or cannot read is told by all."""

    def read() -> Store:
        try:
            return open_store(folder)
        except FileNotFoundError:
            node = socket.gethostname()
            raise RecipeError(f"{folder} is not on {node}; put the run folder on a disk that all nodes share") from None
        except ValueError as error:
            raise RecipeError(f"{folder}: is damaged ({error}); delete it, and it is made again") from None

    return on_every_rank(read)


# --------------------------------------------------------------------------- passages


def prepare_passages(data: Data, run: Path) -> PassageStore:
    """The passages of a stage's sources, cut and stored once below `run`, which all nodes must see.

    Raises:
        RecipeError: for malformed or empty data, the same on every rank.
    """

    def write() -> str:
        known = known_sources(data.sources, run.parent / "prepared")
        folder = run / "prepared" / f"passages_{data_digest(data, known)}"
        if not folder.is_dir():
            counts: Counter[str] = Counter()
            skipped = skipping(data)
            form = "groups" if any(of_groups(source) for source in data.sources) else "documents"
            with replacing_folder(folder) as work:
                write_store(passage_texts(data, counts, skipped), work, form)
                if not counts["passages"]:
                    raise RecipeError(f"data.sources: no text in {counts['rows']} rows; name a source that holds some")
                check_unchanged(known)
                keep_skipped(skipped, work)
            _announce(data, counts, PassageStore.open(folder))
        say_skipped(folder)
        return str(folder)

    return open_everywhere(Path(together(write)), PassageStore.open)


def data_digest(data: Data, known: list[KnownSource]) -> str:
    """16 hex digits of what the sources hold, wherever they lie, and of how it is read and cut."""
    sources = [[source.model_dump(mode="json", exclude={"folder"}), content] for source, _, content in known]
    settings = data.model_dump(mode="json", exclude={"sources", "neighbours", "near_duplicates", "mine"})
    return hashlib.sha256(json.dumps([settings, sources]).encode()).hexdigest()[:16]


def _announce(data: Data, counts: Counter[str], store: PassageStore) -> None:
    library = stdlib_corpus.summary() if any(isinstance(source, StdlibSource) for source in data.sources) else {}
    of_library = "".join(f"; {key.replace('_', ' ')} {value}" for key, value in library.items())
    print(
        f"data: {counts['rows']:,} rows, {counts['empty']:,} of them without text; "
        f"{store.meta['documents']:,} documents, {len(store):,} passages, digest {store.digest}{of_library}",
        flush=True,
    )


# --------------------------------------------------------------------------- a model from nothing


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
