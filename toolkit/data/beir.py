"""A folder in BEIR layout: corpus.jsonl, queries.jsonl and qrels/<split>.tsv (Thakur et al. 2021, arXiv 2104.08663).

Called by the readers of training pairs and by evaluation.
"""

import json
import re
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from toolkit.data.records import check_encodable
from toolkit.recipe import RecipeError


def beir_splits(folder: Path) -> list[str]:
    """Names of a folder's splits, sorted; RecipeError if a part of the layout is missing."""
    for part in ("corpus.jsonl", "queries.jsonl", "qrels"):
        if not (folder / part).exists():
            raise RecipeError(
                f"{folder}: {part} is missing; a BEIR folder has corpus.jsonl, queries.jsonl and qrels/*.tsv"
            )
    return sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))


def read_beir_texts(path: Path) -> dict[str, str]:
    """Id -> text of a corpus or of queries, with the title before it where there is one (title + " " + text, as mteb).

    Raises:
        RecipeError: as `beir_rows`.
    """
    return {row_id: titled(row) for row_id, row, _ in beir_rows(path)}


def titled(row: Mapping[str, Any]) -> str:
    """A document's text with its title before it where there is one."""
    return f"{row.get('title') or ''} {row['text']}".strip()


def beir_rows(path: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(id, row with text and perhaps title, "file: line N") of each line of a corpus or of queries.

    Raises:
        RecipeError: for a malformed line or an id met before (file, line, fix) and for an empty file.
    """
    met: set[str] = set()
    for number, line in _lines(path):
        at = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # numbers too long and lists too deep among them
            raise RecipeError(f"{at}: not valid JSON ({error}); write one object a line") from None
        if not isinstance(row, dict) or "_id" not in row or not isinstance(row.get("text"), str):
            raise RecipeError(f'{at}: write {{"_id": ..., "text": "..."}}, and "title" if there is one')
        title = row.get("title") or ""
        if not isinstance(title, str):
            raise RecipeError(f"{at}: title is no text; write a string or leave it out")
        row_id = str(row["_id"])
        if row_id in met:
            raise RecipeError(f"{at}: _id {row_id!r} stands in an earlier line too; ids must differ")
        met.add(row_id)
        check_encodable(f"{title} {row['text']}", "text", at)
        yield row_id, row, at
    if not met:
        raise RecipeError(f"{path}: is empty; write one JSON object a line")


def read_judgements(path: Path, queries: Container[str] | None = None) -> dict[str, dict[str, int]]:
    """Query id -> document id -> grade, from query-id, corpus-id and score between tabs, below a header.

    Raises:
        RecipeError: for a malformed line or, where `queries` are given, one of another query; for no judgement at all.
    """
    qrels: dict[str, dict[str, int]] = {}
    for number, line in _lines(path):
        fields = line.split("\t")
        is_judgement = len(fields) == 3 and re.fullmatch(r"\s*-?\d{1,18}\s*", fields[2]) is not None
        if number == 1:
            if is_judgement:
                raise RecipeError(
                    f"{path}: line 1: the header is missing; the first line is query-id, corpus-id, score"
                )
            continue
        if not is_judgement:
            raise RecipeError(
                f"{path}: line {number}: write query-id, corpus-id and a whole number between tabs; found {line!r:.60}"
            )
        query, document, grade = fields
        if queries is not None and query not in queries:
            raise RecipeError(f"{path}: line {number}: query {query!r} is not in queries.jsonl; add it there")
        qrels.setdefault(query, {})[document] = int(grade)
    if not qrels:
        raise RecipeError(f"{path}: holds no judgement")
    return qrels


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line number from 1 and text of each line that is not blank."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
