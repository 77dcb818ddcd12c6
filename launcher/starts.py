"""The models that training starts from, scored before it: which stages share one, where its scores are, its row.

Called by launcher/stages.py. A start is named by the first stage that has it.
"""

import json
from pathlib import Path
from typing import Any

import torch

from eval.evaluate import evaluate, evaluate_bm25
from eval.suites import check_prompts, data_state, expand
from toolkit.collectives import on_rank_zero
from toolkit.export.write import load_export
from toolkit.files import replace_text
from toolkit.models.backbone import DTYPES
from toolkit.models.contextual_files import is_contextual
from toolkit.models.places import ModelSource
from toolkit.models.retriever import Retriever, load_retriever
from toolkit.ranks.together import on_every_rank
from toolkit.recipe.evaluation import EvalSettings
from toolkit.recipe.models import BuildStart
from toolkit.recipe.schema import Recipe, stage_folder
from toolkit.recipe.stage import Stage
from toolkit.training.feed import find_models, stage_run
from toolkit.training.metrics import write_eval_scalars


def origin(recipe: Recipe, index: int) -> int | None:
    """The start that stage `index` goes back to through `previous`; None if that one is not evaluated.

    Evaluated are stage 0's and those that a later stage builds.
    """
    while recipe.stages[index].start == "previous":
        index -= 1
    first = next(i for i, stage in enumerate(recipe.stages) if _have_one_start(stage, recipe.stages[index]))
    return first if first == 0 or isinstance(recipe.stages[first].start, BuildStart) else None


def _have_one_start(one: Stage, other: Stage) -> bool:
    """Whether the scores of one's start are those of the other's. A start is most often plain, and reads no context."""
    contexts = one.eval.context, other.eval.context
    if None in contexts:
        one, other = (
            stage.model_copy(update={"eval": stage.eval.model_copy(update={"context": None})}) for stage in (one, other)
        )
    return _identity(one) == _identity(other)


def _identity(stage: Stage) -> dict[str, Any]:
    """All of a recipe that the scores of a stage's start depend on; a build's tokenizer comes from the stage's data."""
    keys = {"start", "encoder", "precision"} | ({"data"} if isinstance(stage.start, BuildStart) else set())
    return stage.model_dump(mode="json", include=keys) | {"eval": _changes(stage)}


def _changes(stage: Stage) -> dict[str, Any]:
    changes = stage.eval.model_dump(mode="json", include=set(EvalSettings.model_fields))
    return {key: value for key, value in changes.items() if (key, value) != ("context", None)}  # earlier records


def start_label(recipe: Recipe, first: int) -> str:
    """How the report calls a start."""
    name = "untrained" if isinstance(recipe.stages[first].start, BuildStart) else "before training"
    return f"{name} (stage {first})" if first else name


def start_folder(run: Path, first: int) -> Path:
    """Where the scores of a start are, below the run folder."""
    return run / (f"start_{first}" if first else "start")


def start_scores(recipe: Recipe, first: int | None, run: Path) -> dict[str, dict[str, float]] | None:
    """Collection -> metric -> value of a start; None if there are none, or those of another start. Rank 0 calls it."""
    if first is None:
        return None
    record = _record(start_folder(run, first))
    return record["scores"] if record is not None and _is_of(record, recipe, first) else None


def _is_of(record: dict[str, Any], recipe: Recipe, first: int) -> bool:
    return record.get("of") == _identity(recipe.stages[first]) and _is_on(record, _suites(recipe, first))


def _is_on(record: dict[str, Any], suites: list[str]) -> bool:
    """Whether the scores of a record are those of these suites, with the data they have now."""
    return record["suites"] == suites and record.get("data") == data_state(suites)


def with_suites(recipe: Recipe) -> Recipe:
    """A recipe with `quick` and `stage` written out: they mean every folder that one of its stages names, too.

    Raises:
        RecipeError: for `quick` where no folder is named, and for a prompt that is for no task.
    """
    named = [suite for stage in recipe.stages for suite in stage.eval.suites]
    suites = on_rank_zero(lambda: [expand(stage.eval.suites, named) for stage in recipe.stages])
    on_rank_zero(lambda: [check_prompts(s.eval.prompts, own) for s, own in zip(recipe.stages, suites, strict=True)])
    stages = [
        stage.model_copy(update={"eval": stage.eval.model_copy(update={"suites": own})})
        for stage, own in zip(recipe.stages, suites, strict=True)
    ]
    return recipe.model_copy(update={"stages": stages})


