"""Each fault that a source can have: refused with its line, or skipped and counted; and what is an error either way."""

import gzip
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pairs import answer, hub
from sources import folder_source

from toolkit.data.faults import RowFault, Skipped, keep_skipped, leave_out, say_skipped
from toolkit.data.pair_records import pair_fingerprint, read_pairs
from toolkit.data.records import read_source
from toolkit.recipe.errors import RecipeError


def source(path: Path, form: str, **fields: Any) -> Any:
    return folder_source(folder=str(path), format=form, fields=fields)


def read(path: Path, form: str, skipped: Skipped | None, **fields: Any) -> list[Any]:
    reader = read_pairs if form in ("pairs", "beir") else read_source
    return list(reader(source(path, form, **fields), Counter(), skipped))


def refused(path: Path, form: str, **fields: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        read(path, form, None, **fields)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


# The rows before and after the fault, what stands between, its kind and a part of its line.
TEXT = (b'{"text": "a", "d": 1}', b'{"text": "b", "d": "x"}')
GROUP = (b'["a", "b"]', b'{"text": ["c", "d"]}')
PAIR = (b'{"query": "a", "positive": "b", "w": 1}', b'{"query": "c", "positive": ["d"], "w": 2}')
ROWS = {"documents": TEXT, "passages": TEXT, "groups": GROUP, "pairs": PAIR}
FIELDS = {"passages": {"document": "d"}, "pairs": {"weight": "w"}}
FAULTS: list[tuple[str, bytes, str, str]] = [
    ("documents", b'{"text": ', "not JSON", "not JSON (Expecting value at column 10); write one object a line"),
    ("documents", b"\0" * 100, "not JSON", "not JSON (Expecting value at column 1)"),
    ("documents", b'{"text": "a\0b"}', "not JSON", "not JSON (Invalid control character at column 12)"),
    ("documents", b"[" * 100_000, "not JSON", "not JSON of use (nested too deep)"),
    ("documents", b'{"text": ' + b"9" * 5000 + b"}", "not JSON", "not JSON of use (a number too long)"),
    ("documents", b'{"text": "\xe9"}', "not UTF-8", "byte 11 is not UTF-8; convert the file to UTF-8"),
    ("documents", '{"text": "a"}'.encode("utf-16-le"), "not JSON", "not JSON (Expecting property name"),
    ("documents", b'\xff\xfe{"text": "a"}', "not UTF-8", "byte 1 is not UTF-8"),
    ("documents", b'{"text": "\\ud83d"}', "not Unicode", "'text' holds half a surrogate pair"),
    ("documents", b'{"text": NaN}', "not text", "'text' holds the number nan, text is needed; set fields.text"),
    ("documents", b'{"text": -Infinity}', "not text", "'text' holds the number -inf"),
    ("documents", b'{"text": ["a"]}', "not text", "'text' holds a list, text is needed"),
    ("documents", b'"a"', "no object", "a JSON object is needed, found text; write one object a line"),
    ("documents", b"null", "no object", "a JSON object is needed, found null"),
    ("documents", b'{"body\\n": 1}', "without a column", "no column 'text'; set fields.text to one of body\\n"),
    ("passages", b'{"text": "a", "d": null}', "no id", "column 'd' holds null; set fields.document to one of ids"),
    ("groups", b'["a"]', "of another size", "a group of 1 texts after groups of 2; give all the same size"),
    ("groups", b"3", "no group", "a group is a list of texts, found the number 3"),
    ("groups", b'["a", {}]', "not text", "'text 2' holds an empty list"),
    ("pairs", b'{"query": "a"}', "without a column", "no column 'w'"),
    (
        "pairs",
        b'{"query": "a", "positive": {"txt": "b"}, "w": 1}',
        "without a column",
        "a passage of 'positive' without",
    ),
    ("pairs", b'{"query": "a", "positive": "b", "pos": "c", "w": 1}', "of other columns", "may each be the positive"),
    (
        "pairs",
        b'{"query": "a", "positive": "b", "neg": "c", "w": 1}',
        "of other columns",
        "but query, positive, w in the",
    ),
    ("pairs", b'{"query": 3, "positive": "b", "w": 1}', "not text", "'query' holds the number 3"),
    ("pairs", b'{"query": "a", "positive": "b", "w": NaN}', "no weight", "'w' holds the number nan, a number above 0"),
    (
        "pairs",
        b'{"query": "a", "positive": "b", "negative_' + b"9" * 5000 + b'": "c"}',
        "without a column",
        "no column",
    ),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize(("form", "fault", "kind", "problem"), FAULTS)
def test_a_faulty_row_is_refused_or_skipped(
    tmp_path: Path, form: str, fault: bytes, kind: str, problem: str, suffix: str
):
    path, fields = tmp_path / f"x{suffix}", FIELDS.get(form, {})
    zipped = gzip.compress if suffix.endswith(".gz") else bytes
    path.write_bytes(zipped(b"\r\n".join(ROWS[form])))
    whole = read(path, form, None, **fields)
    assert len(whole) == 2
    path.write_bytes(zipped(b"\n".join([ROWS[form][0], fault, fault, ROWS[form][1]])))
    line = refused(path, form, **fields)
    assert line.startswith(f"{path}: line 2: ") and problem in line
    skipped = Skipped()
    assert read(path, form, skipped, **fields) == whole
    assert skipped.kinds == {kind: 2} and skipped.first == {kind: [line, line.replace("line 2", "line 3")]}


def test_the_first_row_may_be_the_faulty_one(tmp_path: Path):
    """The layout of pairs is that of the first row of use."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join([b'{"query": "a"}', b"3", b'{"query": "a", "positive": 3}', b'{"q": 1}', *PAIR]))
    skipped = Skipped()
    assert len(read(path, "pairs", skipped)) == 2
    assert skipped.kinds == {"without a column": 2, "no object": 1, "not text": 1}


@pytest.mark.parametrize(("form", "fault"), [("documents", b"{"), ("groups", b"[]"), ("pairs", b'{"query": "a"}')])
def test_a_source_without_a_row_of_use_is_an_error_either_way(tmp_path: Path, form: str, fault: bytes):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join([fault] * 3))
    with pytest.raises(RecipeError) as caught:
        read(path, form, Skipped())
    assert str(caught.value).startswith(
        f"folder: {path}: no row can be used, 3 are faulty; mend them, the last: {path}: line 3: "
    )
    path.write_bytes(b"\n".join([fault, ROWS[form][0]]))
    assert len(read(path, form, Skipped())) == 1


def test_empty_texts_are_counted_and_no_fault(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": ""}\n{"text": " \\n"}\n{"text": null}\n\n')
    counts, skipped = Counter[str](), Skipped()
    assert not list(read_source(source(path, "documents"), counts, skipped))
    assert counts == {"rows": 3, "empty": 3} and not skipped.kinds


def test_a_byte_order_mark_windows_line_ends_and_nul_are_no_fault(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b\\u0000\\ufeffc"}\r\n')
    assert [record.texts for record in read(path, "documents", None)] == [["a"], ["b\0\ufeffc"]]
    path.write_bytes(b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n')  # of two files put together
    assert refused(path, "documents").startswith(f"{path}: line 2: not JSON (Unexpected UTF-8 BOM")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_line_of_ten_megabytes_is_a_document(tmp_path: Path, suffix: str):
    long = "word " * 2_000_000
    data = json.dumps({"text": long}).encode() + b"\n" + b'{"text": "' + b"x" * 10_000_000 + b"\n" + TEXT[0]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(gzip.compress(data, 1) if suffix.endswith(".gz") else data)
    started, skipped = time.process_time(), Skipped()
    assert [record.texts for record in read(path, "documents", skipped)] == [[long], ["a"]]
    assert time.process_time() - started < 20
    assert skipped.kinds == {"not JSON": 1} and len(skipped.last) < 300
    assert "line 2: not JSON (Unterminated string" in refused(path, "documents")


# --------------------------------------------------------------------------- faults of whole files


def test_a_file_that_cannot_be_read_on_is_an_error_either_way(tmp_path: Path):
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    for name, data, problem in (
        ("x.jsonl.gz", whole[: len(whole) // 2], r"x\.jsonl\.gz: line \d+: damaged gzip file .*; copy it again"),
        ("x.jsonl.gz", b'{"text": "a"}\n', r"x\.jsonl\.gz: line 1: damaged gzip file \(Not a gzipped file"),
        ("x.parquet", b"", r"x\.parquet: not a readable parquet file .*; write it again"),
        ("x.parquet", b"PAR1" * 3, r"x\.parquet: not a readable parquet file"),
    ):
        (tmp_path / name).write_bytes(data)
        for skipped in (None, Skipped()):
            with pytest.raises(RecipeError, match=problem):
                read(tmp_path / name, "documents", skipped)


def test_a_damaged_page_of_parquet_is_an_error_either_way(tmp_path: Path):
    """Arrow raises an OSError without a name here, which was told as a fault of the disk."""
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(5000)]}), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[200:400] = bytes(200)
    path.write_bytes(data)
    for skipped in (None, Skipped()):
        with pytest.raises(RecipeError, match=r"x\.parquet: not a readable parquet file \(.*\); write it again"):
            read(path, "documents", skipped)


def test_a_folder_that_lacks_a_column_in_a_parquet_file_is_an_error_either_way(tmp_path: Path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"body": ["b"]}), tmp_path / "b.parquet")
    for skipped in (None, Skipped()):
        with pytest.raises(RecipeError, match=r"b\.parquet: no column 'text'; set fields.text to one of body"):
            read(tmp_path, "documents", skipped)


def test_rows_of_parquet_that_python_cannot_hold(tmp_path: Path):
    path = tmp_path / "x.parquet"
    texts = pa.array([b"a", b"\xff", b"b"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), path)
    assert refused(path, "documents") == f"{path}: row 2: holds text that is not UTF-8; write it again as UTF-8"
    skipped = Skipped()
    assert [record.texts for record in read(path, "documents", skipped)] == [["a"], ["b"]]
    assert skipped.kinds == {"not UTF-8": 1}
    times = pa.array([2**62, 0], pa.int64()).view(pa.timestamp("us"))
    pq.write_table(pa.table({"text": times}), path)
    assert f"{path}: row 1: cannot be read (" in refused(path, "documents")
    with pytest.raises(RecipeError, match=r"no row can be used, 2 are faulty; .* row 2: 'text' holds datetime"):
        read(path, "documents", Skipped())


def test_files_that_vanish_or_have_names_of_no_use_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "x.jsonl").write_bytes(TEXT[0])
    gone = source(tmp_path / "x.jsonl", "documents")
    with monkeypatch.context() as patch:  # between being found and being looked at
        patch.setattr("toolkit.data.pair_records.pair_files", lambda _: [tmp_path / "gone.jsonl"])
        with pytest.raises(
            RecipeError, match=r"gone\.jsonl: cannot be read \(No such file or directory\); put it back"
        ):
            pair_fingerprint(gone)
    with monkeypatch.context() as patch:
        patch.setattr("toolkit.data.records.source_files", lambda _: [tmp_path / "gone.jsonl"])
        assert "gone.jsonl: cannot be read (No such file or directory)" in refused(tmp_path / "x.jsonl", "documents")
    for name in ("~nobody_here/x", "x" * 5000, "a\0b", "a\nb"):
        with pytest.raises(RecipeError, match="does not exist; name a folder or file") as caught:
            list(read_source(folder_source(folder=name), Counter()))
        assert "\n" not in str(caught.value)


def test_a_hub_dataset_that_cannot_be_read_on_is_one_line(monkeypatch: pytest.MonkeyPatch):
    table = pa.table({"query": ["a", "b"], "positive": pa.array([b"c", b"\xff"], pa.binary()).view(pa.string())})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset(table))
    with pytest.raises(
        RecipeError, match=r"^dataset a/b: row 2: cannot be read \('utf-8' codec .*; fetch the dataset again$"
    ):
        list(read_pairs(hub(), Counter(), Skipped()))
    answer(monkeypatch, {"query": "a", "positive": "b"})
    assert len(list(read_pairs(hub(), Counter(), Skipped()))) == 1


# --------------------------------------------------------------------------- BEIR

CORPUS = [b'{"_id": "d0", "text": "zero"}', b'{"_id": 1, "title": "T", "text": "one"}']
QUERIES = [b'{"_id": "q0", "text": "what"}']
JUDGEMENTS = [b"query-id\tcorpus-id\tscore", b"q0\td0\t1", b"q0\t1\t0"]
BEIR: list[tuple[str, bytes, str, str]] = [
    (
        "corpus.jsonl",
        b'{"_id": "d0", "text": "again"}',
        "of an id met before",
        "_id 'd0' stands in an earlier line too",
    ),
    ("corpus.jsonl", b'{"_id": "1", "text": "again"}', "of an id met before", "_id '1' stands in an earlier line too"),
    ("corpus.jsonl", b'{"_id": 1.0, "text": "x"}', "without id or text", "_id holds the number 1.0; write a string"),
    ("corpus.jsonl", b'{"_id": null, "text": "x"}', "without id or text", "_id holds null; write a string"),
    ("corpus.jsonl", b'{"_id": "x", "text": null}', "without id or text", 'write {"_id": ..., "text": "..."}'),
    ("corpus.jsonl", b'{"_id": "x\\t", "text": "x"}', "of an unusable id", "holds a tab, a line end or NUL; rename it"),
    ("corpus.jsonl", b'{"_id": "\\udc00", "text": "x"}', "not Unicode", "'_id' holds half a surrogate pair"),
    ("corpus.jsonl", b'{"_id": "x", "text": "\xff"}', "not UTF-8", "byte 23 is not UTF-8"),
    (
        "queries.jsonl",
        b'{"_id": "q0", "text": "again"}',
        "of an id met before",
        "_id 'q0' stands in an earlier line too",
    ),
    ("queries.jsonl", b"[1]", "without id or text", 'write {"_id": ..., "text": "..."}'),
    ("qrels/train.tsv", b"q0\td0", "no judgement", "write query-id, corpus-id and a whole number"),
    ("qrels/train.tsv", b"q0\td0\t1.5", "no judgement", "write query-id, corpus-id and a whole number"),
    ("qrels/train.tsv", b"q0\td0\t3", "judged otherwise before", "have grade 1 in an earlier line; keep one"),
    ("qrels/train.tsv", b"q0\t\xff\t1", "not UTF-8", "byte 4 is not UTF-8"),
]


def write_beir(folder: Path, part: str = "", *added: bytes) -> Path:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, lines in (("corpus.jsonl", CORPUS), ("queries.jsonl", QUERIES), ("qrels/train.tsv", JUDGEMENTS)):
        (folder / name).write_bytes(b"\n".join([*lines, *(added if name == part else ())]))
    return folder


@pytest.mark.parametrize(("part", "fault", "kind", "problem"), BEIR)
def test_a_faulty_line_of_a_beir_folder(tmp_path: Path, part: str, fault: bytes, kind: str, problem: str):
    whole = read(write_beir(tmp_path), "beir", None)
    assert whole[0].positives == ["zero"] and whole[0].negatives == ["T one"]
    number = (tmp_path / part).read_bytes().count(b"\n") + 2
    write_beir(tmp_path, part, fault)
    line = refused(tmp_path, "beir")
    assert line.startswith(f"{tmp_path / part}: line {number}: ") and problem in line
    skipped = Skipped()
    assert read(tmp_path, "beir", skipped) == whole  # of equal ids and judgements the first stays
    assert skipped.kinds == {kind: 1}


@pytest.mark.parametrize("part", ["corpus.jsonl", "queries.jsonl"])
def test_a_beir_file_without_a_line_of_use_is_an_error_either_way(tmp_path: Path, part: str):
    write_beir(tmp_path)
    (tmp_path / part).write_bytes(b"{\n[")
    with pytest.raises(RecipeError, match=rf"{part}: no row can be used, 2 are faulty; mend them, the last: .*line 2"):
        read(tmp_path, "beir", Skipped())
    (tmp_path / part).write_bytes(b"\n")
    with pytest.raises(RecipeError, match=rf"{part}: is empty; write one JSON object a line"):
        read(tmp_path, "beir", Skipped())


# --------------------------------------------------------------------------- what is kept


def test_counts_are_kept_and_said_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    skipped = Skipped()
    keep_skipped(skipped, tmp_path)
    keep_skipped(None, tmp_path)
    say_skipped(tmp_path)
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out
    for number in range(1000):
        leave_out(RowFault("not JSON", f"x: line {number}: not\nJSON"), skipped)
    leave_out(RowFault("no object", "x: line 7: \ud800"), skipped)
    keep_skipped(skipped, tmp_path)
    said = "data: faulty rows skipped: 1,001 (1,000 not JSON, 1 no object); the first of each kind:"
    lines = [*(f"  x: line {number}: not\\nJSON" for number in range(3)), "  x: line 7: \\ud800"]
    for _ in range(2):
        say_skipped(tmp_path)
        assert capsys.readouterr().out.splitlines() == [said, *lines]
    with pytest.raises(RowFault):
        leave_out(RowFault("no object", "x"), None)
    for broken in ("{", "[]", "{}", '{"kinds": {"a": "b"}, "first": {}}', '{"kinds": {}, "first": 3}'):
        (tmp_path / "skipped.json").write_text(broken)
        with pytest.raises(RecipeError, match=r"is damaged \(skipped\.json: .*; delete it, and it is made again"):
            say_skipped(tmp_path)
