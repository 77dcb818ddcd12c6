"""Queries for which passages are written: rows of a file, a folder in BEIR layout, pairs, or the embedded corpus.

Called by the command that writes passages.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from toolkit.data.beir import check_id, read_beir_texts, read_judgements
from toolkit.data.faults import RowFault, listed
from toolkit.data.records import check_encodable, kind_of, read_rows
from toolkit.data.stdlib_corpus import collection
from toolkit.determinism import generator
from toolkit.files import expanded
from toolkit.recipe.errors import RecipeError, of_flag, one_line
from toolkit.recipe.sources import FolderSource

TEXT_COLUMNS = ("query", "anchor", "text")  # the first that a row has
ID_COLUMNS = ("query_id", "_id", "id")
STDLIB = "stdlib"
_ID_DIGITS = 16  # hex digits of the digest of a text that stands for an id


class Query(NamedTuple):
    id: str
    text: str


class Queries(NamedTuple):
    """The queries to write for, in the order of their source."""

    chosen: list[Query]
    total: int  # different queries of the source
    repeated: int  # rows with the text of an earlier row
    empty: int  # rows without text
    digest: str  # 16 hex digits of all queries of the source, those that are not chosen too


def read_queries(what: str, split: str | None, limit: int | None, seed: int) -> Queries:
    """The queries of a source, each once.

    Args:
        what: a file or folder of rows with `query` (or `anchor`, `text`) and perhaps `query_id` (or `_id`, `id`), a
            folder in BEIR layout, or "stdlib" for the training docstrings of the embedded corpus. A query without an
            id is named by a digest of its text.
        split: of a folder in BEIR layout the queries that qrels/<split>.tsv judges (None: train); else which files.
        limit: so many of them, drawn by the seed; a larger limit holds a smaller one. None: all.

    Raises:
        RecipeError: for a malformed row (file, line, fix), no query at all, or a limit above their number.
    """
    counts: Counter[str] = Counter()
    if what == STDLIB:
        if split is not None:
            raise RecipeError("--split: stdlib has none here, its training docstrings are the queries; leave it out")
        rows: Iterator[tuple[str, str, Any]] = (("stdlib", text, name) for name, text in _docstrings())
    elif _is_beir(expanded(what)):
        rows = _beir_rows(expanded(what), split or "train")
    else:
        rows = _rows(what, split)
    with of_flag("--queries"):
        found = list(_unlike(rows, counts))
    if not found:
        raise RecipeError(f"{one_line(what)}: holds no query; name rows with a query each")
    if limit is not None and limit > len(found):
        raise RecipeError(
            f"--limit: {limit} queries are more than the source's {len(found)}; lower it, or leave it out"
        )
    digest = hashlib.sha256()
    for query in found:
        digest.update(repr(tuple(query)).encode())
    chosen = found if limit is None else _drawn(found, limit, seed)
    return Queries(chosen, len(found), counts["repeated"], counts["empty"], digest.hexdigest()[:16])


def _drawn(found: list[Query], limit: int, seed: int) -> list[Query]:
    """The first so many of a permutation, as for a limited source of a recipe, in the order of the source."""
    places = generator("limit", seed, 0).permutation(len(found))[:limit]
    return [found[place] for place in np.sort(places).tolist()]


def _unlike(rows: Iterator[tuple[str, str, Any]], counts: Counter[str]) -> Iterator[Query]:
    """The different queries of (where, text, id or None)."""
    texts: set[str] = set()
    ids: set[str] = set()
    for where, text, given in rows:
        check_encodable(text, "the query", where)
        text = text.strip()
        if not text:
            counts["empty"] += 1
            continue
        if text in texts:
            counts["repeated"] += 1
            continue
        name = hashlib.sha256(text.encode()).hexdigest()[:_ID_DIGITS] if given is None else _checked_id(given, where)
        if name in ids:
            line = (
                f"{where}: id {one_line(repr(name), 60)} stands in an earlier row with another query; ids must differ"
            )
            raise RowFault("of an id met before", line)
        texts.add(text)
        ids.add(name)
        yield Query(name, text)


def _checked_id(given: Any, where: str) -> str:
    if not isinstance(given, str | int) or isinstance(given, bool) or given == "":
        raise RowFault("without id", f"{where}: the id of the query holds {kind_of(given)}; write a text, or no id")
    check_id(str(given), "the id of the query", where)
    return str(given)


def _docstrings() -> list[tuple[str, str]]:
    return list(collection("train").queries.items())


def _is_beir(path: Path) -> bool:
    return (path / "queries.jsonl").is_file() and (path / "qrels").is_dir()


def _beir_rows(folder: Path, split: str) -> Iterator[tuple[str, str, Any]]:
    splits = sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))
    if split not in splits:
        fix = f"set --split to {listed(splits)}, or name the file queries.jsonl for all queries"
        raise RecipeError(one_line(f"{folder}: has no qrels/{split}.tsv; {fix}"))
    path = folder / "queries.jsonl"
    queries = read_beir_texts(path)
    judged = read_judgements(folder / "qrels" / f"{split}.tsv", queries)
    for name, text in queries.items():
        if name in judged:
            yield f"{path}: query {one_line(repr(name), 60)}", text, name


def _rows(what: str, split: str | None) -> Iterator[tuple[str, str, Any]]:
    path = expanded(what)
    if not path.exists():
        fix = "name a file of queries, a folder in BEIR layout, or stdlib"
        raise RecipeError(f"--queries {one_line(what)}: no such file or folder; {fix}")
    source = FolderSource.model_validate({"folder": what, "split": split})
    if not path.is_file() and (path / "queries.jsonl").is_file():  # the corpus beside it is no source of queries
        source = source.model_copy(update={"folder": str(path / "queries.jsonl")})

    def columns(found: list[str], where: str) -> list[str]:
        text, name = _layout(found, where)
        return [text] if name is None else [text, name]

    for where, row in read_rows(source, columns, Counter(), None):
        if not isinstance(row, dict):
            line = f'{where}: a JSON object is needed, found {kind_of(row)}; write {{"query": ...}} on each line'
            raise RowFault("no object", line)
        text_column, id_column = _layout(list(row), where)
        text = row[text_column]
        if text is not None and not isinstance(text, str):
            line = f"{where}: {text_column!r} holds {kind_of(text)}, text is needed; write a string"
            raise RowFault("not text", line)
        yield where, text or "", None if id_column is None else row[id_column]


def _layout(found: list[str], where: str) -> tuple[str, str | None]:
    """The columns of the query and of its id; RowFault for a row that has no query."""
    text = next((name for name in TEXT_COLUMNS if name in found), None)
    if text is None:
        line = f"{where}: no column {', '.join(TEXT_COLUMNS)}, but {listed(found)}; write the query as query"
        raise RowFault("without a column", line)
    return text, next((name for name in ID_COLUMNS if name in found), None)
