"""Sources of a recipe -> checked graded rows: a query with its passages of every grade, as the source gives them.

Called by prepare (training data) and by the look at first rows. A row that cannot be used is a RowFault with place and
fix, or is left out and counted.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.data.beir import read_beir_texts
from toolkit.data.faults import RowFault, Skipped, listed, some_usable
from toolkit.data.judged import grade_of, id_of, is_run, read_judged
from toolkit.data.pair_records import first_pairs, pair_files, read_pairs
from toolkit.data.records import NO_COLUMN, checked_text, kind_of, read_rows, usable_rows
from toolkit.data.stdlib_graded import related_code
from toolkit.recipe.errors import RecipeError, one_line
from toolkit.recipe.graded import FolderGraded, GradedSource, HubGraded, StdlibGraded
from toolkit.recipe.pairs import FolderPairs, HubPairs
from toolkit.recipe.sources import source_name

QUERY, PASSAGES, QUERY_ID = "query", "passages", "query_id"
COLUMNS = (QUERY, PASSAGES, QUERY_ID)


class Passage(NamedTuple):
    """A passage of a query."""

    id: str | None  # None: it is known by its text
    text: str  # with its title
    grade: float  # finite


class GradedRow(NamedTuple):
    """What one row of a source says of a query."""

    query_id: str | None
    query: str  # not empty
    passages: list[Passage]  # may be empty, if the source's filter leaves none
    where: str  # for errors


def read_graded(source: GradedSource, counts: Counter[str], skipped: Skipped | None = None) -> Iterator[GradedRow]:
    """Rows of one source, in order, with the passages that its filter lets through, its first ones, its constant grade.

    Adds to counts: "rows"; "empty" (rows left out for want of a query or of any passage); "blank" (passages without
    text); of a BEIR folder, whose corpus is held in memory, "missing" (judged queries and passages that it lacks),
    "unasked" and "unnamed" (its queries without judgements, its passages that no query names); "filtered" (passages of
    other grades); "cut" (passages after the first that are taken); "unrelated" (docstrings of the embedded corpus
    without code near theirs).

    Args:
        skipped: where rows that cannot be used are counted; None: the first is an error.

    Raises:
        RecipeError: for a malformed row (where, what, fix), unknown columns, files that are missing or cannot be read
            on, no access to the hub, and a source whose rows are all faulty.
    """
    rows = _rows(source, counts, skipped)
    if not isinstance(source, StdlibGraded):
        rows = some_usable(rows, source_name(source), skipped)
    return (row._replace(passages=selected(row.passages, source, counts)) for row in rows)


def first_graded(source: HubGraded | FolderGraded, most: int, skipped: Skipped | None) -> Iterator[GradedRow]:
    """Rows among the first `most` of each file, not of format beir; raises as `read_graded`."""
    counts: Counter[str] = Counter()
    rows = (
        _pair_rows(source, counts, skipped, most)
        if source.format == "pairs"
        else _columns(source, counts, skipped, most)
    )
    return (row._replace(passages=selected(row.passages, source, counts)) for row in rows)


def _rows(source: GradedSource, counts: Counter[str], skipped: Skipped | None) -> Iterator[GradedRow]:
    if isinstance(source, StdlibGraded):
        return _stdlib(counts)
    if source.format == "pairs":
        return _pair_rows(source, counts, skipped)
    if source.format == "beir":
        return _beir(source, counts, skipped)
    return _columns(source, counts, skipped)


def selected(passages: list[Passage], source: GradedSource, counts: Counter[str]) -> list[Passage]:
    """The filter first, then the first so many, the constant last; what is drawn at random is drawn by the batch."""
    low, high = source.at_least, source.below
    kept = passages if low is None else [passage for passage in passages if passage.grade >= low]
    kept = kept if high is None else [passage for passage in kept if passage.grade < high]
    counts["filtered"] += len(passages) - len(kept)
    if source.pick is not None and source.pick.first is not None:
        counts["cut"] += max(0, len(kept) - source.pick.first)
        kept = kept[: source.pick.first]
    grade = source.grade
    return kept if grade is None else [Passage(name, text, grade) for name, text, _ in kept]


# --------------------------------------------------------------------------- rows of files and of the hub


def _columns(
    source: HubGraded | FolderGraded, counts: Counter[str], skipped: Skipped | None, most: int | None = None
) -> Iterator[GradedRow]:
    rows = read_rows(source, graded_columns, counts, skipped, most)
    yield from usable_rows(rows, lambda row, where: _record(row, counts, where), counts, skipped)


def graded_columns(found: list[str], where: str) -> list[str]:
    """The columns that are read; RowFault if one that every row needs is not among those found."""
    for name in (QUERY, PASSAGES):
        if name not in found:
            beir = '; for a folder in BEIR layout set format to "beir"' if "_id" in found else ""
            line = f"{where}: no column {name!r} among {listed(found)}; a row is {_WRITTEN}{beir}"
            raise RowFault(NO_COLUMN, line)
    return [name for name in COLUMNS if name in found]


_WRITTEN = '{"query": "...", "passages": [{"text": "...", "grade": 3}]}'


def _record(row: Any, counts: Counter[str], where: str) -> GradedRow | None:
    if not isinstance(row, dict):
        raise RowFault("no object", f"{where}: a JSON object is needed, found {kind_of(row)}; a row is {_WRITTEN}")
    graded_columns(list(row), where)
    query, passages = _text(row[QUERY], QUERY, where), row[PASSAGES]
    query_id = None if row.get(QUERY_ID) is None else id_of(row[QUERY_ID], QUERY_ID, where)
    if not isinstance(passages, list):
        fix = 'write a list of {"text": "...", "grade": 3}'
        raise RowFault("no passages", f"{where}: {PASSAGES!r} holds {kind_of(passages)}; {fix}")
    found = [_passage(passage, f"{where}, passage {number}") for number, passage in enumerate(passages, start=1)]
    kept = [passage for passage in found if passage.text]
    counts["blank"] += len(found) - len(kept)
    return GradedRow(query_id, query, kept, where) if query and kept else None


def _passage(value: Any, where: str) -> Passage:
    if not isinstance(value, dict):
        fix = 'write {"text": "...", "grade": 3}'
        raise RowFault("no passages", f"{where}: an object is needed, found {kind_of(value)}; {fix}")
    for name in ("text", "grade"):
        if name not in value:
            raise RowFault(NO_COLUMN, f"{where}: no {name!r} among {listed(value)}; add it")
    text, title = _text(value["text"], "text", where), _text(value.get("title"), "title", where)
    name = None if value.get("id") is None else id_of(value["id"], "id", where)
    return Passage(name, f"{title} {text}".strip() if text else "", grade_of(value["grade"], "grade", where))


def _text(value: Any, name: str, where: str) -> str:
    """A string without white space around it, null as the empty text; RowFault for any other value."""
    if value is not None and not isinstance(value, str):
        raise RowFault("not text", f"{where}: {name!r} holds {kind_of(value)}; write text")
    return checked_text(value, name, name, where).strip()


# --------------------------------------------------------------------------- other formats


def _pair_rows(
    source: HubGraded | FolderGraded, counts: Counter[str], skipped: Skipped | None, most: int | None = None
) -> Iterator[GradedRow]:
    """Positives as passages of grade 1, then negatives of grade 0."""
    pairs = as_pairs(source)
    records = read_pairs(pairs, counts, skipped) if most is None else first_pairs(pairs, most, skipped)
    for number, record in enumerate(records, start=1):
        passages = [Passage(None, text.strip(), 1.0) for text in record.positives]
        passages += [Passage(None, text.strip(), 0.0) for text in record.negatives]
        yield GradedRow(None, record.query.strip(), passages, f"{source_name(source)}: pair {number}")


def as_pairs(source: HubGraded | FolderGraded) -> HubPairs | FolderPairs:
    """The same rows as a source of pairs."""
    if isinstance(source, HubGraded):
        return HubPairs(hub=source.hub, config=source.config, split=source.split, fields=source.fields)  # pyright: ignore[reportCallIssue]
    return FolderPairs(folder=source.folder, config=source.config, split=source.split, fields=source.fields)  # pyright: ignore[reportCallIssue]


def check_run(source: FolderGraded, judgements: Path) -> None:
    """RecipeError where what a search found is read without a grade for it."""
    if source.grade is None and is_run(judgements):
        line = (
            f"data.sources: {judgements} is a run, whose scores are no grades; set the source's grade to that of them"
        )
        raise RecipeError(one_line(line))


def _beir(source: FolderGraded | HubGraded, counts: Counter[str], skipped: Skipped | None) -> Iterator[GradedRow]:
    assert isinstance(source, FolderGraded)
    corpus, asked, judgements = pair_files(source)
    check_run(source, judgements)
    documents, queries = read_beir_texts(corpus, skipped), read_beir_texts(asked, skipped)
    some, named = False, set[str]()
    unasked = set(queries)
    for judged in read_judged(judgements, skipped):
        counts["rows"] += 1
        unasked.discard(judged.query)
        named.update(judged.passages)
        counts["missing"] += judged.query not in queries
        text = queries.get(judged.query)
        if text is None:
            continue
        there = [(name, grade) for name, grade in zip(judged.passages, judged.grades, strict=True) if name in documents]
        passages = [Passage(name, documents[name], grade) for name, grade in there if documents[name]]
        counts["missing"] += len(judged.passages) - len(there)
        counts["blank"] += len(there) - len(passages)
        if text and passages:
            some = True
            yield GradedRow(judged.query, text, passages, judged.where)
        else:
            counts["empty"] += 1
    counts["unasked"] += len(unasked)
    counts["unnamed"] += sum(name not in named for name in documents)
    if not some:
        line = f"{judgements}: no query of queries.jsonl has a judged passage in corpus.jsonl; their ids must agree"
        raise RecipeError(one_line(line))


def _stdlib(counts: Counter[str]) -> Iterator[GradedRow]:
    rows, left_out = related_code()
    counts["rows"] += len(rows) + left_out
    counts["unrelated"] += left_out
    for row in rows:
        passages = [Passage(name, code, grade) for name, code, grade in row.codes]
        yield GradedRow(row.query_id, row.query, passages, f"stdlib: {row.query_id}")
