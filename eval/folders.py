"""Collections in local folders: BEIR layout, the hub's layout, open question answering; and cutting them to a few.

Called by eval.suites.
"""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from eval.limits import Pairs, excluded_ids, with_limits
from eval.local_tasks import choose_split, content_digest, local_task, with_revision
from eval.tasks import Task
from toolkit.data.beir import beir_rows, beir_splits, read_beir_texts, read_judgements, titled
from toolkit.data.records import Collection, check_encodable
from toolkit.data.source_files import is_hub_layout
from toolkit.files import expanded
from toolkit.recipe.errors import RecipeError, one_line

QUICK_DOCUMENTS = 2_000
QUICK_SEED = 0  # one cut for all: scores of different runs can be compared


def is_folder(name: str) -> bool:
    """Whether a suite's name is a folder, with or without a split."""
    folder, colon, _ = name.rpartition(":")
    return os.path.isdir(expanded(name)) or bool(colon and folder and os.path.isdir(expanded(folder)))


def load_folder(name: str) -> Task:
    """The collection of FOLDER or FOLDER:split, in whichever layout.

    Raises:
        RecipeError: for an unknown split or a malformed file (with file and line).
    """
    folder, wanted = folder_and_split(name)
    if is_hub_layout(folder):
        return _load_hub_layout(folder, wanted)
    return _load_answers(folder) if not (folder / "qrels").exists() and wanted is None else _load_beir(folder, wanted)


def folder_and_split(name: str) -> tuple[Path, str | None]:
    """The folder of FOLDER or FOLDER:split, and the split if there is one."""
    path, colon, split = name.rpartition(":")
    folder, wanted = (name, None) if os.path.isdir(expanded(name)) or not colon else (path, split)
    return expanded(folder), wanted


# --------------------------------------------------------------------------- layouts


def _load_beir(folder: Path, wanted: str | None) -> Task:
    split = choose_split(folder, beir_splits(folder), wanted)
    documents = read_beir_texts(folder / "corpus.jsonl")
    queries: dict[str, str] = {}
    excluded: Pairs = {}
    for query, row, at in beir_rows(folder / "queries.jsonl"):
        queries[query], excluded[query] = titled(row), excluded_ids(row, at)
    path = folder / "qrels" / f"{split}.tsv"
    qrels = read_judgements(path, queries)
    if not any(grade > 0 and did in documents for grades in qrels.values() for did, grade in grades.items()):
        raise RecipeError(f"{one_line(path)}: no judged document is in corpus.jsonl; their ids must agree")
    name = folder.resolve().name
    task = local_task(Collection(f"{name}:{split}", documents, queries, qrels), name, split)
    return with_revision(with_limits(task, folder, split, queries, excluded))


def _load_answers(folder: Path) -> Task:
    """Questions with `answers` instead of judgements; every question counts."""
    if not (folder / "queries.jsonl").exists() or not (folder / "corpus.jsonl").exists():
        beir_splits(folder)  # says what is missing
    queries: dict[str, str] = {}
    answers: dict[str, list[str]] = {}
    excluded: Pairs = {}
    for query, row, at in beir_rows(folder / "queries.jsonl"):
        queries[query], answers[query] = row["text"].strip(), row.get("answers") or []
        if not isinstance(row.get("answers", []), list) or not all(isinstance(a, str) for a in answers[query]):
            raise RecipeError(f"{at}: answers is no list of texts; write a list")
        for answer in answers[query]:
            check_encodable(answer, "answers", at)
        excluded[query] = excluded_ids(row, at)
    if not any(answers.values()):
        beir_splits(folder)  # neither judgements nor answers
    missing = next((query for query, wanted in answers.items() if not wanted), None)
    if missing is not None:
        question = one_line(f"{folder}/queries.jsonl: question {missing!r}")
        raise RecipeError(f"{question} has no answers; give it some or take it out")
    documents, starts = {}, []
    for document, row, _ in beir_rows(folder / "corpus.jsonl"):
        documents[document] = titled(row)
        starts.append(len(documents[document]) - len(row["text"].strip()))
    name = folder.resolve().name
    collection = Collection(name, documents, queries, {query: {} for query in queries})
    task = local_task(collection, name, "answers")._replace(
        revision=content_digest(collection, {"answers": answers}),
        main_score="accuracy_at_20",
        answers=answers,
        body_starts=np.array(starts),
    )
    return with_revision(with_limits(task, folder, None, queries, excluded))


def _load_hub_layout(folder: Path, wanted: str | None) -> Task:
    from eval.hub_layout import hub_splits, read_hub_layout  # imports mteb, which takes seconds

    split = choose_split(folder, hub_splits(folder), wanted)
    name = folder.resolve().name
    return read_hub_layout(folder, f"{name}:{split}", split)


# --------------------------------------------------------------------------- a few of them


def shrink(task: Task, limit: int = QUICK_DOCUMENTS) -> Task:
    """At most `limit` documents: the relevant ones of all queries, or of as many as fit, and others, drawn by seed.

    With answers instead of judgements nothing says which are relevant: the documents are drawn.
    """
    name, documents, queries, qrels = task.collection
    kept: set[str] = set()
    judged: list[str] = []
    for query in _drawn(list(queries)):
        relevant = {d for d, grade in qrels[query].items() if grade > 0 and d in documents}
        if len(kept | relevant) <= limit:
            kept |= relevant
            judged.append(query)
    if not kept and task.answers is None:
        raise RecipeError(f"quick:{name}: a query has more than {limit:,} relevant documents; name the whole folder")
    rest = (document for document in _drawn(list(documents)) if document not in kept)
    kept |= {document for document, _ in zip(rest, range(limit - len(kept)), strict=False)}
    inside = set(judged)
    cut = Collection(
        f"quick:{name}",
        {document: text for document, text in documents.items() if document in kept},
        {query: text for query, text in queries.items() if query in inside},
        {query: grades for query, grades in qrels.items() if query in inside},
    )
    small = task._replace(
        collection=cut,
        task_name=f"quick_{task.task_name}",
        revision=content_digest(cut, {"answers": task.answers or {}}),
        body_starts=None
        if task.body_starts is None
        else task.body_starts[[document in kept for document in documents]],
        answers=None if task.answers is None else {query: task.answers[query] for query in cut.queries},
        candidates=None
        if task.candidates is None
        else {query: [d for d in task.candidates[query] if d in kept] for query in cut.queries},
        excluded=None
        if task.excluded is None
        else {query: [d for d in task.excluded.get(query, []) if d in kept] for query in cut.queries},
    )
    return with_revision(small)


def _drawn(ids: list[str]) -> Iterator[str]:
    """Ids in an order that depends on nothing but the ids."""
    ids = sorted(ids)
    random.Random(QUICK_SEED).shuffle(ids)
    yield from ids
