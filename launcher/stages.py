"""The stages of a run, in order: evaluate each start, then train, export and evaluate; then the report.

Called by launcher/run.py on every rank, with a valid recipe, once all ranks have met. A finished stage is skipped, an
unfinished one goes on.
"""

import json
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError

from eval.contexts import beside, contexts_beside, label_of
from eval.evaluate import evaluate
from eval.report import Origin, ReportRow, TrainingRow, write_report
from eval.suites import data_state
from launcher.ahead import look_ahead
from launcher.dry_run import Unresolved, stage_parameters
from launcher.environment import environment
from launcher.starts import (
    bm25_is_scored,
    evaluate_start,
    origin,
    score_bm25,
    start_folder,
    start_label,
    start_scores,
    with_suites,
)
from launcher.stop import check_stops, reason_to_stop
from toolkit.collectives import on_rank_zero, world_size
from toolkit.export.card import add_scores
from toolkit.export.write import load_export
from toolkit.files import replace_text
from toolkit.methods.costs import SOURCE
from toolkit.prepare.start_settings import resolve_recipe, with_encoders
from toolkit.ranks.lock import LOCK, locked
from toolkit.ranks.together import on_every_rank
from toolkit.ranks.watch import Watch
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.models import EncoderKeys
from toolkit.recipe.schema import Recipe, recipe_type, stage_folder
from toolkit.recipe.stage import batch_numbers
from toolkit.training.loop import train_stage
from toolkit.training.metrics import write_eval_scalars
from toolkit.training.numbers import render


def run_stages(recipe: Recipe, run: Path, only: int | None, device: torch.device, watch: Watch) -> str:
    """Run every stage of a recipe (or the one numbered `only`) in the folder `run`.

    Returns:
        Why the run stopped early, after the report, on all ranks: a stage is worse than its eval.stop_if_worse allows;
        empty if it did not.

    Raises:
        RecipeError: for anything the user can mend; RankZeroFailed on the other ranks where rank 0 says why.
        Interrupted, Diverged: as train_stage.
    """
    with ExitStack() as held:
        recipe, told = with_settings(recipe)
        on_rank_zero(lambda: check_ahead(recipe, world_size(), unfinished(recipe, run, only)))
        on_rank_zero(lambda: open_run(recipe, run, held))
        return _run_stages(with_suites(recipe), told, run, only, device, watch)


