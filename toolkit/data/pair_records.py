"""Sources of a recipe -> checked rows of a query with its positives and hard negatives, in constant memory.

Called by prepare (training data of queries and documents). A row that cannot be used is a RowFault with place and
fix, or is left out and counted.
"""

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.data.beir import beir_splits, check_parts, read_beir_texts, read_judgements
from toolkit.data.faults import RowFault, Skipped, listed, some_usable
from toolkit.data.hub import hub_dataset
from toolkit.data.records import (
    NO_COLUMN,
    checked_text,
    file_states,
    fingerprint,
    kind_of,
    no_column,
    read_rows,
    usable_rows,
    with_title,
)
from toolkit.data.source_files import source_files
from toolkit.data.stdlib_corpus import collection, summary
from toolkit.data.stdlib_names import named_code
from toolkit.files import expanded
from toolkit.recipe.errors import RecipeError, one_line
from toolkit.recipe.graded import FolderGraded
from toolkit.recipe.pairs import FolderPairs, HubPairs, PairFields, PairSource, StdlibPairs
from toolkit.recipe.sources import FolderSource, HubSource, Source, StdlibSource, source_name

# Columns read as they are where the recipe names none.
QUERIES = ("query", "anchor")  # Tevatron and FlagEmbedding; sentence-transformers
POSITIVES = ("positive_passages", "positive", "positives", "pos")
NEGATIVES = ("negative_passages", "negatives", "neg")
BEIR_SPLIT = "train"  # where the recipe names none
OTHER_COLUMNS = "of other columns"  # kind of fault
NEGATIVE_TUPLE = re.compile(r"negative(?:_(\d{1,9}))?")  # sentence-transformers: one column for each negative


class PairRecord(NamedTuple):
    """One row of a source of pairs."""

    query: str
    positives: list[str]  # at least one, none empty
    negatives: list[str]  # may be empty
    weight: float  # above 0; 1.0 unless the source names a column


def read_pairs(source: PairSource, counts: Counter[str], skipped: Skipped | None = None) -> Iterator[PairRecord]:
    """Rows of one source, in order; adds to counts["rows"], ["empty"] (no query or no positive) and ["missing"].

    Rows are read from format pairs, from the judged queries of format beir (which holds the whole corpus in memory;
    counts["missing"]: judged queries and documents that the folder lacks) and from the training docstrings of the
    standard library. Null is the empty text; empty positives and negatives are dropped.

    Args:
        skipped: where rows that cannot be used are counted (of format beir in any of the three files; of equal ids
            the first stays); None: the first is an error.

    Raises:
        RecipeError: for a malformed row (where, what, fix), unknown columns, files that are missing or cannot be read
            on, no access to the hub, and a source whose rows are all faulty.
    """
    if isinstance(source, StdlibPairs):
        return _stdlib_pairs(counts) if source.stdlib == "docstrings" else _stdlib_names(counts)
    if isinstance(source, FolderPairs) and source.format == "beir":
        return _beir_pairs(source, counts, skipped)
    return some_usable(_row_pairs(source, counts, skipped), source_name(source), skipped)


def first_pairs(source: HubPairs | FolderPairs, most: int, skipped: Skipped | None) -> Iterator[PairRecord]:
    """Pairs among the first `most` rows of each file; raises as `read_pairs`, but not for faulty rows alone."""
    return _row_pairs(source, Counter(), skipped, most)


def pair_fingerprint(source: Source) -> list[Any]:
    """What tells that a source has changed, without reading it: names, sizes and times of files, hub ids, a digest."""
    if isinstance(source, FolderSource):
        return file_states(pair_files(source))
    return ["stdlib", summary()["digest"]] if isinstance(source, StdlibSource) else fingerprint(source)


