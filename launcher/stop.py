"""eval.stop_if_worse: whether a run stops after a stage, and why. Called by launcher/stages.py on rank 0."""

import json
from pathlib import Path

from eval.compare import compare_systems, interval, p_text, read_system
from eval.results import title
from launcher.starts import origin, start_folder, start_label
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.schema import Recipe, stage_folder
from toolkit.retrieval.bm25 import warn_if_nothing_found
from toolkit.retrieval.words import CODE

LEVEL = 0.05


def check_stops(recipe: Recipe) -> None:
    """Raise RecipeError where a stage is compared with a model before training that is not scored."""
    for index, stage in enumerate(recipe.stages):
        stop = stage.eval.stop_if_worse
        if stop is not None and stop.than == "start" and origin(recipe, index) is None:
            raise RecipeError(
                f"stages.{index}.eval.stop_if_worse.than: the model that this stage starts from is not scored (those "
                'of stage 0 and of builds are); write "bm25" or "previous"'
            )


def reason_to_stop(recipe: Recipe, index: int, run: Path) -> str:
    """Why the run stops after stage `index`, in one line; empty if it does not, or the stage is not finished.

    A function of the recipe and of the scores in the run folder: the same command says the same again.

    Raises:
        RecipeError, ValueError: if the scores to compare are not there, or are of different data.
    """
    stage, folder = recipe.stages[index], stage_folder(run, recipe, index)
    stop = stage.eval.stop_if_worse
    if stop is None or not (folder / "done.json").is_file():
        return ""
    other_folder, label = _other(recipe, index, run, stop.than)
    compared = compare_systems(read_system(other_folder, label), read_system(folder / "eval", stage.name))
    if not compared:
        raise ValueError(f"stage {index} {stage.name} and {label} have no collection of two queries in common")
    if stop.than == "bm25":
        _warn_of_void_bm25(other_folder, [row.collection for row in compared])
    worse = [row for row in compared if row.change.difference < -stop.by and row.p_holm < LEVEL]
    if not worse:
        return ""
    worst = min(worse, key=lambda row: row.change.difference)
    others = f", and on {len(worse) - 1} more" if len(worse) > 1 else ""
    return (
        f"stage {index} {stage.name} is worse than {label} on {worst.collection}: {title(worst.score)} "
        f"{worst.after:.4f}, {interval(worst.change)}, p {p_text(worst.p_holm)} after Holm over {len(compared)} "
        f"collection{'s' * (len(compared) > 1)}{others}; the run stops here, to go on: --set "
        f"stages.{index}.eval.stop_if_worse=null"
    )


def _warn_of_void_bm25(folder: Path, collections: list[str]) -> None:
    """A stage is above a BM25 that finds nothing, whatever it has learned: say so again where a run rests on it."""
    of_all = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["collections"]
    keys = "eval.bm25_text and eval.bm25_language: this stage is compared with it"
    for name in (name for name in collections if "queries_without_documents" in of_all[name]):  # not in earlier ones
        about = of_all[name]
        reading, without = about["bm25_language"] or CODE, about["queries_without_documents"]
        warn_if_nothing_found(f"queries of {name}", without, about["queries"], reading, keys)


def _other(recipe: Recipe, index: int, run: Path, than: str) -> tuple[Path, str]:
    """Folder of the other system's scores, and how the reason calls it."""
    if than == "bm25":
        return run / "bm25" / "eval", "BM25"
    if than == "previous":
        return stage_folder(run, recipe, index - 1) / "eval", f"stage {index - 1} {recipe.stages[index - 1].name}"
    first = origin(recipe, index)
    assert first is not None  # check_stops has seen to it
    return start_folder(run, first) / "eval", f"its start ({start_label(recipe, first)})"