def with_settings(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """A recipe with complete encoder sections, the same on every rank, and the text that each stage begins with."""

    def found() -> list[Any]:
        with mendable("encoder"):
            stages = resolve_recipe(recipe)
        return [[one.encoder.model_dump(), "\n".join([render(one.rows), *one.notes])] for one in stages]

    resolved = on_rank_zero(found)
    return with_encoders(recipe, [EncoderKeys(**keys) for keys, _ in resolved]), [text for _, text in resolved]


def _run_stages(
    recipe: Recipe, told: list[str], run: Path, only: int | None, device: torch.device, watch: Watch
) -> str:
    if only:
        on_rank_zero(lambda: check_order(recipe, only, run))
    with mendable("BM25"):
        score_bm25(recipe, run)
    for index in on_rank_zero(lambda: finished_stages(recipe, run)):
        rescore(recipe, index, run, device)
    indices, reason = list(range(len(recipe.stages))) if only is None else [only], ""
    for index in indices:
        if reason := stop_after(recipe, index - 1, run):
            break
        on_rank_zero(partial(say_encoder, recipe, index, run, told[index]))
        first = origin(recipe, index)
        if first is not None:
            with mendable(f"stage {first} {recipe.stages[first].name}: start"):
                evaluate_start(recipe, first, run, device)
        run_stage(recipe, index, run, device, watch)
    else:
        reason = stop_after(recipe, indices[-1], run)
    with mendable("report"):
        on_rank_zero(lambda: report(recipe, run, reason))
    return reason


def say_encoder(recipe: Recipe, index: int, run: Path, text: str) -> None:
    """Print how a stage that is to train reads its texts, and where that is not as the model was trained."""
    if not is_done(stage_folder(run, recipe, index)):
        print(f"stage {recipe.stages[index].name}: encoder\n{text}", flush=True)


def stop_after(recipe: Recipe, index: int, run: Path) -> str:
    """Why the run stops after stage `index`, the same on every rank; empty if it does not."""
    with mendable("eval.stop_if_worse"):
        return on_rank_zero(lambda: reason_to_stop(recipe, index, run)) if index >= 0 else ""


def check_order(recipe: Recipe, index: int, run: Path) -> None:
    """Raise RecipeError if a stage is to run whose predecessor is not finished."""
    if not any(is_done(stage_folder(run, recipe, i)) for i in (index, index - 1)):
        name = recipe.stages[index].name
        raise RecipeError(f"stage {index} {name}: the stage before it is not finished; run that first")


def run_stage(recipe: Recipe, index: int, run: Path, device: torch.device, watch: Watch) -> None:
    """Train, export and evaluate one stage, unless that is done."""
    stage, folder = recipe.stages[index], stage_folder(run, recipe, index)
    if on_rank_zero(lambda: is_done(folder)):
        on_rank_zero(lambda: print(f"stage {index} {stage.name}: finished in {folder}; skipped", flush=True))
        return
    with mendable(f"stage {index} {stage.name}"):
        result = train_stage(recipe, index, run, device, watch)
        data = on_rank_zero(lambda: data_state(stage.eval.suites))
        scores = evaluate_export(recipe, index, run, device)
        on_rank_zero(lambda: finish(folder, result._asdict() | {"scores": scores, "data": data}))


def rescore(recipe: Recipe, index: int, run: Path, device: torch.device) -> None:
    """Evaluate a finished stage, and the start it goes back to, again if the data of its suites changed since."""
    stage, folder, first = recipe.stages[index], stage_folder(run, recipe, index), origin(recipe, index)
    done = on_rank_zero(lambda: json.loads((folder / "done.json").read_text(encoding="utf-8")))
    data = on_rank_zero(lambda: data_state(stage.eval.suites))
    if done.get("data", {suite: [] for suite in data}) == data:  # not in older records: as if there were no folder
        return
    where = f"stage {index} {stage.name}"
    on_rank_zero(lambda: print(f"{where}: the data of its suites changed; evaluated again", flush=True))
    if first is not None:
        with mendable(f"stage {first} {recipe.stages[first].name}: start"):
            evaluate_start(recipe, first, run, device)
    with mendable(where):
        scores = evaluate_export(recipe, index, run, device)
        on_rank_zero(lambda: finish(folder, done | {"scores": scores, "data": data}))


@contextmanager
def mendable(where: str) -> Iterator[None]:
    """Errors of the library that tell of the user's models, data or machine, as one line."""
    try:
        yield
    except (ValueError, ImportError, OSError, SafetensorError) as error:  # the last two: also a disk that is full
        raise RecipeError(f"{where}: {' '.join(str(error).split()) or type(error).__name__}") from error


def check_ahead(recipe: Recipe, ranks: int, stages: Collection[int] | None = None) -> None:
    """What would end a later stage, found before the first: data, suites, ranks that do not fit, models, LoRA targets.

    Looks at the data and models of `stages` (None: all), those that are to be trained, and at every suite.
    Says which columns of each source are used. Raises RecipeError with every problem, one a line.
    """
    check_stops(recipe)
    found = look_ahead(recipe, dry=False, stages=stages)
    problems = list(found.problems)
    for index in range(len(recipe.stages)) if stages is None else stages:
        stage = recipe.stages[index]
        try:
            batch_numbers(stage, ranks)
            with mendable(f"stage {index} {stage.name}"):
                stage_parameters(recipe, index)
        except RecipeError as error:
            problems.append(str(error))
        except Unresolved as error:
            problems.append(f"stage {index} {stage.name}: {error}")
    if problems:
        raise RecipeError("\n".join(problems))
    for line in [*found.said, *(f"warning: {line}" for line in found.warnings)]:
        print(line, flush=True)


def open_run(recipe: Recipe, run: Path, held: ExitStack) -> None:
    """Make the run folder, or check that this recipe made it; nothing of another run is overwritten.

    Until `held` ends no other process may have the folder.

    Stages that have not begun may differ from the run's recipe: they are taken from this one. A stage has begun once
    it has logged a step. What describes a recipe (description, hardware, memory, time, sources) may differ too.
    """
    path = run / "recipe.json"
    try:
        if not path.exists() and run.exists() and any(entry.name != LOCK for entry in run.iterdir()):
            raise RecipeError(f"{run}: is not empty and holds no recipe.json; choose another --output")
        run.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(run))
        if path.exists():
            _check_version(path)
            old, new = json.loads(path.read_text(encoding="utf-8")), json.loads(recipe.to_json())
            logged = _logged_stages(run / "log.jsonl")
            begun = [
                i
                for i, stage in enumerate(old["stages"])
                if stage["name"] in logged or (run / f"stage_{i}_{stage['name']}").exists()
            ]
            count = max(begun, default=-1) + 1
            old, new = (
                {"name": raw["name"], "seed": raw["seed"], "stages": raw["stages"][:count]} for raw in (old, new)
            )
            for stage in (*old["stages"], *new["stages"]):
                stage["eval"].pop("stop_if_worse", None)  # decides what comes after the stage, which may be changed
                stage.pop("guard", None)  # changes no result
            different = _first_difference(old, new)
            if different:
                raise RecipeError(f"{run}: was made by a different recipe ({different}); choose another --output")
        replace_text(path, recipe.to_json())
        replace_text(run / "environment.json", json.dumps(environment(), indent=2) + "\n")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{run}: cannot be used as run folder ({reason}); choose another --output") from None


def _check_version(path: Path) -> None:
    """RecipeError where the recipe that a run has written is none of this version: its keys mean other things."""
    try:
        recipe_type().model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError:
        raise RecipeError(
            f"{path.parent}: was made by another version of this toolkit, whose recipe.json has other keys; go on with "
            "that version, or choose another --output"
        ) from None


