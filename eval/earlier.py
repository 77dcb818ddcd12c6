"""What the same evaluation left in its folder before it was killed: collections that are not scored again.

Called by eval.evaluate; what reads files, on rank 0.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eval.local_tasks import content_digest
from eval.mteb_files import UNFINISHED, Scored, remove_scored, task_file
from eval.results import Result, Written, file_name, versions
from eval.tasks import MtebTask, Task

DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what reading a file of another kind may raise


class Earlier(NamedTuple):
    """A result as read from its folder, finished or not."""

    folder: Path
    scored: Scored
    collections: dict[str, dict[str, Any]]  # of metrics.json
    per_query: dict[str, dict[str, dict[str, float]]]


def read_earlier(folder: Path, record: dict[str, Any]) -> Earlier | None:
    """The result in a folder if it is of the same weights and settings, by the same versions; None if it is not."""
    scored = Scored(**record["mteb"])
    try:
        metrics, per_query = (_json(folder / name) for name in ("metrics.json", "per_query.json"))
        same = all(metrics[key] == record[key] for key in ("label", "mteb")) and metrics["versions"] == versions()
        return Earlier(folder, scored, metrics["collections"], per_query) if same else None
    except DAMAGED:
        return None


def is_unfinished(folder: Path) -> bool:
    """Whether a folder holds no finished result; true also where an evaluation was killed before its first scores.

    A damaged metrics.json is none of a killed evaluation, which writes it aside.
    """
    try:
        return not _json(folder / "metrics.json").get("finished", True)  # which earlier versions do not say
    except FileNotFoundError:
        return True
    except DAMAGED:
        return False


def remove_other(folder: Path) -> None:
    """Delete the files of the result in a folder, which another one is about to take the place of."""
    try:
        metrics = _json(folder / "metrics.json")
        names = [file_name(name) for name in metrics["collections"]]
        scored = Scored(**metrics["mteb"]) if "mteb" in metrics else None
    except DAMAGED:
        return
    for name in names:
        places = (f"{name}.json", f"rankings/{name}.json", f"rankings/{name}.trec", f"context/{name}.safetensors")
        for place in places:
            (folder / place).unlink(missing_ok=True)
    if scored is not None and len(scored.revision) == 16 and scored.revision.isalnum():
        remove_scored(folder, scored)
    for name in ("metrics.json", "per_query.json"):
        (folder / name).unlink(missing_ok=True)


def data_digest(task: Task) -> str:
    """16 hex digits of all of a collection that its scores depend on."""
    how = [task.task_name, task.subset, task.split, task.ignore_identical_ids, task.code, task.task_type]
    starts = None if task.body_starts is None else task.body_starts.tolist()
    more = {
        "candidates": task.candidates or {},
        "excluded": task.excluded or {},
        "answers": task.answers or {},
        "starts": starts,
        "how": how,
    }
    return content_digest(task.collection, more)


def finished_collection(earlier: Earlier, task: Task, digest: str) -> dict[str, Any] | None:
    """The scores of a collection for `as_result`, if they are there, of the same data, and not damaged."""
    name = task.collection.name
    try:
        row, per_query = earlier.collections[name], earlier.per_query[name]
        whole = all(
            list(scores) == list(task.collection.queries) and float(np.mean(list(scores.values()))) == row[key]
            for key, scores in per_query.items()
        )
        ranked = (earlier.folder / "rankings" / f"{file_name(name)}.trec").is_file()
        lacking = {task.main_score, *task.reported} - per_query.keys()
        if row["data"] != digest or lacking or not whole or not ranked:
            return None
        return {
            "per_query": {key: list(scores.values()) for key, scores in per_query.items()},
            "about": {key: value for key, value in row.items() if key not in per_query},
            "row": _row(earlier, task),
        }
    except DAMAGED:
        return None


def _row(earlier: Earlier, task: Task) -> dict[str, Any]:
    """A collection's row of the file in mteb's format; KeyError if it has none."""
    if task.official is None:
        path = earlier.folder / f"{file_name(task.collection.name)}.json"
    else:
        path = task_file(earlier.folder, earlier.scored, task.task_name)
        path = path if path.is_file() else path.with_name(path.name + UNFINISHED)
    for row in _json(path)["scores"][task.split]:
        if row["hf_subset"] == task.subset:
            return row
    raise KeyError(task.subset)


def as_result(task: Task, query_ids: list[str], found: dict[str, Any]) -> Result:
    """The result of a task with what `finished_collection` found of it."""
    about = found["about"]
    per_query = {key: np.array(values) for key, values in found["per_query"].items()}
    written = Written(about, found["row"])
    return Result(task, query_ids, per_query, None, about["identical_ids_dropped"], {}, about["seconds"], written)


def finished_task(earlier: Earlier, task: MtebTask) -> list[Any] | None:
    """mteb's result of a task that it scored, and the seconds it took; None if it is not there, or of other data."""
    try:
        whole = _json(task_file(earlier.folder, earlier.scored, task.name))
        rows = [row for name, row in earlier.collections.items() if name.split(":")[0] == task.name]
        same = whole["dataset_revision"] == task.task.metadata.dataset["revision"]
        complete = len(rows) == sum(len(of_split) for of_split in whole["scores"].values()) > 0
        return [whole, rows[0]["seconds"]] if same and complete else None
    except DAMAGED:
        return None


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