def content_hash(source: Source) -> str:
    """32 hex digits of the content alone: the bytes of files, the fingerprint of a hub dataset, the corpus's digest."""
    if isinstance(source, FolderSource):
        parts = [_file_hash(path) for path in pair_files(source)]
    elif isinstance(source, HubSource):
        # The library's own: a hash of id, configuration, split and revision of the files.
        parts = [source.hub, source.config, source.split, hub_dataset(source)._fingerprint]
    else:
        parts = ["stdlib", source.stdlib, summary()["digest"]]
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def pair_files(source: FolderSource) -> list[Path]:
    """The files that hold a folder's rows; of format beir corpus, queries and judgements.

    Raises:
        RecipeError: if there are none; for beir, with the splits there are.
    """
    if not isinstance(source, FolderPairs | FolderGraded) or source.format != "beir":
        return source_files(source)
    folder, split = expanded(source.folder), source.split or BEIR_SPLIT
    if not os.path.isdir(folder):
        raise RecipeError(f"data.sources: {one_line(source.folder)} is no folder; name a folder in BEIR layout")
    if isinstance(source, FolderGraded) and source.judgements is not None:
        check_parts(folder, ("corpus.jsonl", "queries.jsonl"))
        judgements = expanded(source.judgements)
        if not os.path.isfile(judgements):
            raise RecipeError(f"data.sources: {one_line(source.judgements)} is no file; name a file of judgements")
        return [folder / "corpus.jsonl", folder / "queries.jsonl", judgements]
    splits = beir_splits(folder)
    if split not in splits:
        fix = f"set split to {' or '.join(splits)}" if splits else "put the judgements there"
        if (folder / "qrels" / f"{split}.tsv.gz").exists():
            fix = f"unpack {split}.tsv.gz there (gunzip), or name it as a graded source's judgements"
        raise RecipeError(one_line(f"data.sources: {folder} has no qrels/{split}.tsv; {fix}"))
    return [folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / f"{split}.tsv"]


def _file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()
    except OSError as error:
        at = one_line(path)
        raise RecipeError(f"{at}: cannot be read ({error.strerror or error}); mend the file or its rights") from None


# --------------------------------------------------------------------------- columns


class Layout(NamedTuple):
    """Which columns hold what."""

    query: str
    positive: str
    negatives: list[str]
    weight: str | None

    def columns(self) -> list[str]:
        """All of them, each once."""
        named = [self.query, self.positive, *self.negatives, *([] if self.weight is None else [self.weight])]
        return list(dict.fromkeys(named))


def pair_layout(found: list[str], fields: PairFields, where: str) -> Layout:
    """The columns that the recipe names and, for those it does not, the known names among the rest.

    Raises:
        RowFault: for a name that is not found, no column that may be the query or the positive, or several.
    """
    named = [("query", fields.query), ("positive", fields.positive), ("weight", fields.weight)]
    named += [("negatives", name) for name in fields.negatives or []]
    for key, name in named:
        if name is not None and name not in found:
            raise no_column(name, key, found, where)
    taken = {name for _, name in named}
    free = [name for name in found if name not in taken]
    query = fields.query or _the_one("query", QUERIES, free, found, where)
    positive = fields.positive or _the_one("positive", POSITIVES, free, found, where)
    return Layout(
        query, positive, _negatives(free, where) if fields.negatives is None else fields.negatives, fields.weight
    )


def _the_one(key: str, known: tuple[str, ...], free: list[str], found: list[str], where: str) -> str:
    fits = [name for name in known if name in free]
    if len(fits) > 1:
        raise RowFault(
            OTHER_COLUMNS, f"{where}: columns {' and '.join(fits)} may each be the {key}; set fields.{key} to one"
        )
    if not fits:
        raise RowFault(
            NO_COLUMN, f"{where}: no column {' or '.join(known)}; set fields.{key} to one of {listed(found)}"
        )
    return fits[0]


def _negatives(free: list[str], where: str) -> list[str]:
    numbered = [(int(match[1] or 0), name) for name in free if (match := NEGATIVE_TUPLE.fullmatch(name))]
    fits = [[name] for name in NEGATIVES if name in free]
    fits += [[name for _, name in sorted(numbered)]] if numbered else []
    if len(fits) > 1:
        names = " and ".join(names[0] for names in fits)
        line = f"{where}: columns {names} may each be the negatives; list those to read in fields.negatives"
        raise RowFault(OTHER_COLUMNS, line)
    return fits[0] if fits else []


# --------------------------------------------------------------------------- rows


def _row_pairs(
    source: HubPairs | FolderPairs, counts: Counter[str], skipped: Skipped | None, most: int | None = None
) -> Iterator[PairRecord]:
    fields = source.fields

    def columns(found: list[str], where: str) -> list[str]:
        return pair_layout(found, fields, where).columns()

    first: Layout | None = None
    seen: list[str] = []

    def record(row: Any, where: str) -> PairRecord | None:
        nonlocal first, seen
        if not isinstance(row, dict):
            line = f"{where}: a JSON object is needed, found {kind_of(row)}; write one object a line"
            raise RowFault("no object", line)
        if first is None or list(row) != seen:
            first = _same_layout(list(row), first, fields, where)
            seen = list(row)
        return _record(row, first, fields, where)

    yield from usable_rows(read_rows(source, columns, counts, skipped, most), record, counts, skipped)


