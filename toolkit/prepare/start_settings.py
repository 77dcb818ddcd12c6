"""The encoder section of each stage made complete: what a recipe leaves out is as the model it starts from names it.

Called once, before anything else reads the section: by the launcher before the first stage, and by the dry run.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from toolkit.data.tokens import frame
from toolkit.export.write import read_settings
from toolkit.files import expanded
from toolkit.methods import keys_of
from toolkit.models.backbone import load_tokenizer
from toolkit.models.places import TOKENIZER_FILES, base_of_adapter, holds_bare_adapter, hub_problem
from toolkit.models.sentence_settings import MODULES, OUR_POOLING, Named, cut_note, named_by_folder, prompt_problem
from toolkit.recipe.checks import cross_checks
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.models import EncoderKeys, FolderStart, HubStart, Start
from toolkit.recipe.schema import Recipe

SMALL_FILES = ["*.json", "1_Pooling/*", "*/config.json", "tokenizer*", "*.model", "merges.txt", "vocab.txt"]
NOT_SMALL = ["*.safetensors", "*.safetensors.index.json", "*.bin", "onnx/*", "openvino/*"]
FIXES = {
    "pooling": 'write "eos", "mean" or "cls"',
    "normalize": "write true or false",
    "query_prefix": 'write it, or ""',
    "passage_prefix": 'write it, or ""',
    "max_tokens": "write the longest input of training in tokens",
    "eval_max_tokens": "write the longest input of evaluation in tokens",
}
NAMES_NONE = "that names no pooling, so that nothing tells whether it was ever a retriever"

# Of a tokenizer that is not built yet, or not here.
UNKNOWN_ENDS: dict[bool | None, list[str]] = {None: [], True: ["the end token"], False: []}


class Unresolved(Exception):
    """A model whose small files cannot be had here; says why."""


class Resolved(NamedTuple):
    """The complete encoder section of a stage, and what there is to say of it."""

    encoder: EncoderKeys
    rows: list[tuple[str, str]]  # each key with its value and where that is from
    notes: list[str]  # where the recipe and the model that the stage starts from differ


class _Origin(NamedTuple):
    """What a stage starts from."""

    named: Named
    model: str  # how it is called
    ends: dict[bool | None, list[str]]  # append_eos -> the special tokens after a text
    doubt: str = ""  # why it may never have been a retriever; empty if it was one


def resolve_recipe(recipe: Recipe) -> list[Resolved]:
    """The complete encoder section of each stage.

    Where the hub cannot be reached and the recipe leaves nothing out, the section stays as it is.

    Raises:
        RecipeError: as `resolve`, for all stages at once; for settings that do not go with the rest of the recipe.
    """
    found, problems = [], []
    for index, stage in enumerate(recipe.stages):
        try:
            found.append(resolve(recipe, index))
        except Unresolved as error:
            if _depends(stage.encoder):
                problems.append(f"stages.{index}.encoder: {error}")
            found.append(Resolved(stage.encoder, [], [f"note: stages.{index}.encoder: not compared: {error}"]))
        except (RecipeError, ValueError) as error:
            problems += [line for line in str(error).splitlines() if line not in problems]
    if not problems:
        problems = _checked(with_encoders(recipe, [resolved.encoder for resolved in found]))
    if problems:
        raise RecipeError("\n".join(problems))
    return found


def _depends(encoder: EncoderKeys) -> bool:
    """Whether what texts become depends on what the model names."""
    written = encoder.model_dump(exclude_none=True)
    return not FIXES.keys() <= written.keys() or (encoder.pooling == "eos" and encoder.append_eos is None)


def resolve_stage(recipe: Recipe, index: int) -> tuple[Recipe, list[tuple[str, str]], list[str]]:
    """The recipe with the encoder section of one stage complete, and the rows and notes on it; raises as `resolve`."""
    resolved = resolve(recipe, index)
    encoders = [stage.encoder for stage in recipe.stages]
    recipe = with_encoders(recipe, [*encoders[:index], resolved.encoder, *encoders[index + 1 :]])
    if problems := _checked(recipe):
        raise RecipeError("\n".join(problems))
    return recipe, resolved.rows, resolved.notes


def _checked(recipe: Recipe) -> list[str]:
    return [f"{where}: {what}" for where, what in cross_checks(recipe.stages)]


def with_encoders(recipe: Recipe, encoders: list[EncoderKeys]) -> Recipe:
    """A recipe with other encoder sections, one for each stage."""
    pairs = zip(recipe.stages, encoders, strict=True)
    return recipe.model_copy(update={"stages": [stage.model_copy(update={"encoder": own}) for stage, own in pairs]})


def resolve(recipe: Recipe, index: int) -> Resolved:
    """The complete encoder section of a stage; `previous` goes back through the stages, whose exports need not exist.

    Raises:
        RecipeError: one line for each key that neither the recipe nor the model names; for a model with parts that
            training would drop, and for files that are missing or damaged.
        Unresolved: if the model is on a hub that gives it to nobody here.
    """
    first = index
    while recipe.stages[first].start == "previous":
        first -= 1
    start = recipe.stages[first].start
    if isinstance(start, FolderStart) and (problem := _no_model(expanded(start.folder))):
        raise RecipeError(f"stages.{first}.start: {problem}")
    origin = _of_start(start)
    resolved = _complete(recipe, first, origin)
    for number in range(first + 1, index + 1):
        files = dict.fromkeys(EncoderKeys.model_fields, f"stages.{number - 1}.encoder")
        after_lm = keys_of(recipe.stages[number - 1].objective.name).exports_lm
        doubt = "the stage before trains a language model" if after_lm else ""
        origin = _Origin(Named(resolved.encoder.model_dump(), files, []), "the stage before", origin.ends, doubt)
        resolved = _complete(recipe, number, origin)
    return resolved


def _no_model(folder: Path) -> str:
    """Why a folder can hold neither a model nor an adapter; empty if it can."""
    if not folder.is_dir():
        return f"the folder {folder} does not exist; name a folder that holds a model"
    if not (folder / "config.json").is_file() and not holds_bare_adapter(folder):
        return f"{folder} holds no config.json; name a folder that holds a model"
    return ""


def _complete(recipe: Recipe, index: int, origin: _Origin) -> Resolved:
    stage, at = recipe.stages[index], f"stages.{index}.encoder"
    named, written = origin.named, stage.encoder.model_dump(exclude_none=True)
    values = named.values | written
    sources = {
        key: "recipe" if key in written else named.files.get(key, "the tokenizer's own")
        for key in EncoderKeys.model_fields
    }
    to_eos = written.get("pooling") == "eos" and named.values.get("pooling") != "eos"
    if to_eos and "append_eos" not in written:
        values["append_eos"], sources["append_eos"] = True, "pooling eos reads an end token"
    problems = [
        f"{at}.{key}: missing, and {origin.model} names {_not_usable(key, named)}; {fix}"
        for key, fix in FIXES.items()
        if key not in values or (key == "pooling" and values[key] not in OUR_POOLING.values())
    ]
    if not problems and not named.include_prompt:
        reason = prompt_problem(values["pooling"], values["query_prefix"], values["passage_prefix"])
        problems = [f"{at}: {origin.model}: {reason}"] if reason else []
    if problems:
        raise RecipeError("\n".join(problems))
    encoder = EncoderKeys.model_validate(values)
    rows = [(f"encoder.{key}", f"{_plain(key, value)} ({sources[key]})") for key, value in encoder.model_dump().items()]
    after_lm = stage.start == "previous" and keys_of(recipe.stages[index - 1].objective.name).exports_lm
    notes = [*_not_followed(at, origin, encoder), *([] if after_lm else _differences(at, origin, encoder, written))]
    notes += keys_of(stage.objective.name).remarks(f"stages.{index}", stage, origin.doubt)
    return Resolved(encoder, rows, notes)


def _not_usable(key: str, named: Named) -> str:
    """What a model names in place of a value that can be used."""
    return f"{named.values[key]} ({named.files[key]}), which is not trained here" if key in named.values else "none"


def _plain(key: str, value: Any) -> str:
    return value if key == "pooling" else json.dumps(value, ensure_ascii=False)


# --------------------------------------------------------------------------- what differs


def _not_followed(at: str, origin: _Origin, encoder: EncoderKeys) -> Iterator[str]:
    """What training leaves out of the model, whatever it was trained with."""
    for note in origin.named.notes:
        yield f"note: {at}: {origin.model} {note}"
    if encoder.append_eos is False and (end := origin.ends[None]):
        yield (
            f"warning: {at}.append_eos is false: {', '.join(end)}, which the tokenizer puts after every text, is taken "
            "away; remove the key to keep it"
        )


def _differences(at: str, origin: _Origin, encoder: EncoderKeys, written: dict[str, Any]) -> Iterator[str]:
    """Each key of the recipe that is not as the model was trained."""
    named, model = origin.named, origin.model
    for key in ("pooling", "normalize", "query_prefix", "passage_prefix"):
        if key in written and key in named.values and written[key] != named.values[key]:
            trained = f"was trained with {_plain(key, named.values[key])} ({named.files[key]})"
            yield f"note: {at}.{key} is {_plain(key, written[key])}; {model} {trained}"
    longest = named.values.get("eval_max_tokens")
    for key in ("max_tokens", "eval_max_tokens"):
        if key in written and longest is not None and written[key] > longest:
            reads = f"reads at most {longest} ({named.files['eval_max_tokens']})"
            yield f"note: {at}.{key} is {written[key]}; {model} {reads}"
    own, here = (origin.ends[value] for value in (named.values.get("append_eos"), encoder.append_eos))
    if named.values and own != here and not (encoder.append_eos is False and own == origin.ends[None]):
        own, here = (f"ends texts with {', '.join(end)}" if end else "ends texts without one" for end in (own, here))
        yield f"note: {at}.append_eos is {json.dumps(encoder.append_eos)}, which {here}; {model} {own}"


# --------------------------------------------------------------------------- what a model names


def _of_start(start: Start) -> _Origin:
    match start:
        case HubStart():
            return _in_folder(_from_hub(start.hub), start.hub)
        case FolderStart():
            return _in_folder(expanded(start.folder), "the start model")
        case _:
            return _Origin(Named({}, {}, []), "a model that is built", UNKNOWN_ENDS, "a built model is none")


def _in_folder(folder: Path, model: str) -> _Origin:
    base = _of_start(_base(folder)) if holds_bare_adapter(folder) else None
    ends = _ends(folder) if base is None else base.ends  # an adapter is trained with the tokenizer of its base
    if (folder / "export.json").is_file():
        settings = read_settings(folder)
        values = settings.model_dump(include=set(EncoderKeys.model_fields))
        notes = [] if settings.truncate_dim is None else [cut_note(settings.truncate_dim)]
        return _Origin(Named(values, dict.fromkeys(values, "export.json"), notes), model, ends)
    if (folder / MODULES).is_file():
        return _Origin(named_by_folder(folder), model, ends)
    if base is not None:
        return base._replace(
            doubt=f"{model} is an adapter that names no pooling, so that nothing tells whether it was ever a retriever"
        )
    return _Origin(Named({}, {}, []), model, ends, _doubt(folder, model))


def _doubt(folder: Path, model: str) -> str:
    """Why a model without a file that names its pooling may never have been a retriever; empty where its class is none
    of a language model's, such as Contriever.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = str(config["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError):  # where that is a fault, it is said when the model is loaded
        architecture = ""
    if re.search("For[A-Z]|LMHead", architecture):
        return f"{model} is a language model ({architecture})"
    if not architecture or architecture.endswith("Model"):
        return f"{model} is one {NAMES_NONE}"
    return ""


