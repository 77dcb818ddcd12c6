"""mteb's tasks and benchmarks: which a name means, their data from the hub or from a copy on disk.

Called by eval.suites; importing it imports mteb, which takes seconds.
"""

import difflib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mteb
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.retrieval import AbsTaskRetrieval

from eval.hub_layout import check_columns, check_rows, collection_of, readable
from eval.limits import warn_unused
from eval.local_tasks import choose_split, files_digest
from eval.scores import K_VALUES, MEASURES
from eval.suite_names import STDLIB, SUITES, Group
from eval.tasks import MtebTask, Official, Task
from toolkit.collectives import rank
from toolkit.data.beir import beir_rows, beir_splits, read_judgements
from toolkit.data.source_files import is_hub_layout
from toolkit.recipe.errors import RecipeError, one_line

OURS = {f"{measure}_at_{k}" for measure in (*MEASURES, "mrr") for k in K_VALUES}
OLD_BRIGHT = ("BrightRetrieval", "BrightLongRetrieval")  # a query may find the documents it is to leave out

Members = list[tuple[str, list[Any]]]  # name of a member of a group, its tasks of mteb


def find_groups(name: str, known: list[Group] | None) -> list[tuple[Group, Members]]:
    """The tasks that a suite's name means, by groups of which a mean is reported.

    Groups of a benchmark with several types of task are one for each type, as mteb's tables have them; an aggregated
    task (CQADupstack) is one member of its group, the mean of its parts, or a group by itself.

    Raises:
        RecipeError: for an unknown name, and for tasks that need more than text.
    """
    if known is not None:
        found = [(group, [(task, _parts(mteb.get_task(task))) for task in group.tasks]) for group in known]
    else:
        found = _benchmark(name) or [_single(name)]
    parts = [part for _, members in found for _, tasks in members for part in tasks]
    others = [part.metadata.name for part in parts if part.metadata.modalities != ["text"]]
    if others:
        raise RecipeError(f"suite {name}: {', '.join(others)}: not of text alone; name the tasks of text one by one")
    old = [part.metadata.name for part in parts if part.metadata.name in OLD_BRIGHT]
    if old and rank() == 0:
        problem = "lets queries find the documents they are to leave out; suite bright (v1.1) does not"
        print(f"warning: {old[0]} {problem}", file=sys.stderr, flush=True)
    return found


def _benchmark(name: str) -> list[tuple[Group, Members]]:
    benchmarks = {label: b for b in mteb.get_benchmarks() for label in (b.name, *b.aliases)}
    if name not in benchmarks:
        return []
    tasks = list(benchmarks[name].tasks)
    kinds = list(dict.fromkeys(task.metadata.type for task in tasks))
    groups = []
    for kind in kinds:
        own = [task for task in tasks if task.metadata.type == kind]
        label = name if len(kinds) == 1 else f"{name} {kind}"
        groups.append((Group(label, ()), [(task.metadata.name, _parts(task)) for task in own]))
    return groups


