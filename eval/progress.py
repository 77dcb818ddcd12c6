"""An evaluation as it goes: what is scored so far, in memory and on disk, and a line as each collection ends.

Called by eval.evaluate on every rank; rank 0 writes, and decides for all what was scored before.
"""

import json
from pathlib import Path
from typing import Any

from eval.earlier import DAMAGED, as_result, data_digest, finished_collection, finished_task, read_earlier, remove_other
from eval.mteb_encoder import by_collection
from eval.mteb_files import Scored, write_aggregates, write_task
from eval.results import Groups, MtebResult, Result, Written, title, write_collection, write_mteb_task, write_results
from eval.suite_names import OPEN_GROUPS
from eval.tasks import MtebTask, Task
from toolkit.collectives import on_rank_zero, rank
from toolkit.data.records import Collection


class Progress:
    """What is scored so far.

    Attributes:
        results: collection -> its scores.
        groups: what means are of; a mean is written once its group is whole.
        skipped: tasks that BM25 leaves out.
        found: collections whose scores are those of the same evaluation, interrupted before.
    """

    def __init__(self, folder: Path, record: dict[str, Any], beside: Path | None) -> None:
        self.results: dict[str, Result | MtebResult] = {}
        self.groups: Groups = {}
        self.skipped: list[str] = []
        self.found: set[str] = set()
        self._folder, self._record, self._scored = folder, record, Scored(**record["mteb"])
        self._whole: set[str] = set()
        self._earlier = read_earlier(folder, record) if rank() == 0 else None
        self._other = self._earlier is None  # the folder may hold another result, which goes at the first write
        self._digests: dict[str, str] = {}
        self._beside = _rows(beside) if rank() == 0 and beside is not None else {}

    # ------------------------------------------------------------------ collections that are searched

    def find(self, task: Task) -> bool:
        """Whether a collection was scored before; then its scores are among the results. Every rank calls it."""
        name = task.collection.name

        def look() -> dict[str, Any] | None:
            self._digests[name] = data_digest(task)
            return finished_collection(self._earlier, task, self._digests[name]) if self._earlier else None

        found = on_rank_zero(look)
        if found is None:
            return False
        self.results[name] = as_result(_without_texts(task), list(task.collection.queries), found)
        self.found.add(name)
        self._say_found(name)
        return True

    def add(self, task: Task, result: Result) -> Result:
        """Write the scores of a collection and say them; returns them without texts."""
        name = task.collection.name
        self.found.discard(name)

        def write() -> list[Any]:
            self._remove_other()
            return list(write_collection(self._folder, self._record, name, result, self._digests[name]))

        written = Written(*on_rank_zero(write))
        result = result._replace(task=_without_texts(task), rankings=None, written=written)
        self.results[name] = result
        if task.official is not None:
            parts = [one for one in self.results.values() if isinstance(one, Result) and _same_task(one.task, task)]
            on_rank_zero(lambda: write_mteb_task(self._folder, self._scored, parts))
        self._write(finished=False)
        if rank() == 0:
            self._say(name, task.main_score, result.shown[task.main_score], result.seconds, written.about)
        return result

    # ------------------------------------------------------------------ tasks that mteb scores

    def finished_task(self, task: MtebTask) -> dict[str, MtebResult]:
        """Collection -> scores of a task that was scored before; empty if it was not."""
        found = on_rank_zero(lambda: finished_task(self._earlier, task) if self._earlier else None)
        results = {} if found is None else by_collection(task, *found)
        self.found |= results.keys()
        return results

    def add_task(self, task: MtebTask, found: dict[str, MtebResult]) -> None:
        """Write the scores of a task's collections and say them."""
        self.results |= found
        if found.keys() <= self.found:
            for name in found:
                self._say_found(name)
            return

        def write() -> None:
            self._remove_other()
            write_task(self._folder, self._scored, task.name, next(iter(found.values())).whole, whole=True)

        on_rank_zero(write)
        self._write(finished=False)
        for name, result in found.items() if rank() == 0 else ():
            self._say(name, result.main_score, result.shown[result.main_score], result.seconds, {})

    def main_scores_of(self, task: MtebTask) -> dict[str, str]:
        """Collection -> main score of a task that is among the results."""
        return {
            name: result.main_score
            for name, result in self.results.items()
            if isinstance(result, MtebResult) and name.split(":")[0] == task.name
        }

    # ------------------------------------------------------------------ all of it

    def count(self, task: Task | MtebTask, main_scores: dict[str, str]) -> None:
        """Let a task's collections count in the mean of its group."""
        self.groups.setdefault(task.group, {}).setdefault(task.member, {}).update(main_scores)

    def end_suite(self) -> None:
        """Write the means of groups that have all their members now."""
        whole = {group for group in self.groups if group not in OPEN_GROUPS} - self._whole
        self._whole |= whole
        if whole and self.results.keys() - self.found:
            self._write(finished=False)

    def end(self) -> None:
        """Write that this is all."""
        self._whole = set(self.groups)
        if any(isinstance(result, Result) and result.task.official for result in self.results.values()):
            names = {name for group, members in self.groups.items() for name in (group, *members)}
            on_rank_zero(lambda: write_aggregates(self._folder, self._scored, names))
        self._write(finished=True)

    def _write(self, finished: bool) -> None:
        groups = {group: members for group, members in self.groups.items() if group in self._whole}

        def write() -> None:
            self._remove_other()
            write_results(self._folder, self._record, self.results, groups, self.skipped, finished)

        on_rank_zero(write)

    def _remove_other(self) -> None:
        if self._other:
            remove_other(self._folder)
            self._other = False

    def _say(self, name: str, key: str, score: float, seconds: float, about: dict[str, Any]) -> None:
        beside = self._beside.get(name, {})
        line = f"{name}: {'BM25 ' if self._record['system']['kind'] == 'bm25' else ''}{title(key)} {score:.4f}"
        if key in beside and beside.get("data") == about.get("data"):
            line += f", BM25 {beside[key]:.4f}, difference {score - beside[key]:+.4f}"
        line += "".join(f", {about[what]:,} {what}" for what in ("excluded", "candidates") if what in about)
        print(f"{line}, {seconds:,.1f} s", flush=True)

    def _say_found(self, name: str) -> None:
        if rank() == 0:
            lexical = self._record["system"]["kind"] == "bm25"
            same = "same settings and data" if lexical else "same weights, settings and data"
            print(f"{name}: {'BM25 ' if lexical else ''}scored before ({same})", flush=True)


def _rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The collections of a result; none where there is none."""
    try:
        return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["collections"]
    except DAMAGED:
        return {}


def _same_task(task: Task, other: Task) -> bool:
    return task.official is not None and (task.task_name, task.revision) == (other.task_name, other.revision)


def _without_texts(task: Task) -> Task:
    collection = Collection(task.collection.name, {}, {}, {})
    return task._replace(collection=collection, candidates=None, excluded=None, answers=None, body_starts=None)
