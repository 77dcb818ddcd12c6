"""Retrieval data in the layout of the hub: folders that have it, a split's rows as a collection, what is wrong in them.

Called by eval.folders and eval.mteb_tasks; importing it imports mteb, which takes seconds.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets.config
from datasets import disable_progress_bars, get_dataset_config_names, get_dataset_split_names
from huggingface_hub.utils import logging
from mteb.abstasks.retrieval_dataset_loaders import RetrievalDatasetLoader

from eval.limits import FIELD, excluded_ids, with_limits
from eval.local_tasks import files_digest, local_task, with_revision
from eval.tasks import Task
from toolkit.data.beir import HIGHEST_GRADE, check_id, titled
from toolkit.data.records import Collection
from toolkit.recipe.errors import RecipeError, one_line

disable_progress_bars()  # every rank would print its own
logging.set_verbosity_error()  # the hub is tried for 20 s and each try logged; the error below says it once


def hub_splits(folder: Path) -> list[str]:
    """Splits with judgements of a folder in the hub's layout, sorted."""
    configs = readable(str(folder), str(folder), lambda: get_dataset_config_names(str(folder)))
    missing = [name for name in ("corpus", "queries") if name not in configs]
    qrels = next((name for name in ("default", "qrels") if name in configs), None)
    if missing or qrels is None:
        lacks = ", ".join([*missing, *(["default or qrels"] if qrels is None else [])])
        raise RecipeError(f"{folder}/README.md: its configs lack {lacks}; add them")
    return sorted(map(str, readable(str(folder), str(folder), lambda: get_dataset_split_names(str(folder), qrels))))


def read_hub_layout(folder: Path, name: str, split: str) -> Task:
    """The collection of a folder in the hub's layout, which is no task of mteb."""
    loader = RetrievalDatasetLoader(str(folder), revision=None, split=split)  # pyright: ignore[reportArgumentType]
    data: Any = readable(name, str(folder), loader.load, folder)
    check_columns(folder, data)
    readable(name, str(folder), lambda: check_rows(folder, data))
    task = local_task(collection_of(name, data), folder.resolve().name, split)
    named = FIELD in data["queries"].column_names
    rows = data["queries"].select_columns(["id", *([FIELD] if named else [])])
    excluded = {row["id"]: excluded_ids(row, f"{folder}: queries: row with _id {row['id']!r}") for row in rows}
    return with_revision(with_limits(task._replace(candidates=data["top_ranked"]), folder, split, excluded, excluded))


def collection_of(name: str, data: Mapping[str, Any]) -> Collection:
    """A split's data with texts as mteb gives them to an encoder; queries without judgements are left out."""
    texts = {row["id"]: _query_text(row) for row in data["queries"]}
    qrels = {query: dict(data["relevant_docs"][query]) for query in texts if data["relevant_docs"].get(query)}
    documents = {row["id"]: titled(row) for row in data["corpus"]}
    return Collection(name, documents, {query: texts[query] for query in qrels}, qrels)


def _query_text(row: Mapping[str, Any]) -> str:
    return f"{row['text']} {row['instruction']}" if row.get("instruction") else row["text"]


def check_columns(folder: Path, data: Mapping[str, Any]) -> None:
    for part in ("corpus", "queries"):
        lacks = [name for name in ("id", "text") if name not in data[part].column_names]
        if lacks:
            raise RecipeError(f"{one_line(folder)}: {part} lacks {' and '.join(lacks)}; give each row _id and text")


def check_rows(folder: Path, data: Mapping[str, Any]) -> None:
    """RecipeError for what has no score: rows without id or text, ids met before, judgements without a grade."""
    texts: dict[str, set[str]] = {}
    for part in ("corpus", "queries"):
        texts[part] = set()
        for row_id, text in zip(data[part]["id"], data[part]["text"], strict=True):
            at = one_line(f"{folder}: {part}: row with _id {row_id!r}", 400)
            if not isinstance(row_id, str) or not isinstance(text, str):
                raise RecipeError(f"{at}: write _id and text as strings; null and numbers are none")
            check_id(row_id, "_id", at)
            if row_id in texts[part]:
                raise RecipeError(f"{at}: an earlier row has this _id too; ids must differ")
            texts[part].add(row_id)
    relevant = False
    for query, grades in data["relevant_docs"].items():
        for document, grade in grades.items():
            if query is None or document is None or grade is None or abs(grade) > HIGHEST_GRADE:
                fix = "write query-id, corpus-id and a whole number of at most six digits"
                raise RecipeError(one_line(f"{folder}: judgement ({query}, {document}, {grade}): {fix}"))
            relevant |= grade > 0 and query in texts["queries"] and document in texts["corpus"]
    if not relevant:
        raise RecipeError(f"{one_line(folder)}: no relevant document of a query is in the corpus; their ids must agree")


def readable(name: str, path: str, read: Callable[[], Any], folder: Path | None = None) -> Any:
    """What the hub's clients raise without network, for gated, missing and malformed data, as one line.

    `folder` is where the data are read from, if not from the hub: the library finds what it once read of a folder by
    names and whole seconds, and would give the old data of a file that was written again; here they count by content.
    """
    cache = datasets.config.HF_DATASETS_CACHE
    try:
        if folder is not None:
            datasets.config.HF_DATASETS_CACHE = Path(cache) / "folders" / files_digest(folder)
        return read()
    except RecipeError:
        raise
    except Exception as error:  # the libraries raise a dozen unrelated types here
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RecipeError(one_line(f"suite {name}: {path} cannot be loaded ({reason}); give a folder")) from error
    finally:
        datasets.config.HF_DATASETS_CACHE = cache
