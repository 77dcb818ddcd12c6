"""Files of judgements, or of what a search found, in any usual layout: the judged passages of one query after another.

Called by the reader of graded rows; evaluation reads tsv alone (toolkit/data/beir.py).
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.data.beir import read_judgements
from toolkit.data.faults import RowFault, Skipped, leave_out
from toolkit.data.lines import decoded, numbered_lines, parsed
from toolkit.data.records import checked_text, kind_of
from toolkit.recipe.errors import RecipeError, one_line

LAYOUTS = (
    ".tsv (query-id, corpus-id, score below a header), .jsonl ({qid, docid: [...], score: [...]} a line) or TREC's "
    "(query Q0 passage rank score run, or query 0 passage grade)"
)
_TSV, _JSONL = (".tsv", ".tsv.gz"), (".jsonl", ".jsonl.gz")
_JUDGEMENTS, _RUN = _WIDTHS = (4, 6)  # fields of a line of TREC's layouts


class Judged(NamedTuple):
    """A query with its passages, as one place of a file has them."""

    query: str
    passages: list[str]  # ids, none twice
    grades: list[float]  # finite
    where: str


def read_judged(path: Path, skipped: Skipped | None = None) -> Iterator[Judged]:
    """The queries of a file of judgements, in its order: .tsv as in qrels/, .jsonl (both perhaps gzipped), or TREC's.

    Of .tsv all judgements are held; else one query at a time, whose lines stand together.

    Args:
        skipped: where malformed lines, queries that come again, and passages judged twice are counted; None: the first
            is an error.

    Raises:
        RecipeError: for such a line, and a file that cannot be read or holds no judgement.
    """
    if path.name.endswith(_TSV):
        for query, grades in read_judgements(path, skipped=skipped).items():
            yield Judged(query, list(grades), [float(grade) for grade in grades.values()], f"{path}: query {query}")
        return
    met: set[str] = set()
    for judged in _lists(path, skipped) if path.name.endswith(_JSONL) else _trec(path, skipped):
        if judged.query in met:
            problem = "has lines further above too; put the lines of a query together"
            leave_out(
                RowFault("of a query met before", f"{judged.where}: query {_short(judged.query)} {problem}"), skipped
            )
            continue
        met.add(judged.query)
        yield judged
    if not met:
        last = f"; the last fault: {skipped.last}" if skipped is not None and skipped.last else ""
        raise RecipeError(one_line(f"{path}: holds no judgement; known layouts: {LAYOUTS}{last}"))


def is_run(path: Path) -> bool:
    """Whether a file holds what a search found in TREC's layout, whose scores are no grades; by its first such line."""
    if path.name.endswith((*_TSV, *_JSONL)):
        return False
    return next((width for _, line in numbered_lines(path) if (width := len(line.split())) in _WIDTHS), 0) == _RUN


# --------------------------------------------------------------------------- a query a line


def _lists(path: Path, skipped: Skipped | None) -> Iterator[Judged]:
    for number, line in numbered_lines(path):
        where = f"{path}: line {number}"
        try:
            yield _list(parsed(line, where), where)
        except RowFault as fault:
            leave_out(fault, skipped)


def _list(row: Any, where: str) -> Judged:
    if not isinstance(row, dict) or not {"qid", "docid", "score"} <= row.keys():
        raise RowFault("no judgement", f'{where}: write {{"qid": "...", "docid": ["..."], "score": [0]}}')
    query, names, scores = id_of(row["qid"], "qid", where), row["docid"], row["score"]
    if not isinstance(names, list) or not isinstance(scores, list) or len(names) != len(scores) or not names:
        raise RowFault(
            "no judgement", f"{where}: docid and score are no lists of one length; give each docid its score"
        )
    passages = [id_of(name, "docid", where) for name in names]
    if len(set(passages)) < len(passages):
        twice = next(name for place, name in enumerate(passages) if name in passages[:place])
        raise RowFault("judged twice", f"{where}: docid {_short(twice)} stands there twice; keep one")
    return Judged(query, passages, [grade_of(score, "score", where) for score in scores], where)


def id_of(value: Any, name: str, where: str) -> str:
    """An id as text; RowFault for what is none."""
    if type(value) is str and value and value.isascii():  # nearly all, and there may be many millions
        return value
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        raise RowFault("without id", f"{where}: {name} holds {kind_of(value)}; write an id, as text")
    return checked_text(str(value), name, name, where)


def grade_of(value: Any, name: str, where: str) -> float:
    """A grade; RowFault for what is no finite number of the size of single precision."""
    if type(value) is int and -1_000_000 < value < 1_000_000:
        return float(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        grade = float(value) if is_number else math.nan
    except OverflowError:
        grade = math.inf
    if not abs(grade) < 1e30:
        raise RowFault("no grade", f"{where}: {name!r} holds {kind_of(value)}; write the grade as a finite number")
    return grade


# --------------------------------------------------------------------------- TREC's layouts


def _trec(path: Path, skipped: Skipped | None) -> Iterator[Judged]:
    """Runs of lines of one query."""
    judged: Judged | None = None
    met: set[str] = set()  # its passages
    width = _RUN if is_run(path) else _JUDGEMENTS
    for number, line in numbered_lines(path):
        where = f"{path}: line {number}"
        try:
            query, passage, grade = _trec_line(line, width, where)
            if judged is None or judged.query != query:
                if judged is not None:
                    yield judged
                judged, met = Judged(query, [], [], where), set()
            if passage in met:
                raise RowFault("judged twice", f"{where}: passage {_short(passage)} comes twice for a query; keep one")
        except RowFault as fault:
            leave_out(fault, skipped)
            continue
        met.add(passage)
        judged.passages.append(passage)
        judged.grades.append(grade)
    if judged is not None:
        yield judged


def _trec_line(line: bytes, width: int, where: str) -> tuple[str, str, float]:
    fields = decoded(line, where).split()
    if len(fields) not in _WIDTHS:
        fix = "write query Q0 passage rank score run, or query 0 passage grade"
        raise RowFault("no judgement", f"{where}: {len(fields)} fields; {fix}")
    if len(fields) != width:  # a score among grades, or the other way round
        problem = f"{len(fields)} fields, but {width} in the lines before"
        raise RowFault("no judgement", f"{where}: {problem}; keep what a search found and judgements in two files")
    number = fields[3 if width == _JUDGEMENTS else 4]
    try:
        grade = float(number)
    except ValueError:
        grade = math.nan
    if not abs(grade) < 1e30:
        raise RowFault("no grade", f"{where}: {_short(number)} stands where a finite number is needed; mend it")
    return checked_text(fields[0], "query", "query", where), fields[2], grade


def _short(name: str) -> str:
    return one_line(repr(name), 60)
