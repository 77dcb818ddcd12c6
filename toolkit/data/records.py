"""Sources of a recipe -> checked records, one after another in constant memory; and the type of a collection.

Called by prepare (training data) and, for rows of files and of the hub, by pair_records. A row that cannot be used is
a RowFault that names file, line and fix, or is left out and counted.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from toolkit.data.faults import RowFault, Skipped, leave_out, listed, some_usable
from toolkit.data.hub import first_line, first_of_hub, hub_dataset
from toolkit.data.lines import numbered_lines, parsed
from toolkit.data.source_files import source_files
from toolkit.recipe.errors import RecipeError, one_line
from toolkit.recipe.sources import FolderSource, HubSource, source_name
from toolkit.recipe.texts import FolderTexts, HubTexts

UNREADABLE = (ValueError, OverflowError, pa.ArrowException)  # what Arrow raises for values Python cannot hold
NO_COLUMN = "without a column"  # kind of fault


class Record(NamedTuple):
    """One row of a source: a document, a passage or a whole group."""

    texts: list[str]  # one text for documents and passages; all of them for a group
    document: str | None  # for passages: value of fields.document


class Collection(NamedTuple):
    """A retrieval task."""

    name: str
    documents: dict[str, str]  # id -> text
    queries: dict[str, str]  # id -> text
    qrels: dict[str, dict[str, int]]  # query id -> document id -> grade


def read_source(
    source: HubTexts | FolderTexts, counts: Counter[str], skipped: Skipped | None = None
) -> Iterator[Record]:
    """Records of one source, in order; adds to counts["rows"] and to counts["empty"] (left out for want of text).

    Args:
        skipped: where rows that cannot be used are counted; None: the first is an error.

    Raises:
        RecipeError: for a malformed row (where, what, fix), unequal groups, files that are missing or cannot be read
            on, no access to the hub, and a source whose rows are all faulty.
    """
    return some_usable(_records(source, counts, skipped), source_name(source), skipped)


def first_records(source: HubTexts | FolderTexts, most: int, skipped: Skipped | None) -> Iterator[Record]:
    """Records among the first `most` rows of each file; raises as `read_source`, but not for faulty rows alone."""
    return _records(source, Counter(), skipped, most)


def _records(
    source: HubTexts | FolderTexts, counts: Counter[str], skipped: Skipped | None, most: int | None = None
) -> Iterator[Record]:
    def columns(found: list[str], where: str) -> list[str]:
        _require(found, source, where)
        return text_columns(source)

    size = None

    def record(row: Any, where: str) -> Record | None:
        nonlocal size
        if source.format != "groups":
            return _single(row, source, where)
        group = _group(row, size, source, where)
        size = size or (group and len(group.texts))
        return group

    yield from usable_rows(read_rows(source, columns, counts, skipped, most), record, counts, skipped)


def check_group_sizes(sizes: dict[int, str]) -> None:
    """RecipeError if there are groups of several sizes; `sizes`: texts of a group -> name of a source that holds it."""
    if len(sizes) > 1:
        found = ", ".join(f"{name} holds groups of {size} texts" for size, name in sizes.items())
        raise RecipeError(f"data.sources: {found}; give all the same size, or use them in stages of their own")


def fingerprint(source: HubSource | FolderSource) -> list[Any]:
    """What tells that a source has changed, without reading it all: names, sizes and times of files, or hub ids."""
    if isinstance(source, HubSource):
        return [source.hub, source.config, source.split]
    return file_states(source_files(source))


def file_states(paths: list[Path]) -> list[Any]:
    """Name, size and time of each file; RecipeError for one that is gone."""
    try:
        found = [(path, path.stat()) for path in paths]
    except OSError as error:
        raise RecipeError(
            f"data.sources: {one_line(error.filename)}: cannot be read ({error.strerror}); put it back, or name others"
        ) from None
    return [[str(path), state.st_size, state.st_mtime_ns] for path, state in found]


# --------------------------------------------------------------------------- rows of files and of the hub

Rows = Iterator[tuple[str, Any]]  # (where, row)
ChooseColumns = Callable[[list[str], str], list[str]]  # (columns found, where) -> those to read


def read_rows(
    source: HubSource | FolderSource,
    columns: ChooseColumns,
    counts: Counter[str],
    skipped: Skipped | None,
    most: int | None = None,
) -> Rows:
    """(Where, row) of every row, unchecked; of parquet and hub data only the columns chosen. Adds to counts["rows"].

    Args:
        most: rows of each file, or of the hub's dataset, that are read; None: all.

    Raises:
        RecipeError: for files that are missing, damaged or no JSON (with file and line), no access to the hub.
    """
    if isinstance(source, HubSource):
        dataset = hub_dataset(source) if most is None else first_of_hub(source, most)
        return _hub_rows(source, dataset, columns, counts)
    return _folder_rows(source, columns, counts, skipped, most)


Read = TypeVar("Read")


def usable_rows(
    rows: Rows, read: Callable[[Any, str], Read | None], counts: Counter[str], skipped: Skipped | None
) -> Iterator[Read]:
    """What `read` makes of each row and its place; None adds to counts["empty"], a RowFault is left out or raised."""
    for where, row in rows:
        try:
            found = read(row, where)
        except RowFault as fault:
            leave_out(fault, skipped)
            continue
        if found is None:
            counts["empty"] += 1
        else:
            yield found


def _folder_rows(
    source: FolderSource, columns: ChooseColumns, counts: Counter[str], skipped: Skipped | None, most: int | None
) -> Rows:
    for path in source_files(source):
        rows = _parquet_rows(path, columns) if path.suffix == ".parquet" else _jsonl_rows(path)
        for where, row in islice(rows, most):
            counts["rows"] += 1
            try:
                yield where, row()
            except RowFault as fault:
                leave_out(fault, skipped)


Unread = Iterator[tuple[str, Callable[[], Any]]]  # (where, what gives the row or a RowFault)


def _jsonl_rows(path: Path) -> Unread:
    for number, line in numbered_lines(path):
        where = f"{path}: line {number}"
        yield where, partial(parsed, line, where)


def _parquet_rows(path: Path, columns: ChooseColumns) -> Unread:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024, columns=columns(file.schema_arrow.names, str(path))):
                try:
                    rows = batch.to_pylist()
                except UNREADABLE:  # in one of them or more
                    rows = None
                for place in range(batch.num_rows):
                    number += 1
                    where = f"{path}: row {number}"
                    yield (
                        where,
                        partial(_one_row, batch, place, where) if rows is None else partial(rows.__getitem__, place),
                    )
    except (*UNREADABLE, OSError, MemoryError) as error:
        raise RecipeError(
            f"{one_line(path)}: not a readable parquet file ({first_line(error)}); write it again"
        ) from None


def _one_row(batch: pa.RecordBatch, place: int, where: str) -> Any:
    try:
        return batch.slice(place, 1).to_pylist()[0]
    except UnicodeDecodeError:
        raise RowFault("not UTF-8", f"{where}: holds text that is not UTF-8; write it again as UTF-8") from None
    except UNREADABLE as error:  # such as a date after the year 9999
        raise RowFault("not readable", f"{where}: cannot be read ({first_line(error)}); write it again") from None


def _hub_rows(source: HubSource, dataset: Any, columns: ChooseColumns, counts: Counter[str]) -> Rows:
    chosen = columns(dataset.column_names, f"dataset {source.hub}")
    number = 0
    try:
        for number, row in enumerate(dataset.select_columns(chosen), start=1):
            counts["rows"] += 1
            yield f"dataset {source.hub}: row {number}", row
    except (*UNREADABLE, OSError) as error:
        place = one_line(f"dataset {source.hub}: row {number + 1}")
        raise RecipeError(f"{place}: cannot be read ({first_line(error)}); fetch the dataset again") from None


# --------------------------------------------------------------------------- one row


def text_columns(source: HubTexts | FolderTexts) -> list[str]:
    """The columns that a source of documents, passages or groups reads, each once."""
    fields = source.fields
    wanted = [fields.text, fields.title, fields.document if source.format == "passages" else None]
    return list(dict.fromkeys(name for name in wanted if name is not None))


def _require(found: list[str], source: HubTexts | FolderTexts, where: str) -> None:
    fields = source.fields
    wanted = {"text": fields.text, "title": fields.title, "document": fields.document}
    for key, name in wanted.items():
        if name in text_columns(source) and name not in found:
            raise no_column(name, key, found, where)


def no_column(name: str, key: str, found: list[str], where: str) -> RowFault:
    """The error for a column that the recipe names as fields.<key> and the data lacks."""
    return RowFault(NO_COLUMN, f"{where}: no column {name!r}; set fields.{key} to one of {listed(found)}")


def _single(row: Any, source: HubTexts | FolderTexts, where: str) -> Record | None:
    fields = source.fields
    if not isinstance(row, dict):
        hint = '; set format to "groups"' if isinstance(row, list) else "; write one object a line"
        raise RowFault("no object", f"{where}: a JSON object is needed, found {kind_of(row)}{hint}")
    _require(list(row), source, where)
    text = checked_text(row[fields.text], "text", fields.text, where)
    title = "" if fields.title is None else checked_text(row[fields.title], "title", fields.title, where)
    document = None
    if source.format == "passages" and fields.document is not None:
        document = row[fields.document]
        if not isinstance(document, str | int) or isinstance(document, bool):
            raise RowFault(
                "no id",
                f"{where}: column {fields.document!r} holds {kind_of(document)}; set fields.document to one of ids",
            )
    if not text.strip():
        return None
    return Record([with_title(title, text)], None if document is None else str(document))


def _group(row: Any, size: int | None, source: HubTexts | FolderTexts, where: str) -> Record | None:
    if isinstance(row, dict):
        _require(list(row), source, where)
        row = row[source.fields.text]
    if not isinstance(row, list) or not row:
        raise RowFault(
            "no group", f"{where}: a group is a list of texts, found {kind_of(row)}; set fields.text or format"
        )
    texts = [checked_text(text, "text", f"text {number}", where) for number, text in enumerate(row, start=1)]
    if not all(text.strip() for text in texts):
        return None
    if size is not None and len(texts) != size:
        raise RowFault(
            "of another size", f"{where}: a group of {len(texts)} texts after groups of {size}; give all the same size"
        )
    return Record(texts, None)


def with_title(title: str, text: str) -> str:
    """The text after its title and one space; without a title, as it is."""
    return f"{title} {text}" if title.strip() else text


def checked_text(value: Any, key: str, name: str, where: str) -> str:
    """A string as it is, null as the empty text; RowFault for any other value, telling to mend fields.<key>."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowFault(
            "not text",
            f"{where}: {name!r} holds {kind_of(value)}, text is needed; set fields.{key} to a column of text",
        )
    check_encodable(value, name, where)
    return value


def check_encodable(text: str, name: str, where: str) -> None:
    """RowFault for text that cannot be UTF-8."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RowFault(
                "not Unicode", f"{where}: {name!r} holds half a surrogate pair (\\ud800 to \\udfff); mend the text"
            ) from None


def kind_of(value: Any) -> str:
    """A value's kind in words, for errors."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    empty = isinstance(value, list | dict) and not value
    return (
        "an empty list"
        if empty
        else names.get(
            type(value), f"the number {one_line(value, 40)}" if isinstance(value, int | float) else type(value).__name__
        )
    )
