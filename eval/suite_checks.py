"""What would end an evaluation, found before it without reading a collection whole: suites, splits, files, hub ids.

Called by the launcher before a run and by --dry-run.
"""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from eval.folders import folder_and_split, is_folder
from eval.local_tasks import choose_split
from eval.suite_names import STDLIB
from eval.suites import find_tasks, load_suite, means_folder, mteb_name
from toolkit.data.beir import beir_rows, beir_splits, read_judgements
from toolkit.data.hub import hub_error
from toolkit.data.source_files import is_hub_layout
from toolkit.recipe.errors import RecipeError

_FIRST = 100  # rows of a corpus and of queries that are looked at


class HubData(NamedTuple):
    """A dataset of the hub that a suite will be read from."""

    name: str
    revision: str
    usual: bool  # read as mteb reads most retrieval tasks, not by code of the task


class NotKnown(RecipeError):
    """Nothing is wrong as far as can be seen."""


def check_suite(name: str) -> Iterator[HubData]:
    """Look for what a suite means, as `eval.suites.load_suite` does; the hub's datasets are named and not looked for.

    Raises:
        RecipeError: for an unknown name or split, a folder that is not there or lacks files, and malformed rows among
            the first and in the judgements.
    """
    if name in STDLIB:
        return
    place = name.removeprefix("quick:")
    if means_folder(name) or (place != name and is_folder(place)):
        _check_folder(place)
    elif name.startswith("stdlib:"):
        load_suite(name)  # says which there are
    else:
        from mteb.abstasks.retrieval import AbsTaskRetrieval  # imports mteb, which takes seconds

        for _, _, task, folder in find_tasks(*mteb_name(name)):
            data = task.metadata.dataset
            if folder is None:
                searched = isinstance(task, AbsTaskRetrieval)
                usual = searched and type(task).load_data is AbsTaskRetrieval.load_data
                yield HubData(data["path"], data["revision"], usual)
            elif not is_hub_layout(folder):
                beir_splits(folder)


def check_on_hub(data: HubData) -> None:
    """Ask the hub, or the local cache where it cannot be reached, for a suite's dataset.

    Raises:
        RecipeError: if there is none, or no access to it.
        Unreachable: without network and without a copy in the cache.
        NotKnown: if only mteb can tell, which loads the data of some tasks in ways of its own.
    """
    import datasets  # takes seconds to import: for data of the hub alone

    try:
        datasets.get_dataset_config_names(data.name, revision=data.revision)
    except Exception as error:  # the library raises half a dozen unrelated types here
        problem = hub_error(error, "", data.name, "write NAME=FOLDER, where FOLDER is a copy of the data")
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if data.usual or "DatasetNotFoundError" in kinds:
            raise problem from None
        raise NotKnown(f"dataset {data.name}: only mteb can tell whether it can be loaded") from None


def _check_folder(name: str) -> None:
    folder, wanted = folder_and_split(name)
    if is_hub_layout(folder):
        from eval.hub_layout import hub_splits  # imports mteb, which takes seconds

        choose_split(folder, hub_splits(folder), wanted)
        return
    answers = wanted is None and not (folder / "qrels").exists()
    if not answers or not all((folder / part).exists() for part in ("queries.jsonl", "corpus.jsonl")):
        split = choose_split(folder, beir_splits(folder), wanted)
        read_judgements(folder / "qrels" / f"{split}.tsv")
    for part in ("queries.jsonl", "corpus.jsonl"):
        _look_at(folder / part)


def _look_at(path: Path) -> None:
    deque(islice(beir_rows(path), _FIRST), maxlen=0)
