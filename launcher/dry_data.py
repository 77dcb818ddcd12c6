"""What --dry-run says of a stage's data: its rows, the epochs that the steps make of them, one row as tokens."""

from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from launcher.ahead import Ahead
from toolkit.data.first_look import Look, count_rows
from toolkit.files import expanded
from toolkit.methods import keys_of, method_of
from toolkit.methods.method import Lines
from toolkit.models.backbone import load_tokenizer
from toolkit.models.places import TOKENIZER_FILES, base_of_adapter, holds_bare_adapter
from toolkit.models.vocabulary import model_tokenizer
from toolkit.prepare.clusters import clusters_ahead
from toolkit.recipe.errors import RecipeError, one_line
from toolkit.recipe.models import BuildStart, FolderStart, HubStart, Start
from toolkit.recipe.pairs import PairsData
from toolkit.recipe.schema import Recipe


def data_lines(recipe: Recipe, index: int, found: Ahead) -> Lines:
    """(name, value) of what a stage's sources hold; of a source that could not be looked at, that it was not.

    Raises:
        RecipeError: for sources of fewer rows than a pool takes of them, or a tokenizer that cannot be loaded.
    """
    stage = recipe.stages[index]
    tokenizer = _tokenizer(recipe, index, stage.start)
    counts = [
        count_rows(source) if (index, number) in found.looks else (None, "not counted")
        for number, source in enumerate(stage.data.sources)
    ]
    lines = []
    for number, (count, how) in enumerate(counts):
        name = "data rows" if len(counts) == 1 else f"data rows of source {number}"
        lines.append((name, how if count is None else f"{count:,} ({how})"))
    looks = [found.looks[index, n] for n in range(len(counts)) if (index, n) in found.looks]
    lines.append(("epochs", _epochs(recipe, index, [count for count, _ in counts], looks, tokenizer)))
    lines += _clusters(recipe, index, [count for count, _ in counts])
    if isinstance(tokenizer, str):
        return [*lines, ("example row", f"not shown: {tokenizer}")]
    shown = (
        (n, each) for (i, n), each in found.looks.items() if i == index and (each.pairs or each.texts or each.graded)
    )
    first = next(shown, None)
    if first is None:
        return [*lines, ("example row", "not shown: no row of a local source was looked at")]
    if None in stage.encoder.model_dump(exclude={"append_eos"}).values():
        return [*lines, ("example row", "not shown: the encoder section is not complete without the start model")]
    starts: dict[str, Start] = {model.name: model.start for model in keys_of(stage.objective.name).models(stage)}

    def tokenizer_of(name: str) -> Any:
        return _tokenizer(recipe, index, starts[name])

    return [*lines, *method_of(stage.objective.name).example(stage, *first, tokenizer_of)]


def _epochs(recipe: Recipe, index: int, counts: list[int | None], looks: list[Look], tokenizer: Any) -> str:
    known = [count for count in counts if count is not None]
    if len(known) < len(counts) or len(looks) < len(counts):
        return "not known: not all rows are counted"
    stage, there = recipe.stages[index], None if isinstance(tokenizer, str) else tokenizer
    try:
        return method_of(stage.objective.name).epochs(stage, recipe.seed, known, looks, there)
    except RecipeError as error:
        raise RecipeError(f"stages.{index}.{error}") from None


def _clusters(recipe: Recipe, index: int, counts: list[int | None]) -> Lines:
    """What clustering a stage's rows takes, where its recipe asks for clusters."""
    data = recipe.stages[index].data
    if not isinstance(data, PairsData) or data.clusters is None:
        return []
    sizes = [n if n is None else min(n, source.limit or n) for n, source in zip(counts, data.sources, strict=True)]
    try:
        return clusters_ahead(data.clusters, sizes)
    except RecipeError as error:
        raise RecipeError(f"stages.{index}.{error}") from None


def _tokenizer(recipe: Recipe, index: int, start: Start) -> Any:
    """The tokenizer that a start has on this machine, or why there is none."""
    match start:
        case BuildStart():
            return "the tokenizer is trained with the stage"
        case "previous":
            return _tokenizer(recipe, index - 1, recipe.stages[index - 1].start)
        case HubStart():
            kept = try_to_load_from_cache(start.hub, "tokenizer.json")
            if not isinstance(kept, str):
                return f"the tokenizer of {start.hub} is not in the local cache"
            folder = Path(kept).parent
        case FolderStart():
            folder = expanded(start.folder)
            if holds_bare_adapter(folder):
                base = base_of_adapter(folder)
                start = FolderStart(folder=base) if Path(base).is_absolute() else HubStart(hub=base)
                return _tokenizer(recipe, index, start)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return f"{folder} holds no tokenizer"
    try:
        return model_tokenizer(folder) if (folder / "config.json").is_file() else load_tokenizer(folder)
    except (ValueError, OSError) as error:
        raise RecipeError(one_line(f"stages.{index}.start: {error}")) from None
