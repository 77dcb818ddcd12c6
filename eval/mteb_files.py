"""Results in mteb's cache layout: `mteb.ResultCache(cache_path=OUT).load_results()` finds every task in them.

Called by eval.results and eval.progress on rank 0, for tasks of mteb alone: mteb can read no others with certainty.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.files import expanded, replace_text

UNFINISHED = ".unfinished"  # behind the name of a task's file while subsets are missing: mteb does not read it


class Scored(NamedTuple):
    """What was scored, as mteb names it."""

    model: str  # ORG/NAME
    revision: str  # 16 hex digits of weights and settings


def name_scored(label: str, settings: Any) -> Scored:
    """A hub id as it is, anything else as local/NAME, by its name or the end of its path.

    One commit of a model has other scores with another prefix or length, and an adapter has none: the revision is a
    digest of `settings` (JSON), all that decides the scores, also for a model of the hub and for BM25.
    """
    revision = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = expanded(label)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", label) and not folder.is_dir():
        return Scored(label, revision)
    place = folder.resolve().as_posix() if label and folder.is_dir() else label
    parts = [part for part in place.split("/") if part.strip(". ")]
    name = re.sub(r"[^A-Za-z0-9._+-]+", "_", "_".join(parts[-3:])).strip("._")
    return Scored(f"local/{name[-100:] or 'model'}", revision)


def task_file(folder: Path, scored: Scored, task: str) -> Path:
    """Where mteb looks for a task's result below an evaluation's folder: results/ORG__NAME/REVISION/TASK.json."""
    return _revision_folder(folder, scored) / f"{task}.json"


def write_task(folder: Path, scored: Scored, task: str, result: dict[str, Any], whole: bool) -> None:
    """Write a task's result with model_meta.json beside it; under another name while it is not whole."""
    from mteb.models.model_meta import ModelMeta  # takes seconds to import: only where there are tasks of mteb

    path = task_file(folder, scored, task)
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = ModelMeta.create_empty({"name": scored.model, "revision": scored.revision, "modalities": ["text"]})
    replace_text(path.with_name("model_meta.json"), json.dumps(meta.to_dict(), default=str, indent=4) + "\n")
    part = path.with_name(path.name + UNFINISHED)
    replace_text(path if whole else part, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    (part if whole else path).unlink(missing_ok=True)


def remove_scored(folder: Path, scored: Scored) -> None:
    """Delete the results of something that was scored earlier into the same folder."""
    place = _revision_folder(folder, scored)
    shutil.rmtree(place, ignore_errors=True)
    if place.parent.is_dir() and not any(place.parent.iterdir()):
        place.parent.rmdir()


def _revision_folder(folder: Path, scored: Scored) -> Path:
    return folder / "results" / scored.model.replace("/", "__").replace(" ", "_") / scored.revision


def write_aggregates(folder: Path, scored: Scored, names: set[str]) -> None:
    """Write those of these tasks that are means of others (CQADupstackRetrieval), where all others are there."""
    import mteb  # takes seconds, as above
    from mteb.abstasks.aggregated_task import AbsTaskAggregate  # mteb again

    for name in sorted(names):
        try:
            task = mteb.get_task(name)
        except KeyError:  # a group of ours
            continue
        if not isinstance(task, AbsTaskAggregate):
            continue
        paths = [task_file(folder, scored, part.metadata.name) for part in task.tasks]
        if all(path.is_file() for path in paths):
            combined = task.combine_task_results([mteb.TaskResult.from_disk(path) for path in paths])
            whole = json.loads(combined.model_copy(update={"kg_co2_emissions": None}).model_dump_json())
            write_task(folder, scored, name, whole, whole=True)
