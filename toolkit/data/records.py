"""Sources of a recipe -> checked records, one after another in constant memory; and the type of a collection.

Called by prepare (training data) and, for rows of files and of the hub, by pair_records. A malformed line is a
RecipeError that names file, line and fix.
"""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from toolkit.recipe import FolderSource, HubSource, RecipeError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


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


def read_source(source: HubSource | FolderSource, counts: Counter[str]) -> Iterator[Record]:
    """Records of one source, in order; adds to counts["rows"] and to counts["empty"] (left out for want of text).

    Raises:
        RecipeError: for a malformed row (where, what, fix), unequal groups, missing files, no access to the hub.
    """

    def columns(found: list[str], where: str) -> list[str]:
        _require(found, source, where)
        return _columns(source)

    size = None
    for where, row in read_rows(source, columns):
        counts["rows"] += 1
        record = _group(row, source, where) if source.format == "groups" else _single(row, source, where)
        if record is None:
            counts["empty"] += 1
            continue
        if source.format == "groups":
            size = size or len(record.texts)
            if len(record.texts) != size:
                raise RecipeError(
                    f"{where}: a group of {len(record.texts)} texts after groups of {size}; give all the same size"
                )
        yield record


def check_group_sizes(sizes: dict[int, str]) -> None:
    """RecipeError if there are groups of several sizes; `sizes`: texts of a group -> name of a source that holds it."""
    if len(sizes) > 1:
        found = ", ".join(f"{name} holds groups of {size} texts" for size, name in sizes.items())
        raise RecipeError(f"data.sources: {found}; give all the same size, or use them in stages of their own")


def fingerprint(source: HubSource | FolderSource) -> list[Any]:
    """What tells that a source has changed, without reading it all: names, sizes and times of files, or hub ids."""
    if isinstance(source, HubSource):
        return [source.hub, source.config, source.split]
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in source_files(source.folder)]


# --------------------------------------------------------------------------- rows of files and of the hub

Rows = Iterator[tuple[str, Any]]  # (where, row)
ChooseColumns = Callable[[list[str], str], list[str]]  # (columns found, where) -> those to read


def read_rows(source: HubSource | FolderSource, columns: ChooseColumns) -> Rows:
    """(Where, row) of every row, unchecked; of parquet and hub data only the columns chosen.

    Raises:
        RecipeError: for files that are missing, damaged or no JSON (with file and line), no access to the hub.
    """
    return _hub_rows(source, columns) if isinstance(source, HubSource) else _folder_rows(source, columns)


def source_files(folder: str) -> list[Path]:
    """The data files of a folder source, sorted; of a folder in BEIR layout the corpus alone."""
    path = Path(folder).expanduser()
    if path.is_file() and path.name.endswith(SUFFIXES):
        return [path]
    if not path.is_dir():
        problem = "is no .jsonl, .jsonl.gz or .parquet file" if path.exists() else "does not exist"
        raise RecipeError(f"data.sources: {folder} {problem}; name a folder or file of .jsonl, .jsonl.gz or .parquet")
    files = sorted(p for p in path.iterdir() if p.is_file() and p.name.endswith(SUFFIXES))
    names = {p.name.split(".")[0] for p in files}
    if {"corpus", "queries"} <= names:
        files = [p for p in files if p.name.split(".")[0] == "corpus"]
    if not files:
        raise RecipeError(f"data.sources: {folder} holds no .jsonl, .jsonl.gz or .parquet file; put the data there")
    return files


def _folder_rows(source: FolderSource, columns: ChooseColumns) -> Rows:
    for path in source_files(source.folder):
        yield from _parquet_rows(path, columns) if path.suffix == ".parquet" else _jsonl_rows(path)


def _jsonl_rows(path: Path) -> Rows:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}: line {number}", _json(line, f"{path}: line {number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise RecipeError(f"{path}: line {number + 1}: damaged gzip file ({error}); copy it again") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror or error}); mend the file or its rights") from None


def _json(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{where}: byte {error.start + 1} is not UTF-8; convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        raise RecipeError(f"{where}: not JSON ({error.msg} at column {error.colno}); write one object a line") from None
    except RecursionError:
        raise RecipeError(f"{where}: not JSON of use (nested too deep); write one object a line") from None
    except ValueError:
        raise RecipeError(f"{where}: not JSON of use (a number too long); write one object a line") from None


def _parquet_rows(path: Path, columns: ChooseColumns) -> Rows:
    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=columns(file.schema_arrow.names, str(path))):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except pa.ArrowException as error:
        raise RecipeError(f"{path}: not a readable parquet file ({_first_line(error)}); write it again") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: holds text that is not UTF-8; write it again as UTF-8") from None


def _hub_rows(source: HubSource, columns: ChooseColumns) -> Rows:
    dataset = hub_dataset(source)
    chosen = columns(dataset.column_names, f"dataset {source.hub}")
    for number, row in enumerate(dataset.select_columns(chosen), start=1):
        yield f"dataset {source.hub}: row {number}", row


