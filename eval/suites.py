"""Names of suites -> the collections they mean, each with the group whose mean it counts in.

Called by eval.evaluate and, for what a recipe's names mean together, by the launcher.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from eval.folders import is_folder, load_folder, shrink
from eval.local_tasks import local_task
from eval.suite_names import LOCAL, STDLIB, SUITES, Group
from eval.tasks import MtebTask, Task
from toolkit.data.stdlib_corpus import collection as stdlib_collection
from toolkit.files import expanded
from toolkit.recipe.errors import RecipeError, one_line


def means_folder(name: str) -> bool:
    """Whether a suite is a folder, with or without a split: not where its name means something here (./beir does)."""
    return name not in (*SUITES, *STDLIB, "quick") and not name.startswith("quick:") and is_folder(name)


def expand(suites: list[str], named: Iterable[str] | None = None) -> list[str]:
    """Suites with `quick` and `stage` written out: both mean every local folder of `named` (None: of `suites`) too.

    `quick` becomes quick:FOLDER for each, `stage` is followed by them.

    Raises:
        RecipeError: for quick where no folder is named.
    """
    folders = [name for name in (suites if named is None else named) if means_folder(name)]
    expanded = []
    for suite in suites:
        if suite == "quick" and not folders:
            raise RecipeError("suite quick: no local folder is named; write quick:FOLDER")
        expanded += [f"quick:{folder}" for folder in folders] if suite == "quick" else [suite]
        expanded += folders if suite == "stage" else []
    return list(dict.fromkeys(expanded))


def check_prompts(prompts: Iterable[str], suites: list[str]) -> None:
    """Raise RecipeError for a prompt that is for no task: no suite's folder, no task of mteb and no type of them."""
    places = (suite.removeprefix("quick:") for suite in suites if means_folder(suite.removeprefix("quick:")))
    folders = (Path(p if Path(p).expanduser().is_dir() else p.rpartition(":")[0]).expanduser() for p in places)
    names = {name for folder in folders for name in (folder.resolve().name, f"quick_{folder.resolve().name}")}
    unknown = [prompt for prompt in prompts if prompt not in names | {"stdlib", "Retrieval"}]
    if unknown:
        from eval.mteb_tasks import check_names  # imports mteb, which takes seconds

        check_names(unknown, names)


def load_suite(name: str) -> Iterable[Task | MtebTask]:
    """The collections of a suite, read one at a time where they come from mteb; only queries with judgements are kept.

    Args:
        name: a name of SUITES; "stdlib:dev", "stdlib:test"; a folder, FOLDER or FOLDER:split, or quick:FOLDER for at
            most 2,000 of its documents; an mteb task or benchmark; NAME=FOLDER, where the folder holds the data of that
            task, or of a benchmark's tasks in folders below it.

    Raises:
        RecipeError: for an unknown name or split, a malformed file (with file and line), a hub that cannot be reached.
    """
    if name.startswith("stdlib:"):
        if name not in STDLIB:
            raise RecipeError(f"suite {one_line(name)}: no such split; use {' or '.join(STDLIB)}")
        task = local_task(stdlib_collection(STDLIB[name]), "stdlib", STDLIB[name], code=True)
        return [task._replace(group=LOCAL, member=task.collection.name)]
    if means_folder(name):
        task = load_folder(name)
        return [task._replace(group=LOCAL, member=task.collection.name)]
    if name.startswith("quick:") and is_folder(name.removeprefix("quick:")):
        task = shrink(load_folder(name.removeprefix("quick:")))
        return [task._replace(group="quick", member=task.collection.name)]
    return _mteb_tasks(*mteb_name(name))


def mteb_name(name: str) -> tuple[str, Path | None]:
    """Name of mteb and folder of NAME or NAME=FOLDER; RecipeError where there is no such folder."""
    label, equals, mirror = name.partition("=")
    if not equals and name.startswith((".", "/", "~", "quick:")):
        raise RecipeError(
            f"suite {one_line(name, 200)}: no such folder; name a folder with corpus.jsonl, queries.jsonl and qrels/"
        )
    if equals and not os.path.isdir(expanded(mirror)):
        named = one_line(f"suite {name}", 200)
        raise RecipeError(f"{named} names no folder; write NAME=FOLDER with the data of mteb's task NAME")
    return label, expanded(mirror) if equals else None


def find_tasks(name: str, mirror: Path | None) -> list[tuple[Group, str, Any, Path | None]]:
    """(group, member of it, mteb's task, the copy of its data on disk) of everything that a name of mteb's means."""
    from eval.mteb_tasks import find_groups, mirror_of  # imports mteb, which takes seconds

    groups = find_groups(name, SUITES.get(name))
    single = sum(len(tasks) for _, tasks in groups) == 1
    return [
        (group, member, part, mirror and mirror_of(mirror, part, single))
        for group, tasks in groups
        for member, parts in tasks
        for part in parts
    ]


def _mteb_tasks(name: str, mirror: Path | None) -> Iterator[Task | MtebTask]:
    """The tasks of a name, found now, loaded one by one."""
    from eval.mteb_tasks import load_task  # imports mteb, which takes seconds

    found = find_tasks(name, mirror)

    def load() -> Iterator[Task | MtebTask]:
        for group, member, part, folder in found:
            for task in load_task(part, folder):
                if isinstance(task, Task):
                    task = task._replace(main_score=group.main_score or task.main_score, reported=group.reported)
                yield task._replace(group=group.name, member=member)

    return load()


def data_state(suites: list[str]) -> dict[str, Any]:
    """Suite -> names, sizes and times of the files of its folder: scores of other data are then told apart.

    mteb's tasks from the hub are pinned to a revision, the embedded corpus to the Python version.
    """
    state = {}
    for suite in suites:
        quick = suite.removeprefix("quick:")
        local = quick != suite or means_folder(suite)
        places = (quick, quick.rpartition(":")[0]) if local else (suite.partition("=")[2],)
        folders = [expanded(place) for place in places if place]
        folder = next((place for place in folders if os.path.isdir(place)), None)
        files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder else []
        found = [(str(path.relative_to(folder)), path.stat()) for path in files] if folder else []
        state[suite] = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found]
    return state
