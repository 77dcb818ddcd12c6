"""Which documents a query may find in a folder: excluded.tsv, excluded_ids in queries.jsonl, candidates.tsv.

Called by eval.folders and, for folders in the hub's layout, by eval.hub_layout.
"""

import sys
from collections.abc import Container
from pathlib import Path
from typing import Any

from eval.tasks import Task
from toolkit.collectives import rank
from toolkit.data.beir import beir_rows
from toolkit.data.faults import RowFault
from toolkit.data.lines import decoded, numbered_lines
from toolkit.data.records import kind_of
from toolkit.recipe.errors import RecipeError, one_line

FIELD = "excluded_ids"  # BRIGHT's name of the column
NONE = "N/A"  # BRIGHT's word for none, in a list
HEADER = ["query-id", "corpus-id"]

Pairs = dict[str, list[str]]  # query id -> document ids


def excluded_ids(row: Any, at: str) -> list[str]:
    """The documents that a row of queries.jsonl excludes; RecipeError if the field is no list of ids."""
    ids = row.get(FIELD)
    if ids is None:
        return []
    if not isinstance(ids, list) or not all(isinstance(i, str | int) and not isinstance(i, bool) for i in ids):
        found = kind_of(next((i for i in ids if not isinstance(i, str)), ids) if isinstance(ids, list) else ids)
        raise RowFault("no list of ids", f"{at}: {FIELD} holds {found}; write a list of ids of documents")
    return [str(i) for i in ids if i != NONE]


def with_limits(task: Task, folder: Path, split: str | None, queries: Container[str], excluded: Pairs) -> Task:
    """A folder's collection with what its queries may find; as it is if the folder says nothing of that.

    Args:
        split: whose files are read, NAME/SPLIT.tsv; NAME.tsv is for all splits.
        queries: all ids there are, those without judgements too.
        excluded: of `excluded_ids`, which count beside the file's.

    Raises:
        RecipeError: for a malformed line or one of no query (file, line, fix), ids that are all unknown, a relevant
            document that is excluded. A warning says how many ids are unknown, and what cannot be found.
    """
    exclude, candidates = (_read(folder, name, split, queries) for name in ("excluded", "candidates"))
    for query, ids in excluded.items():
        if ids:
            exclude = exclude or {}
            exclude.setdefault(query, []).extend(ids)
    if candidates is not None and task.candidates is not None:
        raise RecipeError(f"{one_line(folder)}: holds candidates.tsv and configuration top_ranked; keep one of them")
    given, judged = task.candidates if candidates is None else candidates, task.collection.queries
    for name, pairs in (("excluded", exclude), ("candidate", candidates)):
        if pairs is not None:
            _check_known(folder, name, pairs, task)
    if exclude is not None:
        exclude = {query: list(dict.fromkeys(exclude[query])) for query in judged if exclude.get(query)}
        _check_relevant(folder, exclude, task)
    if given is not None:
        given = {query: list(dict.fromkeys(given.get(query, []))) for query in judged}
        _warn_of_candidates(folder, given, task)
    return task._replace(excluded=exclude or None, candidates=given)


def _read(folder: Path, name: str, split: str | None, queries: Container[str]) -> Pairs | None:
    """Query id -> documents of NAME.tsv or NAME/SPLIT.tsv; None if there is neither."""
    whole, parts = folder / f"{name}.tsv", folder / name
    if not parts.is_dir():
        return _pairs(whole, queries) if whole.exists() else None
    if whole.exists():
        raise RecipeError(
            f"{one_line(folder)}: holds {name}.tsv and {name}/; keep the file for all splits or those of each"
        )
    path = parts / f"{split}.tsv"
    if not path.exists():
        raise RecipeError(
            f"{one_line(path)}: is missing beside those of other splits; write it, the header alone for none"
        )
    return _pairs(path, queries)


def _pairs(path: Path, queries: Container[str]) -> Pairs:
    pairs: Pairs = {}
    number = 0
    for place, (number, line) in enumerate(numbered_lines(path)):
        at = f"{path}: line {number}"
        fields = decoded(line, at).rstrip("\r\n").split("\t")
        if place == 0:
            if fields != HEADER:
                raise RecipeError(one_line(f"{at}: the header is missing; the first line is query-id, corpus-id"))
            continue
        if len(fields) != 2 or not all(fields) or "\0" in line.decode():
            raise RecipeError(
                one_line(f"{at}: write query-id and corpus-id between tabs; found {'	'.join(fields)[:60]!r}")
            )
        if fields[0] not in queries:
            raise RecipeError(one_line(f"{at}: query {fields[0][:60]!r} is not in queries.jsonl; add it there"))
        pairs.setdefault(fields[0], []).append(fields[1])
    if not number:
        raise RecipeError(f"{one_line(path)}: is empty; write the header query-id, corpus-id, and a pair a line")
    return pairs


def _check_known(folder: Path, name: str, pairs: Pairs, task: Task) -> None:
    ids = {document for documents in pairs.values() for document in documents}
    unknown = sorted(ids - task.collection.documents.keys())
    if unknown and len(unknown) == len(ids):
        raise RecipeError(
            one_line(f"{folder}: no {name} document is in corpus.jsonl ({unknown[0]!r}); their ids must agree")
        )
    if unknown:
        _warn(f"{folder}: {len(unknown):,} of {len(ids):,} {name} documents are not in corpus.jsonl ({unknown[0]!r})")


def _check_relevant(folder: Path, exclude: Pairs, task: Task) -> None:
    for query, documents in exclude.items():
        for document in documents:
            if task.collection.qrels[query].get(document, 0) > 0:
                pair = f"document {document[:60]!r} is relevant for query {query[:60]!r} and excluded"
                raise RecipeError(one_line(f"{folder}: {pair}; take it out of the judgements or let it be found"))


def _warn_of_candidates(folder: Path, candidates: Pairs, task: Task) -> None:
    _, documents, queries, qrels = task.collection
    lacking = [query for query in queries if not candidates[query]]
    if len(lacking) == len(queries):
        raise RecipeError(f"{one_line(folder)}: no judged query has candidates; their ids must agree")
    if lacking:
        _warn(f"{folder}: {len(lacking):,} of {len(queries):,} queries have no candidates and score 0 ({lacking[0]!r})")
    hidden = 0
    for query, grades in qrels.items():
        own = set(candidates[query])
        hidden += sum(grade > 0 and document in documents and document not in own for document, grade in grades.items())
    if hidden:
        _warn(f"{folder}: {hidden:,} relevant documents are no candidates of their queries and cannot be found")


def _warn(problem: str) -> None:
    if rank() == 0:
        print(one_line(f"warning: {problem}", 400), file=sys.stderr, flush=True)


def warn_unused(folder: Path, task: str) -> None:
    """Say that a task of mteb's, read from a folder, takes no limits from it."""
    names = [
        name for name in ("excluded", "candidates") if (folder / f"{name}.tsv").exists() or (folder / name).is_dir()
    ]
    path = folder / "queries.jsonl"
    if path.is_file() and any(row.get(FIELD) not in (None, [], [NONE]) for _, row, _ in beir_rows(path)):
        names.append(FIELD)
    if names:
        _warn(f"{folder}: read as mteb's {task}, so {' and '.join(names)} do not count; name the folder alone")