def _ends(folder: Path) -> dict[bool | None, list[str]]:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return UNKNOWN_ENDS
    tokenizer = load_tokenizer(folder)
    special = {append_eos: frame(tokenizer, append_eos)[1] for append_eos in (None, True, False)}
    return {append_eos: tokenizer.convert_ids_to_tokens(ids) for append_eos, ids in special.items()}


def _base(adapter: Path) -> HubStart | FolderStart:
    name = base_of_adapter(adapter)
    return FolderStart(folder=name) if Path(name).is_absolute() else HubStart(hub=name)


def _from_hub(hub: str) -> Path:
    """A folder with the small files of a model on the hub: all but its weights."""
    try:
        try:
            hf_hub_download(hub, MODULES)
        except LocalEntryNotFoundError:  # not known whether there is one, unless the whole model is in the cache
            folder = Path(snapshot_download(hub, local_files_only=True))
            if not any(folder.glob("*.safetensors")):
                raise
            return folder
        except EntryNotFoundError:
            pass  # a plain model: its tokenizer alone is of use
        return Path(snapshot_download(hub, allow_patterns=SMALL_FILES, ignore_patterns=NOT_SMALL))
    except (HFValidationError, RepositoryNotFoundError) as error:
        if isinstance(error, GatedRepoError):
            raise Unresolved(f"{hub}: {hub_problem(hub, error)}") from None
        raise RecipeError(f"start: {hub}: {hub_problem(hub, error)}") from None
    except (OSError, ValueError, HTTPError) as error:
        raise Unresolved(f"{hub}: {hub_problem(hub, error)}") from None