def _single(name: str) -> tuple[Group, Members]:
    try:
        task = mteb.get_task(name)
    except KeyError:
        known = [task.metadata.name for task in mteb.get_tasks(task_types=["Retrieval"])]
        known += [label for b in mteb.get_benchmarks() for label in (b.name, *b.aliases)]
        close = difflib.get_close_matches(name, [*known, *STDLIB, *SUITES, "quick"], n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "name a folder, an mteb task or an mteb benchmark"
        named = one_line(f"suite {name}", 200)
        raise RecipeError(f"{named}: no folder and no mteb task or benchmark of this name; {hint}") from None
    if isinstance(task, AbsTaskAggregate):
        return Group(name, ()), [(part.metadata.name, [part]) for part in _parts(task)]
    return Group("", ()), [(name, [task])]


def check_names(names: list[str], more: Iterable[str]) -> None:
    """Raise RecipeError for the first name, of a prompt, that is no task and no type of task; `more` are known, too."""
    every = mteb.get_tasks(
        exclude_superseded=False,
        exclude_private=False,
        exclude_beta=False,
        exclude_aggregate=True,  # their parts are scored
    )
    tasks = [task.metadata for task in every]
    known = {name for task in tasks for name in (task.name, task.type)} | set(more)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "name a task of mteb, a type of task or a folder"
            raise RecipeError(f"prompts: {name}: no task or type of task of this name; {hint}")


def _parts(task: Any) -> list[Any]:
    return list(task.tasks) if isinstance(task, AbsTaskAggregate) else [task]


def mirror_of(folder: Path, task: Any, single: bool) -> Path:
    """Where the data of one of a suite's tasks are: `folder` itself for a single task, or below it.

    Below it under the task's name or the last part of the dataset's on the hub (mteb/scifact: scifact).

    Raises:
        RecipeError: if neither is there.
    """
    info = task.metadata
    names = (info.name, str(info.dataset["path"]).rsplit("/", 1)[-1])
    below = [folder / name for name in names if (folder / name).is_dir()]
    if not below and not single:
        raise RecipeError(f"{folder}: holds no folder {' or '.join(names)}; put the data of {info.name} there")
    return below[0] if below else folder


# --------------------------------------------------------------------------- data


def load_task(task: Any, folder: Path | None) -> Iterator[Task | MtebTask]:
    """One collection for each subset and split of a retrieval task; any other task as it is, for mteb to score.

    Args:
        folder: a copy of the task's data, in the hub's layout or (retrieval without subsets) in BEIR layout; None: the
            hub.
    """
    info = task.metadata
    searched = isinstance(task, AbsTaskRetrieval) and info.main_score in OURS and not task.skip_first_result
    revision = info.dataset["revision"] if folder is None else f"disk-{files_digest(folder)}"
    if folder is not None:
        warn_unused(folder, info.name)
    retrieval: Any = task
    if folder is not None and not is_hub_layout(folder):
        if not searched or len(task.hf_subsets) > 1:
            raise RecipeError(f"{folder}: {info.name} is read in the hub's layout; add README.md with its configs")
        retrieval.dataset = {"default": {split: _beir_data(folder, split) for split in task.eval_splits}}
        retrieval.data_loaded = True
    elif folder is not None:
        task.metadata = info.model_copy(update={"dataset": {**info.dataset, "path": str(folder), "revision": revision}})
    if not searched:
        yield MtebTask(task, info.name, folder)
        return
    readable(info.name, task.metadata.dataset["path"], task.load_data, folder)
    task.convert_v1_dataset_format_to_v2(num_proc=None)
    hub_copy = folder if folder is not None and is_hub_layout(folder) else None
    for subset in task.hf_subsets:
        for split in task.eval_splits:
            data = retrieval.dataset[subset][split]
            if hub_copy is not None:
                check_columns(hub_copy, data)
            if len(data["queries"]) and not isinstance(data["queries"][0]["text"], str):  # conversations
                yield MtebTask(task, info.name, folder)
                return
            if hub_copy is not None:
                readable(info.name, str(hub_copy), lambda data=data: check_rows(hub_copy, data))
            name = ":".join(
                [
                    info.name,
                    *([subset] if len(task.hf_subsets) > 1 else []),
                    *([split] if len(task.eval_splits) > 1 else []),
                ]
            )
            yield Task(
                collection_of(name, data),
                task_name=info.name,
                subset=subset,
                split=split,
                revision=revision,
                languages=info.hf_subsets_to_langscripts[subset],
                main_score=info.main_score,
                ignore_identical_ids=task.ignore_identical_ids,
                candidates=data["top_ranked"],
                task_type=info.type,
                official=Official(info.main_score, len(task.hf_subsets) * len(task.eval_splits)),
            )
    task.unload_data()


def _beir_data(folder: Path, split: str) -> dict[str, Any]:
    """A folder in BEIR layout as mteb holds a split's data; the only split there is serves for any."""
    splits = beir_splits(folder)
    split = choose_split(folder, splits, split if split in splits or len(splits) != 1 else None)
    rows = {}
    for part in ("corpus", "queries"):
        rows[part] = [{**row, "id": i} for i, row, _ in beir_rows(folder / f"{part}.jsonl")]
    qrels = read_judgements(folder / "qrels" / f"{split}.tsv", {row["id"] for row in rows["queries"]})
    return {**rows, "relevant_docs": qrels, "top_ranked": None}