def _logged_stages(log: Path) -> set[str]:
    """Names of the stages that have logged a step."""
    names = set()
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else []:
        with suppress(ValueError):  # a line cut short by a crash
            names.add(json.loads(line)["stage"])
    return names


def _first_difference(old: object, new: object, path: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(key, old.get(key), new.get(key)) for key in old | new]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(str(index), *pair) for index, pair in enumerate(zip(old, new, strict=True))]
    else:
        return "" if old == new else f"{path}: {json.dumps(old)[:40]} there, {json.dumps(new)[:40]} here"
    found = (_first_difference(a, b, f"{path}.{key}".removeprefix(".")) for key, a, b in pairs if a != b)
    return next(filter(None, found), "")


def evaluate_export(recipe: Recipe, index: int, run: Path, device: torch.device) -> dict[str, dict[str, float]]:
    """Evaluate a stage's export as a user would load it; scores go to TensorBoard and the model card."""
    stage, folder = recipe.stages[index], stage_folder(run, recipe, index)
    if not stage.eval.suites:
        return {}
    retriever = on_every_rank(lambda: load_export(folder / "export", device))
    step = sum(earlier.optim.steps for earlier in recipe.stages[: index + 1])
    given = {"step": step, "beside": run / "bm25" / "eval"}
    scores = evaluate(retriever, stage.eval.suites, folder / "eval", label=stage.name, changes=stage.eval, **given)
    for place, changes in contexts_beside(stage.eval):
        label = f"{stage.name}, {label_of(place)}"
        evaluate(retriever, stage.eval.suites, beside(folder / "eval", place), label=label, changes=changes, **given)
    on_rank_zero(lambda: write_eval_scalars(run, scores, step))
    on_rank_zero(lambda: add_scores(folder / "export", scores, start_scores(recipe, origin(recipe, index), run)))
    return scores


def is_done(folder: Path) -> bool:
    """True once a stage is trained, exported and evaluated."""
    return (folder / "done.json").is_file()


def finished_stages(recipe: Recipe, run: Path) -> list[int]:
    """Numbers of the stages that are done."""
    return [index for index in range(len(recipe.stages)) if is_done(stage_folder(run, recipe, index))]


def unfinished(recipe: Recipe, run: Path, only: int | None) -> list[int]:
    """Numbers of the stages (or of `only`) that are still to be trained; what a finished one read may be gone."""
    done = finished_stages(recipe, run)
    return [index for index in range(len(recipe.stages)) if only in (None, index) and index not in done]


def finish(folder: Path, result: dict[str, Any]) -> None:
    """Mark a stage as finished."""
    replace_text(folder / "done.json", json.dumps(result, indent=2, default=str) + "\n")


def report(recipe: Recipe, run: Path, stopped: str) -> None:
    """Write report.md over what is finished and print its tables, with the paths of what the run leaves behind.

    A stage is compared with BM25, with the model before training that it goes back to, and with the stage before it.
    """
    folders = [stage_folder(run, recipe, index) for index in range(len(recipe.stages))]
    done = finished_stages(recipe, run)
    labels = [f"{index} {stage.name}" for index, stage in enumerate(recipe.stages)]
    rows = [ReportRow("BM25", run / "bm25" / "eval", "", [])] if bm25_is_scored(recipe, run) else []
    for index in done:
        first, start = origin(recipe, index), ""
        if first is not None and start_scores(recipe, first, run) is not None:
            start = start_label(recipe, first)
            if start not in [row.label for row in rows]:
                rows.append(ReportRow(start, start_folder(run, first) / "eval", start, []))
        if recipe.stages[index].eval.suites:
            against = ["BM25", start, *labels[max(index - 1, 0) : index]]
            known = [row.label for row in rows]
            others = [label for label in against if label in known]
            rows.append(ReportRow(labels[index], folders[index] / "eval", start or labels[index], others))
            for place, _ in contexts_beside(recipe.stages[index].eval):
                label = f"{labels[index]}, {label_of(place)}"
                folder = beside(folders[index] / "eval", place)
                rows.append(ReportRow(label, folder, start or labels[index], [labels[index]]))
    training = []
    for index in done:
        stage, record = recipe.stages[index], json.loads((folders[index] / "done.json").read_text(encoding="utf-8"))
        training.append(TrainingRow(labels[index], stage.name, stage.batch.pool * stage.batch.pools_per_step, record))
    if not all("flops_rule" in row.done for row in training):  # trained before costs were recorded: no table of some
        training = []
    kind = "export" if recipe.stages[done[-1]].lora is None else "adapter"
    paths = {kind: folders[done[-1]] / "export", "TensorBoard": run / "tensorboard", "report": run / "report.md"}
    described = [f"Stage {i}: {stage.description}" for i, stage in enumerate(recipe.stages) if stage.description]
    made = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    write_report(run, rows, training, Origin(paths, made, SOURCE), " ".join(described), stopped)
