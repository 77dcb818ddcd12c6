"""What the first rows of a source of graded rows show before anything is trained: columns, grades, whole rows.

Called by the methods that learn from grades, for the launcher's look ahead and the dry run.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

from toolkit.data.faults import Skipped, listed, skipping
from toolkit.data.first_look import FIRST, Look, columns_line, look_at_pairs, name_with_files, texts_among
from toolkit.data.graded_records import (
    COLUMNS,
    PASSAGES,
    GradedRow,
    Passage,
    as_pairs,
    check_run,
    first_graded,
    graded_columns,
    selected,
)
from toolkit.data.judged import read_judged
from toolkit.data.pair_records import pair_files
from toolkit.data.records import read_rows
from toolkit.recipe.errors import one_line
from toolkit.recipe.graded import FolderGraded, GradedData, GradedSource, HubGraded, StdlibGraded
from toolkit.recipe.pairs import PairsData
from toolkit.recipe.sources import source_name

_OF_A_PASSAGE = ("id", "text", "title", "grade")


def look_at_graded(source: GradedSource, data: GradedData) -> Look:
    """The first rows of a source of graded rows, read as training reads them.

    Raises:
        RecipeError: as `read_graded`, for what the first rows show.
        Unreachable: where the hub cannot be reached.
    """
    if isinstance(source, StdlibGraded):
        return Look(source_name(source), "", [], [], [], [], None)
    if isinstance(source, FolderGraded) and source.format == "beir":
        return _look_at_beir(source, data)
    rows = list(first_graded(source, FIRST, skipping(data.faulty_rows)))
    if source.format == "pairs":
        pairs = PairsData(sources=[as_pairs(source)], negatives=1, faulty_rows=data.faulty_rows)  # pyright: ignore[reportCallIssue]
        seen = look_at_pairs(pairs.sources[0], pairs)
        return seen._replace(line=f"pairs of {_grades(rows)} in {seen.line}", pairs=[], graded=rows)
    name, (found, below) = name_with_files(source), _keys(source, skipping(data.faulty_rows))
    used = {column: column for column in COLUMNS if column in found}
    unused = [column for column in found if column not in COLUMNS]
    unused += [f"{PASSAGES}.{key}" for key in below if key not in _OF_A_PASSAGE]
    line = columns_line(name, used | {"grades": _grades(rows).removeprefix("grades ")}, unused)
    return Look(name, line, found, unused, [], [], None, rows)


def _keys(source: HubGraded | FolderGraded, skipped: Skipped | None) -> tuple[list[str], list[str]]:
    """(Columns of the first rows, keys of their passages), those of no use too."""
    columns: dict[str, None] = {}
    below: dict[str, None] = {}
    for _, row in read_rows(
        source, lambda found, where: graded_columns(found, where) and found, Counter(), skipped, FIRST
    ):
        if isinstance(row, dict):
            columns |= dict.fromkeys(map(str, row))
            passages = row.get(PASSAGES)
            for passage in passages if isinstance(passages, list) else []:
                below |= dict.fromkeys(map(str, passage)) if isinstance(passage, dict) else {}
    return list(columns), list(below)


def _grades(rows: Iterable[GradedRow]) -> str:
    """The grades that rows have, e.g. "grades 3, 2, 1, 0"."""
    grades = sorted({passage.grade for row in rows for passage in row.passages}, reverse=True)
    return f"grades {listed(f'{grade:g}' for grade in grades)}"


def _look_at_beir(source: FolderGraded, data: GradedData) -> Look:
    """The first judged queries, and as many of their passages as the first rows of the corpus hold."""
    corpus, asked, judgements = pair_files(source)
    check_run(source, judgements)
    skipped = skipping(data.faulty_rows)
    first = {judged.query: judged for judged in islice(read_judged(judgements, skipped), FIRST)}
    queries, _ = texts_among(asked, first.keys(), skipped, lambda _, texts: len(texts) == len(first))
    wanted = {name for query in queries for name in first[query].passages}
    documents, columns = texts_among(corpus, wanted, skipped, lambda _, texts: len(texts) == len(wanted))
    rows = []
    for query, text in queries.items():
        graded = zip(first[query].passages, first[query].grades, strict=True)
        passages = [Passage(name, documents[name], grade) for name, grade in graded if documents.get(name)]
        if text and passages:
            kept = selected(passages, source, Counter())
            rows.append(GradedRow(query, text, kept, first[query].where))
    used = [column for column in ("title", "text") if column in columns]
    unused = [column for column in columns if column not in ("_id", "title", "text")]
    line = f"{source.folder}: judged queries of {judgements.name}, {_grades(rows)}, passages = {' and '.join(used)}"
    line += f"; not used: {listed(unused)}" if unused else ""
    return Look(f"{source.folder}, {judgements.name}", one_line(line), [], unused, [], [], None, rows)


def put_together(looks: Sequence[Look], data: GradedData) -> list[list[GradedRow]]:
    """Of the query that most sources know among their first rows: its rows in each source of `looks`.

    Empty if no source shows a row.
    """
    of_query: dict[str, list[list[GradedRow]]] = {}
    for number, look in enumerate(looks):
        for place, row in enumerate(look.graded):
            key = {"query_id": row.query_id, "query_text": row.query, None: f"{number} {place}"}[data.join]
            if key is not None:
                of_query.setdefault(key, [[] for _ in looks])[number].append(row)
    return max(of_query.values(), key=lambda sources: sum(map(bool, sources)), default=[])
