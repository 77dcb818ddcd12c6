"""A folder in BEIR layout: corpus.jsonl, queries.jsonl and qrels/<split>.tsv (Thakur et al. 2021, arXiv 2104.08663).

Called by the readers of training pairs and by evaluation, which leaves out no row.
"""

import re
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from toolkit.data.faults import RowFault, Skipped, leave_out, some_usable
from toolkit.data.lines import decoded, numbered_lines, parsed
from toolkit.data.records import check_encodable, kind_of
from toolkit.recipe.errors import RecipeError, one_line

HIGHEST_GRADE = 999_999  # trec_eval takes memory for every grade up to the highest, and reads one of 2^31 as another
_UNNAMEABLE = re.compile(r"[\0\t\r\n]")  # ends an id in a file of judgements, or in trec_eval


def beir_splits(folder: Path) -> list[str]:
    """Names of a folder's splits, sorted; RecipeError if a part of the layout is missing."""
    check_parts(folder, ("corpus.jsonl", "queries.jsonl", "qrels"))
    return sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))


def check_parts(folder: Path, parts: tuple[str, ...]) -> None:
    """RecipeError if a part of the layout is missing from a folder."""
    for part in parts:
        if (packed := folder / f"{part}.gz").exists() and not (folder / part).exists():
            raise RecipeError(f"{one_line(packed)}: is not read in a BEIR folder; unpack it (gunzip)")
        if not (folder / part).exists():
            raise RecipeError(
                f"{one_line(folder)}: {part} is missing; a BEIR folder has corpus.jsonl, queries.jsonl and qrels/*.tsv"
            )


def read_beir_texts(path: Path, skipped: Skipped | None = None) -> dict[str, str]:
    """Id -> text of a corpus or of queries, with the title before it where there is one (title + " " + text, as mteb).

    Raises:
        RecipeError: as `beir_rows`.
    """
    return {row_id: titled(row) for row_id, row, _ in beir_rows(path, skipped)}


def titled(row: Mapping[str, Any]) -> str:
    """A document's text with its title before it where there is one."""
    return f"{row.get('title') or ''} {row['text']}".strip()


def beir_rows(path: Path, skipped: Skipped | None = None) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(id, row with text and perhaps title, "file: line N") of each line of a corpus or of queries.

    Args:
        skipped: where malformed lines, and those with an id met before, are counted; None: the first is an error.

    Raises:
        RecipeError: for a malformed line or an id met before (file, line, fix), a file that is empty or cannot be read.
    """
    return some_usable(_rows(path, skipped), one_line(path), skipped)


def _rows(path: Path, skipped: Skipped | None) -> Iterator[tuple[str, dict[str, Any], str]]:
    met: set[str] = set()
    number = 0
    for number, line in numbered_lines(path):
        at = f"{path}: line {number}"
        try:
            row = parsed(line, at)
            row_id = _checked(row, at)
            if row_id in met:
                line_of = f"{at}: _id {one_line(repr(row_id), 60)} stands in an earlier line too; ids must differ"
                raise RowFault("of an id met before", line_of)
        except RowFault as fault:
            leave_out(fault, skipped)
            continue
        met.add(row_id)
        yield row_id, row, at
    if not number:
        raise RecipeError(f"{one_line(path)}: is empty; write one JSON object a line")


def _checked(row: Any, at: str) -> str:
    """The id of a row; RowFault for one without id or text, or whose id or text no other file can hold."""
    if not isinstance(row, dict) or "_id" not in row or not isinstance(row.get("text"), str):
        raise RowFault("without id or text", f'{at}: write {{"_id": ..., "text": "..."}}, and "title" if there is one')
    title, row_id = row.get("title") or "", row["_id"]
    if not isinstance(title, str):
        raise RowFault("not text", f"{at}: title is no text; write a string or leave it out")
    if not isinstance(row_id, str | int) or isinstance(row_id, bool):
        raise RowFault("without id or text", f"{at}: _id holds {kind_of(row_id)}; write a string")
    check_encodable(f"{title} {row['text']}", "text", at)
    check_id(str(row_id), "_id", at)
    return str(row_id)


def check_id(value: str, name: str, at: str) -> None:
    """RowFault for an id that is not Unicode, or that no file of judgements can hold."""
    check_encodable(value, name, at)
    if _UNNAMEABLE.search(value):
        raise RowFault(
            "of an unusable id", f"{at}: {name} {one_line(repr(value), 60)} holds a tab, a line end or NUL; rename it"
        )


def read_judgements(
    path: Path, queries: Container[str] | None = None, skipped: Skipped | None = None
) -> dict[str, dict[str, int]]:
    """Query id -> document id -> grade, from query-id, corpus-id and score between tabs, below a header.

    Args:
        queries: those that there are; None: any.
        skipped: where malformed lines, and those that contradict an earlier one, are counted; None: the first is an
            error.

    Raises:
        RecipeError: for a malformed line or, where `queries` are given, one of another query; for no header, no
            judgement at all, or a file that cannot be read.
    """
    qrels: dict[str, dict[str, int]] = {}
    for place, (number, line) in enumerate(numbered_lines(path)):
        at = f"{path}: line {number}"
        try:
            text = decoded(line, at).rstrip("\r\n")
            if place > 0:
                _add(qrels, text, queries, at)
            elif _judgement(text) is not None:
                raise RecipeError(
                    one_line(f"{at}: the header is missing; the first line is query-id, corpus-id, score")
                )
        except RowFault as fault:
            leave_out(fault, skipped)
    if not qrels:
        raise RecipeError(f"{one_line(path)}: holds no judgement")
    return qrels


def _add(qrels: dict[str, dict[str, int]], line: str, queries: Container[str] | None, at: str) -> None:
    judgement = _judgement(line)
    if judgement is None:
        fix = "write query-id, corpus-id and a whole number (at most six digits) between tabs"
        raise RowFault("no judgement", f"{at}: {fix}; found {one_line(repr(line), 60)}")
    query, document, grade = judgement
    if queries is not None and query not in queries:
        raise RowFault("of no query", f"{at}: query {one_line(repr(query), 60)} is not in queries.jsonl; add it there")
    known = qrels.setdefault(query, {}).setdefault(document, grade)
    if known != grade:
        pair = f"query {one_line(repr(query), 60)} and document {one_line(repr(document), 60)}"
        raise RowFault("judged otherwise before", f"{at}: {pair} have grade {known} in an earlier line; keep one")


def _judgement(line: str) -> tuple[str, str, int] | None:
    """(query id, document id, grade) of a line, None if it holds none."""
    fields = line.split("\t")
    if len(fields) != 3 or "\0" in line or re.fullmatch(r"\s*-?\d{1,6}\s*", fields[2]) is None:
        return None
    return fields[0], fields[1], int(fields[2])
