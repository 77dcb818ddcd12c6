"""Sources of a recipe -> checked records, one after another in constant memory; and the type of a collection.

Called by prepare (training data). A malformed line is a RecipeError that names file, line and fix.
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
    rows = _hub_rows(source) if isinstance(source, HubSource) else _folder_rows(source)
    size = None
    for where, row in rows:
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


def fingerprint(source: HubSource | FolderSource) -> list[Any]:
    """What tells that a source has changed, without reading it all: names, sizes and times of files, or hub ids."""
    if isinstance(source, HubSource):
        return [source.hub, source.config, source.split]
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in source_files(source.folder)]


# --------------------------------------------------------------------------- rows of files and of the hub

Rows = Iterator[tuple[str, Any]]  # (where, row)


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


def _folder_rows(source: FolderSource) -> Rows:
    for path in source_files(source.folder):
        yield from _parquet_rows(path, source) if path.suffix == ".parquet" else _jsonl_rows(path)


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


def _parquet_rows(path: Path, source: FolderSource) -> Rows:
    try:
        with pq.ParquetFile(path) as file:
            columns = [name for name in _columns(source) if name in file.schema_arrow.names]
            _require(columns, file.schema_arrow.names, source, str(path))
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except pa.ArrowException as error:
        raise RecipeError(f"{path}: not a readable parquet file ({_first_line(error)}); write it again") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: holds text that is not UTF-8; write it again as UTF-8") from None


def _hub_rows(source: HubSource) -> Rows:
    import datasets  # here, since it is slow to import and needed for hub data alone

    dataset = load_from_hub(source, datasets.load_dataset)
    _require(dataset.column_names, dataset.column_names, source, f"dataset {source.hub}")
    for number, row in enumerate(dataset.select_columns(_columns(source)), start=1):
        yield f"dataset {source.hub}: row {number}", row


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


def _require(present: list[str], all_columns: list[str], source: HubSource | FolderSource, where: str) -> None:
    fields = source.fields
    wanted = {"text": fields.text, "title": fields.title, "document": fields.document}
    for key, name in wanted.items():
        if name in _columns(source) and name not in present:
            raise RecipeError(
                f"{where}: no column {name!r}; set fields.{key} to one of {', '.join(all_columns) or 'none'}"
            )


def _single(row: Any, source: FolderSource | HubSource, where: str) -> Record | None:
    fields = source.fields
    if not isinstance(row, dict):
        hint = '; set format to "groups"' if isinstance(row, list) else "; write one object a line"
        raise RecipeError(f"{where}: a JSON object is needed, found {_kind(row)}{hint}")
    _require(list(row), list(row), source, where)
    text = _text(row[fields.text], "text", fields.text, where)
    title = "" if fields.title is None else _text(row[fields.title], "title", fields.title, where)
    document = None
    if source.format == "passages" and fields.document is not None:
        document = row[fields.document]
        if not isinstance(document, str | int) or isinstance(document, bool):
            raise RecipeError(
                f"{where}: column {fields.document!r} holds {_kind(document)}; set fields.document to a column of ids"
            )
    if not text.strip():
        return None
    return Record([f"{title} {text}" if title.strip() else text], None if document is None else str(document))


def _group(row: Any, source: FolderSource | HubSource, where: str) -> Record | None:
    if isinstance(row, dict):
        _require(list(row), list(row), source, where)
        row = row[source.fields.text]
    if not isinstance(row, list) or not row:
        raise RecipeError(f"{where}: a group is a list of texts, found {_kind(row)}; set fields.text or format")
    texts = [_text(text, "text", f"text {number}", where) for number, text in enumerate(row, start=1)]
    return Record(texts, None) if all(text.strip() for text in texts) else None


def _text(value: Any, key: str, name: str, where: str) -> str:
    """A string as it is, null as the empty text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RecipeError(
            f"{where}: {name!r} holds {_kind(value)}, text is needed; set fields.{key} to a column of text"
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RecipeError(
                f"{where}: {name!r} holds half a surrogate pair (\\ud800 to \\udfff); mend the text"
            ) from None
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    empty = isinstance(value, list | dict) and not value
    return (
        "an empty list"
        if empty
        else names.get(type(value), f"the number {value}" if isinstance(value, int | float) else type(value).__name__)
    )