def _suites(recipe: Recipe, first: int | None = None) -> list[str]:
    """The suites of the stages that go back to a start, or of all, in their order."""
    stages = [stage for i, stage in enumerate(recipe.stages) if first is None or origin(recipe, i) == first]
    return list(dict.fromkeys(suite for stage in stages for suite in stage.eval.suites))


def _record(folder: Path) -> dict[str, Any] | None:
    path = folder / "done.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def bm25_is_scored(recipe: Recipe, run: Path) -> bool:
    """Whether <run>/bm25 has the scores of BM25 on every suite of the recipe, and there is one."""
    suites, record = _suites(recipe), _record(run / "bm25")
    of = _of_bm25(recipe)
    return bool(suites) and record is not None and record.get("of") == of and _is_on(record, suites)


def score_bm25(recipe: Recipe, run: Path) -> None:
    """Evaluate BM25 on every suite of the recipe, unless that is done."""
    suites = _suites(recipe)
    if suites and not on_rank_zero(lambda: bm25_is_scored(recipe, run)):
        changes = recipe.stages[0].eval
        record = {"suites": suites, "data": on_rank_zero(lambda: data_state(suites)), "of": _of_bm25(recipe)}
        evaluate_bm25(suites, run / "bm25" / "eval", changes, run.parent / "prepared")
        on_rank_zero(lambda: _finish(run / "bm25", record))


def _of_bm25(recipe: Recipe) -> list[str | None]:
    """All of a recipe but its suites that the scores of BM25 depend on; the same in all stages."""
    settings = recipe.stages[0].eval
    return [settings.identical_ids, settings.bm25_text, settings.bm25_language]


def evaluate_start(recipe: Recipe, first: int, run: Path, device: torch.device) -> None:
    """Evaluate a start on the suites of the stages that go back to it, unless that is done."""
    stage, folder, suites = recipe.stages[first], start_folder(run, first), _suites(recipe, first)

    def scored(model: list[Any] | None) -> bool:
        return start_scores(recipe, first, run) is not None and model in (None, (_record(folder) or {}).get("model"))

    finished = stage_folder(run, recipe, first) / "done.json"
    if not suites or on_rank_zero(lambda: finished.is_file() and scored(None)):  # its start may be gone by now
        return
    source = find_models(stage_run(recipe, first, run, device)).retriever
    if on_rank_zero(lambda: scored(_state(source))):
        return
    retriever = on_every_rank(lambda: _load(source, stage, device))
    changes = stage.eval
    if retriever.first is None:  # the start of a contextual stage is most often plain
        changes = changes.model_copy(update={"context": None})
    step = sum(earlier.optim.steps for earlier in recipe.stages[:first])
    record = {"suites": suites, "data": on_rank_zero(lambda: data_state(suites)), "of": _identity(stage)}
    label = start_label(recipe, first)
    scores = evaluate(
        retriever,
        suites,
        folder / "eval",
        label=label,
        step=step,
        changes=changes,
        may_collapse=True,
        beside=run / "bm25" / "eval",
    )
    on_rank_zero(lambda: write_eval_scalars(run, scores, step))
    on_rank_zero(lambda: _finish(folder, record | {"scores": scores, "model": _state(source)}))


def _load(source: ModelSource, stage: Stage, device: torch.device) -> Retriever:
    trained, settings = source.adapter or source.folder, stage.encoder_settings
    if not is_contextual(trained):
        return load_retriever(source.folder, settings, DTYPES[stage.precision], device, source.adapter)
    found = load_export(trained, device)
    encoder = found.encoder.changed(settings.pooling, settings.normalize, settings.truncate_dim)
    return found._replace(encoder=encoder, settings=settings)


def _state(source: ModelSource) -> list[Any]:
    """A model's name (of a build it holds a digest of the data), and the size and time of its weights' files."""
    folders = [source.folder] + ([source.adapter] if source.adapter is not None else [])
    files = sorted(path for folder in folders for path in folder.glob("*.safetensors"))
    return [source.name, *([path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files)]


def _finish(folder: Path, record: dict[str, Any]) -> None:
    replace_text(folder / "done.json", json.dumps(record, indent=2) + "\n")
