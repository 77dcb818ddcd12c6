"""Whatever a file holds, a reader gives rows of use or one line; what is skipped is what would be refused alone."""

import gzip
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from garbage import BROKEN, PIECES, TEXT, VALUES, damaged, examples, line, outcome, rows
from hypothesis import given
from hypothesis import strategies as st
from sources import folder_source

from toolkit.data.beir import read_beir_texts, read_judgements
from toolkit.data.faults import Skipped
from toolkit.data.pair_records import PairRecord, pair_fingerprint, read_pairs
from toolkit.data.records import Record, read_source

TEXTS = st.lists(st.sampled_from(["a", "b", ""]), max_size=3)
PASSAGE = st.fixed_dictionaries({"text": st.sampled_from(["p", ""]), "title": st.sampled_from(["T", None])})
PLAUSIBLE = {"positive": st.one_of(TEXTS, PASSAGE), "w": st.floats(0.1, 2), "text": TEXTS, "d": st.integers(0, 2)}
# Formats of rows, with the columns that their sources name and what their rows are made of.
FORMATS = {
    "documents": ({"title": "title"}, rows(["text", "title"])),
    "passages": ({"document": "d"}, rows(["text", "d"], d=PLAUSIBLE["d"])),
    "groups": ({}, st.one_of(TEXTS, rows(["text"], text=TEXTS))),
    "pairs": ({"weight": "w"}, rows(["query", "positive", "negative_1", "w"], **PLAUSIBLE)),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("garbage")


def source(path: Path, form: str, **fields: Any) -> Any:
    return folder_source(folder=str(path), format=form, fields=fields)


def read(given_source: Any, skipped: Skipped | None, counts: Counter[str] | None = None) -> list[Any]:
    counts = Counter() if counts is None else counts
    reader = read_pairs if given_source.format in ("pairs", "beir") else read_source
    return list(reader(given_source, counts, skipped))


def is_of_use(record: Record | PairRecord) -> bool:
    if isinstance(record, PairRecord):
        texts, full = [record.query, *record.positives, *record.negatives], bool(record.positives)
    else:
        texts, full = record.texts, bool(record.texts)
    return full and all(text.strip() and text.encode() for text in texts)


def check(given_source: Any) -> None:
    """Both modes give rows of use or one line, and skipping adds nothing where nothing is refused."""
    refusing = outcome(lambda: read(given_source, None))
    skipped, counts = Skipped(), Counter[str]()
    skipping = outcome(lambda: read(given_source, skipped, counts))
    for records in (refusing, skipping):
        assert "\n" not in records if isinstance(records, str) else all(map(is_of_use, records))
    if not isinstance(refusing, str):
        assert skipping == refusing and not skipped.kinds
    if not isinstance(skipping, str) and given_source.format != "beir":
        assert counts["rows"] == len(skipping) + counts["empty"] + skipped.kinds.total()
        assert skipped.kinds or skipping == refusing


# --------------------------------------------------------------------------- lines

LINES = st.one_of(BROKEN, st.binary(max_size=12), VALUES.map(line))


@pytest.mark.parametrize("form", FORMATS)
def test_any_lines(place: Path, form: str):
    fields, own_rows = FORMATS[form]

    @examples(80)
    @given(st.lists(st.one_of(own_rows.map(line), LINES), max_size=5), st.sampled_from([".jsonl", ".jsonl.gz"]))
    def any_lines(lines: list[bytes], suffix: str) -> None:
        path = place / f"x{suffix}"
        data = b"\n".join(lines)
        path.write_bytes(gzip.compress(data, 1) if suffix.endswith(".gz") else data)
        check(source(path, form, **fields))

    any_lines()


@examples(60)
@given(st.lists(st.one_of(FORMATS["documents"][1].map(line), LINES), max_size=6))
def test_skipped_is_what_would_be_refused_alone(place: Path, lines: list[bytes]):
    lines = [b"{}", *b"\n".join(lines).split(b"\n")]  # the first is faulty, so that no other has a byte order mark
    path = place / "alone.jsonl"
    kept: list[Record] = []
    refused = 0
    for one in lines:
        path.write_bytes(b"{}\n" + one)
        skipped = Skipped()
        records = outcome(lambda skipped=skipped: read(source(path, "documents"), skipped))
        kept += [] if isinstance(records, str) else records
        refused += skipped.kinds.total() - 1
    path.write_bytes(b"\n".join(lines))
    skipped = Skipped()
    together = outcome(lambda: read(source(path, "documents"), skipped))
    assert together == kept or (not kept and isinstance(together, str))
    assert skipped.kinds.total() == refused


def test_the_properties_are_able_to_fail(place: Path, monkeypatch: pytest.MonkeyPatch):
    """Readers that let an exception or a value through, and a line that is two."""
    (place / "x.jsonl").write_bytes(b'{"text": "a"}\n{\n{"text": 3}')
    given_source = source(place / "x.jsonl", "documents")
    check(given_source)
    with monkeypatch.context() as patch, pytest.raises(json.JSONDecodeError):
        patch.setattr("toolkit.data.records.parsed", lambda line, where: json.loads(line))
        check(given_source)
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr("toolkit.data.records.with_title", lambda title, text: " ")
        check(given_source)
    (place / "x\ny.jsonl").write_bytes(b"{")
    check(source(place / "x\ny.jsonl", "documents"))
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr("toolkit.data.faults.one_line", str)
        check(source(place / "x\ny.jsonl", "documents"))


# --------------------------------------------------------------------------- whole files

WHOLE_LINES = b"".join(line({"text": f"text {i}", "title": None, "d": i}) + b"\r\n" for i in range(30))


@examples(80)
@given(
    st.one_of(st.binary(max_size=40), damaged(gzip.compress(WHOLE_LINES, 1)), damaged(WHOLE_LINES).map(gzip.compress))
)
def test_damaged_gzip(place: Path, data: bytes):
    (place / "z.jsonl.gz").write_bytes(data)
    check(source(place / "z.jsonl.gz", "documents"))


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


WHOLE_TABLE = pa.table({"text": [f"text {i}" for i in range(40)], "title": ["T", None] * 20, "n": range(40)})
COMPRESSED, PLAIN = parquet(WHOLE_TABLE), parquet(WHOLE_TABLE, compression="none", use_dictionary=False)


@examples(150)
@given(st.one_of(st.binary(max_size=40), damaged(COMPRESSED), damaged(PLAIN)))
def test_damaged_parquet(place: Path, data: bytes):
    (place / "x.parquet").write_bytes(data)
    check(source(place / "x.parquet", "documents", title="title"))


BYTES = st.lists(st.one_of(st.none(), st.sampled_from([b"a", b"", b"\xff", b"a\xed\xa0\x80", b"\0"])), min_size=1)
LONG = pa.array([2**62, 0], pa.int64())
COLUMNS = st.one_of(
    BYTES.map(lambda values: pa.array(values, pa.binary())),
    BYTES.map(lambda values: pa.array(values, pa.binary()).view(pa.string())),
    st.lists(TEXTS, min_size=1).map(lambda values: pa.array(values, pa.list_(pa.string()))),
    st.lists(st.integers(0, 3), min_size=1).map(lambda values: pa.array(values, pa.int32())),
    st.sampled_from(
        [LONG.view(pa.timestamp("us")), LONG.view(pa.duration("us")), LONG, pa.nulls(2), pa.array([{"text": "p"}])]
    ),
)


@pytest.mark.parametrize("form", ["documents", "groups", "pairs"])
def test_parquet_of_any_columns(place: Path, form: str):
    names = ["query", "positive", "neg"] if form == "pairs" else ["text", "title"]

    @examples(50)
    @given(st.lists(st.tuples(st.sampled_from(names), COLUMNS), min_size=1, max_size=3))
    def any_columns(columns: list[tuple[str, pa.Array]]) -> None:
        size = min(len(values) for _, values in columns)
        arrays = [values.slice(0, size) for _, values in columns]
        table = pa.Table.from_arrays(arrays, names=[name for name, _ in columns])  # a name may come twice
        (place / "y.parquet").write_bytes(parquet(table))
        check(source(place / "y.parquet", form))

    any_columns()


# --------------------------------------------------------------------------- BEIR

CORPUS = [{"_id": "d0", "text": "a"}, {"_id": "d1", "title": "T", "text": "b"}, {"_id": 2, "text": ""}]
QUERIES = [{"_id": "q0", "text": "x"}, {"_id": "q1", "text": "y"}]
JUDGEMENTS = b"query-id\tcorpus-id\tscore\nq0\td0\t1\nq0\td1\t0\r\nq1\t2\t1\nq1\td1\t2\n"
BEIR = {
    "corpus.jsonl": b"\n".join(map(line, CORPUS)),
    "queries.jsonl": b"\n".join(map(line, QUERIES)),
    "qrels/train.tsv": JUDGEMENTS,
}
IDS = st.one_of(st.sampled_from(["d0", "d1", "q0", 2, "\t", "\0"]), VALUES)
OWN_ROWS = rows(["_id", "text", "title"], _id=IDS)
FIELDS = st.one_of(st.sampled_from(["q0", "q1", "d0", "1", "0", "-1", "²", "1" * 20, "", " 1 "]), TEXT.map(repr))
OWN_LINES = st.one_of(st.lists(FIELDS, max_size=4).map(lambda fields: "\t".join(fields).encode()), PIECES)


@pytest.mark.parametrize("part", BEIR)
def test_damaged_beir_folders(place: Path, part: str):
    tabs = part.endswith(".tsv")
    own = (OWN_LINES if tabs else OWN_ROWS.map(line)) | LINES

    @examples(60)
    @given(
        st.one_of(damaged(BEIR[part]), st.lists(own, max_size=4).map(lambda lines: b"\n".join([BEIR[part], *lines])))
    )
    def any_part(data: bytes) -> None:
        (place / "beir" / "qrels").mkdir(parents=True, exist_ok=True)
        for name, whole in BEIR.items():
            (place / "beir" / name).write_bytes(data if name == part else whole)
        check(source(place / "beir", "beir"))
        path = place / "beir" / part
        for found in (
            outcome(lambda: read_judgements(path) if tabs else read_beir_texts(path)),
            outcome(lambda: read_judgements(path, skipped=Skipped()) if tabs else read_beir_texts(path, Skipped())),
        ):
            for name, value in {} if isinstance(found, str) else found.items():
                assert json.dumps([name, value], ensure_ascii=False).encode() and "\0" not in name
        pair_fingerprint(source(place / "beir", "beir"))

    any_part()