def hub_dataset(source: HubSource) -> Any:
    """The split of a hub dataset, kept on disk by the datasets library; see `load_from_hub` for failures."""
    import datasets  # here, since it is slow to import and needed for hub data alone

    return load_from_hub(source, datasets.load_dataset)


def load_from_hub(source: HubSource, load: Callable[..., Any]) -> Any:
    """`load` (datasets.load_dataset) with each failure as one line."""
    place = f"data.sources: dataset {source.hub}"
    local = 'or put its files in a local folder and write {"folder": "<path>"}'
    try:
        return load(source.hub, source.config, split=source.split, streaming=False)
    except Exception as error:  # the library raises half a dozen unrelated types here
        text = _first_line(error)
        kinds = {kind.__name__ for cause in (error, error.__cause__, error.__context__) for kind in type(cause).__mro__}
        if "gated" in str(error).lower() or "GatedRepoError" in kinds:
            page = f"https://huggingface.co/datasets/{source.hub}"
            fix = f"access is restricted; ask for it at {page} and set HF_TOKEN, {local}"
        elif "DatasetNotFoundError" in kinds:
            fix = f"not found on the hub; mend the id, set HF_TOKEN if it is private, {local}"
        elif {"ConnectionError", "TimeoutError", "ConnectError"} & kinds:
            fix = f"the hub cannot be reached ({text}); connect to the network, {local}"
        else:
            fix = f"cannot be loaded ({text}); mend id, config or split, {local}"
        raise RecipeError(f"{place}: {fix}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --------------------------------------------------------------------------- one row


def _columns(source: HubSource | FolderSource) -> list[str]:
    fields = source.fields
    wanted = [fields.text, fields.title, fields.document if source.format == "passages" else None]
    return list(dict.fromkeys(name for name in wanted if name is not None))


def _require(found: list[str], source: HubSource | FolderSource, where: str) -> None:
    fields = source.fields
    wanted = {"text": fields.text, "title": fields.title, "document": fields.document}
    for key, name in wanted.items():
        if name in _columns(source) and name not in found:
            raise no_column(name, key, found, where)


def no_column(name: str, key: str, found: list[str], where: str) -> RecipeError:
    """The error for a column that the recipe names as fields.<key> and the data lacks."""
    return RecipeError(f"{where}: no column {name!r}; set fields.{key} to one of {', '.join(found) or 'none'}")


def _single(row: Any, source: FolderSource | HubSource, where: str) -> Record | None:
    fields = source.fields
    if not isinstance(row, dict):
        hint = '; set format to "groups"' if isinstance(row, list) else "; write one object a line"
        raise RecipeError(f"{where}: a JSON object is needed, found {kind_of(row)}{hint}")
    _require(list(row), source, where)
    text = checked_text(row[fields.text], "text", fields.text, where)
    title = "" if fields.title is None else checked_text(row[fields.title], "title", fields.title, where)
    document = None
    if source.format == "passages" and fields.document is not None:
        document = row[fields.document]
        if not isinstance(document, str | int) or isinstance(document, bool):
            raise RecipeError(
                f"{where}: column {fields.document!r} holds {kind_of(document)}; set fields.document to a column of ids"
            )
    if not text.strip():
        return None
    return Record([with_title(title, text)], None if document is None else str(document))


def _group(row: Any, source: FolderSource | HubSource, where: str) -> Record | None:
    if isinstance(row, dict):
        _require(list(row), source, where)
        row = row[source.fields.text]
    if not isinstance(row, list) or not row:
        raise RecipeError(f"{where}: a group is a list of texts, found {kind_of(row)}; set fields.text or format")
    texts = [checked_text(text, "text", f"text {number}", where) for number, text in enumerate(row, start=1)]
    return Record(texts, None) if all(text.strip() for text in texts) else None


def with_title(title: str, text: str) -> str:
    """The text after its title and one space; without a title, as it is."""
    return f"{title} {text}" if title.strip() else text


def checked_text(value: Any, key: str, name: str, where: str) -> str:
    """A string as it is, null as the empty text; RecipeError for any other value, telling to mend fields.<key>."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RecipeError(
            f"{where}: {name!r} holds {kind_of(value)}, text is needed; set fields.{key} to a column of text"
        )
    check_encodable(value, name, where)
    return value


def check_encodable(text: str, name: str, where: str) -> None:
    """RecipeError for text that cannot be UTF-8."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RecipeError(
                f"{where}: {name!r} holds half a surrogate pair (\\ud800 to \\udfff); mend the text"
            ) from None


def kind_of(value: Any) -> str:
    """A value's kind in words, for errors."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    empty = isinstance(value, list | dict) and not value
    return (
        "an empty list"
        if empty
        else names.get(type(value), f"the number {value}" if isinstance(value, int | float) else type(value).__name__)
    )
