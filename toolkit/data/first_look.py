"""What the first rows of a source show before anything is trained: its columns and their use, examples, negatives.

Called by the methods, for the launcher's look ahead and the dry run, and by prepare_pairs for its errors.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from toolkit.data.beir import beir_rows, read_judgements, titled
from toolkit.data.faults import Skipped, listed, skipping
from toolkit.data.graded_records import GradedRow
from toolkit.data.lines import numbered_lines
from toolkit.data.pair_records import Layout, PairRecord, first_pairs, pair_files, pair_layout, read_pairs
from toolkit.data.records import Record, RowFault, first_records, read_rows, text_columns
from toolkit.data.source_files import data_files, other_files, source_files
from toolkit.files import expanded
from toolkit.recipe.errors import RecipeError, one_line
from toolkit.recipe.graded import FolderGraded
from toolkit.recipe.pairs import FolderPairs, HubPairs, PairsData, PairSource, StdlibPairs
from toolkit.recipe.sources import FolderSource, HubSource, Source, StdlibSource, source_name
from toolkit.recipe.texts import FolderTexts, HubTexts, StdlibTexts, TextsData

FIRST = 100  # rows of each file that are looked at
SEARCHED = 100_000  # rows that are searched for a negative, documents for a positive
_COUNTED = {".jsonl": 4e9, ".gz": 1e9}  # bytes of files whose lines are counted


class Look(NamedTuple):
    """What the first rows of a source show."""

    name: str
    line: str  # the columns that are used, as what, and those that are not; empty for the embedded corpus
    columns: list[str]  # all that there are
    unused: list[str]
    pairs: list[PairRecord]  # the first of a source of pairs
    texts: list[Record]  # the first of another source
    negatives: bool | None  # whether a row has one; None where that is not known
    graded: Sequence[GradedRow] = ()  # the first of a source of graded rows


def look_at_texts(source: HubTexts | FolderTexts | StdlibTexts, data: TextsData) -> Look:
    """The first rows of a source of texts, read as training reads them.

    Raises:
        RecipeError: as `read_source`, for what the first rows show.
        Unreachable: where the hub cannot be reached.
    """
    if isinstance(source, StdlibTexts):
        return Look(source_name(source), "", [], [], [], [], False)
    skipped, name = skipping(data.faulty_rows), name_with_files(source)
    found = list(dict.fromkeys(column for columns in _columns(source, skipped) for column in columns))
    texts = list(first_records(source, FIRST, skipping(data.faulty_rows)))
    fields = source.fields
    used = {"text": fields.text, "title": fields.title, "document": fields.document}
    used = {key: column for key, column in used.items() if column in text_columns(source) and column in found}
    unused = [column for column in found if column not in used.values()]
    return Look(name, columns_line(name, used, unused), found, unused, [], texts, None)


def look_at_pairs(source: PairSource, data: PairsData) -> Look:
    """The first rows of a source of pairs, read as training reads them.

    Raises:
        RecipeError: as `read_pairs`, for what the first rows show.
        Unreachable: where the hub cannot be reached.
    """
    if isinstance(source, StdlibPairs):
        return Look(source_name(source), "", [], [], [], [], False)
    if isinstance(source, FolderPairs) and source.format == "beir":
        return _look_at_beir(source, data)
    name = name_with_files(source)
    rows_of = _columns(source, skipping(data.faulty_rows))
    found = list(dict.fromkeys(column for columns in rows_of for column in columns))
    pairs = list(first_pairs(source, FIRST, skipping(data.faulty_rows)))
    layout = _layout(rows_of, source, data)
    if layout is None:
        return Look(name, "", found, found, pairs, [], None)
    used = {"query": layout.query, "positive": layout.positive}
    used |= {"negatives": ", ".join(layout.negatives)} if data.negatives and layout.negatives else {}
    used |= {"weight": layout.weight} if layout.weight is not None else {}
    unused = [column for column in found if column not in layout.columns()]
    idle = [] if data.negatives else [f"{column} (data.negatives is 0)" for column in layout.negatives]
    negatives = _any_negative(source, pairs, layout, data)
    return Look(name, columns_line(name, used, idle + unused), found, unused, pairs, [], negatives)


def check_limit(source: PairSource) -> None:
    """RecipeError for a source whose limit is above its rows, where these can be counted at once."""
    if source.limit is not None and (total := count_rows(source)[0]) is not None and total < source.limit:
        raise RecipeError(f"limit: {source.limit} rows are more than the source's {total}; lower or remove it")


def no_negatives(wanted: int, looks: list[Look]) -> str:
    """The error for sources without a negative where `wanted` are asked for, as "data.negatives: ..." on one line."""
    held = [f"{one_line(each.name)} ({_held(each)})" for each in looks]
    meant = [column for each in looks for column in each.unused if "neg" in column.lower()]
    hint = f"did you mean fields.negatives {json.dumps(meant)}? Otherwise " if meant else ""
    named = "name the columns in fields.negatives, call them negatives, or negative_1, negative_2 and so on, "
    fix = (named if any(each.columns for each in looks) else "") + "mine some (data.mine), or set data.negatives to 0"
    return one_line(f"data.negatives: {wanted} are asked for, but no row of {' and '.join(held)} has any; {hint}{fix}")


def too_few(key: str, wanted: int, have: list[int], rows: str) -> str:
    """The rows that have fewer positives or negatives than a row's slots, and their share; empty if there are none.

    Args:
        key: "positives" or "negatives"; `have`: how many of them each row has; `rows`: what these rows are called.
    """
    few, none = sum(count < wanted for count in have), have.count(0) if wanted else 0
    if not few:
        return ""
    told = f"{few:,} of {len(have):,} {rows} ({few / len(have):.1%}) have fewer than data.{key} = {wanted}"
    told += f", {none:,} of them none" if none else ""
    return f"{told} (at most {max(have)}); their slots stay empty"


def _held(each: Look) -> str:
    return f"columns {listed(each.columns)}" if each.columns else "which holds none"


def name_with_files(source: HubSource | FolderSource) -> str:
    """A source with its split and, of a folder, which of its files are read and which are not."""
    if isinstance(source, HubSource):
        return f"dataset {source.hub}, split {source.split}"
    split = "" if source.split is None else f", split {source.split}"
    path = expanded(source.folder)
    if not os.path.isdir(path):
        return source.folder
    read, there = source_files(source), len(data_files(path))
    said = [] if len(read) == there == 1 else [f"{_names(read)}: {len(read)} of {there} files"]
    if others := other_files(read):
        said.append(f"not read, as they are no .jsonl, .jsonl.gz or .parquet: {listed(others)}")
    return f"{source.folder}{split}" + (f" ({'; '.join(said)})" if said else "")


def _names(files: list[Path]) -> str:
    return ", ".join([*(file.name for file in files[:3]), *(["..."] if len(files) > 3 else [])])


def _columns(source: HubSource | FolderSource, skipped: Skipped | None) -> list[list[str]]:
    """The lists of columns that the first rows of the files have, each once; empty for rows that are no objects."""
    rows = read_rows(source, lambda found, _: found, Counter(), skipped, FIRST)
    met = {tuple(map(str, row)): None for _, row in rows if isinstance(row, dict)}
    return [list(columns) for columns in met]


def _layout(rows_of: list[list[str]], source: HubPairs | FolderPairs, data: PairsData) -> Layout | None:
    """What the columns are, of the first rows that can be used; None if there are none of them yet."""
    for columns in rows_of:
        try:
            return pair_layout(columns, source.fields, source_name(source))
        except RowFault:
            if data.faulty_rows == "refuse":
                raise
    return None


def columns_line(name: str, used: dict[str, str], unused: list[str]) -> str:
    """E.g. "pairs.jsonl: query = anchor, positive = positive; not used: score"."""
    roles = ", ".join(f"{key} = {column}" for key, column in used.items()) or "each row a list of texts"
    return one_line(f"{name}: {roles}" + (f"; not used: {listed(unused)}" if unused else ""))


def _any_negative(
    source: HubPairs | FolderPairs, pairs: list[PairRecord], layout: Layout, data: PairsData
) -> bool | None:
    """Whether a row has a negative: no source without a column for them; else the first rows tell, or more of them."""
    if not layout.negatives:
        return False
    if not data.negatives or any(pair.negatives for pair in pairs):
        return bool(data.negatives) or None
    if isinstance(source, HubSource):  # more of it would be downloaded
        return None
    for number, pair in enumerate(read_pairs(source, Counter(), skipping(data.faulty_rows)), start=1):
        if pair.negatives or number == SEARCHED:
            return True if pair.negatives else None
    return False


def _look_at_beir(source: FolderPairs, data: PairsData) -> Look:
    corpus, asked, judgements = pair_files(source)
    skipped = skipping(data.faulty_rows)
    qrels = read_judgements(judgements, skipped=skipped)
    queries, _ = texts_among(asked, qrels.keys(), skipped, lambda _, texts: len(texts) == FIRST)
    wanted = {document for query in queries for document in qrels[query]}
    documents, columns = texts_among(corpus, wanted, skipped, lambda number, texts: number >= FIRST and bool(texts))
    pairs = []
    for query, text in queries.items():
        positives = [documents[d] for d, grade in qrels[query].items() if grade > 0 and documents.get(d)]
        negatives = [documents[d] for d, grade in qrels[query].items() if grade <= 0 and documents.get(d)]
        pairs += [PairRecord(text, positives, negatives, 1.0)] if text and positives else []
    some = any(grade <= 0 for grades in qrels.values() for grade in grades.values())
    used = [column for column in ("title", "text") if column in columns]
    unused = [column for column in columns if column not in ("_id", "title", "text")]
    judged = "grades of 0 as negatives" if data.negatives and some else "grades of 0 not used" if some else ""
    parts = [f"judged queries of {judgements.name}", *([judged] if judged else []), f"passages = {' and '.join(used)}"]
    line = f"{source.folder}: {', '.join(parts)}" + (f"; not used: {listed(unused)}" if unused else "")
    return Look(f"{source.folder}, {judgements.name}", one_line(line), [], unused, pairs, [], some)


def texts_among(
    path: Path, wanted: Container[str], skipped: Skipped | None, enough: Callable[[int, dict[str, str]], bool]
) -> tuple[dict[str, str], list[str]]:
    """The texts of some ids among the first rows of a corpus or of queries, and the columns of these rows.

    Args:
        enough: (rows read, texts found) -> whether to stop; after SEARCHED rows in any case.
    """
    texts: dict[str, str] = {}
    columns: dict[str, None] = {}
    for number, (row_id, row, _) in enumerate(beir_rows(path, skipped), start=1):
        columns |= dict.fromkeys(row)
        if row_id in wanted:
            texts[row_id] = titled(row)
        if number == SEARCHED or enough(number, texts):
            break
    return texts, list(columns)


# --------------------------------------------------------------------------- how many rows


def count_rows(source: Source) -> tuple[int | None, str]:
    """Rows of a local source before any are left out, and how they were counted; None with the reason why they are not.

    Raises:
        RecipeError: for files that cannot be read.
    """
    if isinstance(source, StdlibSource):
        return None, "not counted: the embedded corpus"
    if isinstance(source, HubSource):
        return None, "not counted: a dataset of the hub"
    if isinstance(source, FolderPairs | FolderGraded) and source.format == "beir":
        files = pair_files(source)[2:]
        if files[0].suffix == ".tsv":
            return len(read_judgements(files[0], skipped=Skipped())), "judged queries"
        if not files[0].name.endswith(tuple(_COUNTED)):
            return None, f"not counted: {one_line(files[0].name)} has several lines for a query"
    else:
        files = source_files(source)
    total, ways = 0, {}
    for path in files:
        if path.suffix == ".parquet":
            try:
                total += pq.read_metadata(path).num_rows
            except (OSError, ValueError) as error:
                raise RecipeError(one_line(f"{path}: not a readable parquet file ({error}); write it again")) from None
            ways["by the metadata of parquet files"] = None
        elif path.stat().st_size > _COUNTED[path.suffix]:
            return None, f"not counted: {one_line(path.name)} has {path.stat().st_size / 1e9:.1f} GB"
        else:
            total += sum(1 for _ in numbered_lines(path))
            ways["by counting lines"] = None
    return total, " and ".join(ways)