def _same_layout(found: list[str], first: Layout | None, fields: PairFields, where: str) -> Layout:
    """The layout of the first row of use; RowFault for a row with another, whose negatives would be lost."""
    layout = pair_layout(found, fields, where)
    if first is not None and layout != first:
        raise RowFault(
            OTHER_COLUMNS,
            f"{where}: columns {listed(layout.columns())}, but {listed(first.columns())} in the first row; "
            "give all rows the same (null for none) or name them in fields",
        )
    return layout


def _record(row: dict[str, Any], layout: Layout, fields: PairFields, where: str) -> PairRecord | None:
    query = checked_text(row[layout.query], "query", layout.query, where)
    positives = _passages(row[layout.positive], "positive", layout.positive, fields, where)
    negatives = [text for name in layout.negatives for text in _passages(row[name], "negatives", name, fields, where)]
    weight = 1.0 if layout.weight is None else _weight(row[layout.weight], layout.weight, where)
    return PairRecord(query, positives, negatives, weight) if query.strip() and positives else None


def _passages(value: Any, key: str, column: str, fields: PairFields, where: str) -> list[str]:
    """The texts of a column: a text, a passage, or a list of them; without the empty ones."""
    items = value if isinstance(value, list) else [value]
    texts = [_passage(item, key, column, fields, where) for item in items]
    return [text for text in texts if text.strip()]


def _passage(value: Any, key: str, column: str, fields: PairFields, where: str) -> str:
    if not isinstance(value, dict):
        return checked_text(value, key, column, where)
    for name, setting in ((fields.text, "text"), (fields.title, "title")):
        if name is not None and name not in value:
            raise RowFault(
                NO_COLUMN,
                f"{where}: a passage of {column!r} without {name!r}; set fields.{setting} to one of {listed(value)}",
            )
    text = checked_text(value[fields.text], "text", f"{column}.{fields.text}", where)
    title_name = fields.title or "title"
    title = checked_text(value.get(title_name), "title", f"{column}.{title_name}", where)
    return with_title(title, text) if text.strip() else ""


def _weight(value: Any, column: str, where: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        weight = float(value) if is_number else math.nan
    except OverflowError:
        weight = math.inf
    if not 1e-38 < weight < 3e38:
        raise RowFault(
            "no weight",
            f"{where}: {column!r} holds {kind_of(value)}, a number above 0 is needed; "
            f"set fields.weight to a column of weights",
        )
    return weight


# --------------------------------------------------------------------------- collections


def _beir_pairs(source: FolderPairs, counts: Counter[str], skipped: Skipped | None) -> Iterator[PairRecord]:
    corpus, asked, judgements = pair_files(source)
    documents, queries = read_beir_texts(corpus, skipped), read_beir_texts(asked, skipped)
    some = False
    for query, grades in read_judgements(judgements, skipped=skipped).items():
        counts["rows"] += 1
        counts["missing"] += sum(document not in documents for document in grades) + (query not in queries)
        texts = {name: documents[name] for name in sorted(grades) if documents.get(name)}
        positives = [text for name, text in texts.items() if grades[name] > 0]
        negatives = [text for name, text in texts.items() if grades[name] <= 0]
        if query not in queries:
            continue
        if not queries[query] or not positives:
            counts["empty"] += 1
            continue
        some = True
        yield PairRecord(queries[query], positives, negatives, 1.0)
    if not some:
        raise RecipeError(
            f"{one_line(judgements)}: no query has a relevant document in corpus.jsonl; their ids must agree"
        )


def _stdlib_pairs(counts: Counter[str]) -> Iterator[PairRecord]:
    _, documents, queries, qrels = collection("train")
    for query, grades in qrels.items():
        counts["rows"] += 1
        yield PairRecord(queries[query], [documents[document] for document in grades], [], 1.0)


def _stdlib_names(counts: Counter[str]) -> Iterator[PairRecord]:
    for name, code in named_code():
        counts["rows"] += 1
        yield PairRecord(name, [code], [], 1.0)
