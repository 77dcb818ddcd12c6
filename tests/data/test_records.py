"""Reading sources: what is read, what is left out, and the one line a malformed row gives."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sources import folder_source, hub_source

from toolkit.data.hub import load_from_hub
from toolkit.data.records import Record, check_group_sizes, fingerprint, read_source
from toolkit.data.source_files import source_files
from toolkit.recipe.errors import RecipeError


def source(folder: Path, form: str = "documents", **fields: str) -> Any:
    return folder_source(folder=str(folder), format=form, fields=fields)


def read(folder: Path, form: str = "documents", **fields: str) -> list[Record]:
    return list(read_source(source(folder, form, **fields), Counter()))


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_reads_jsonl_gz_and_parquet_of_a_folder_in_order(tmp_path: Path):
    lines(tmp_path / "b.jsonl", {"text": "two", "title": "T"}, {"text": "  "}, {"text": None}, {"text": "three"})
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "four"}\n\n')
    pq.write_table(pa.table({"text": ["zero", "one"], "n": [1, 2]}), tmp_path / "a.parquet")
    (tmp_path / "notes.txt").write_text("not data")
    counts: Counter[str] = Counter()
    texts = [record.texts for record in read_source(source(tmp_path), counts)]
    assert texts == [["zero"], ["one"], ["two"], ["three"], ["four"]]
    assert counts == {"rows": 7, "empty": 2}


def test_one_file_is_a_source_and_titles_go_before_texts(tmp_path: Path):
    path = lines(tmp_path / "x.jsonl", {"body": "b", "head": "h"}, {"body": "c", "head": None})
    assert [r.texts for r in read(path, text="body", title="head")] == [["h b"], ["c"]]


def test_a_beir_folder_gives_its_corpus_alone(tmp_path: Path):
    lines(tmp_path / "corpus.jsonl", {"text": "document"})
    other = lines(tmp_path / "other.jsonl", {"text": "other"})
    assert [path.name for path in source_files(source(tmp_path))] == ["corpus.jsonl", "other.jsonl"]
    lines(tmp_path / "queries.jsonl", {"text": "query"})
    assert [path.name for path in source_files(source(tmp_path))] == ["corpus.jsonl"]
    assert other.exists()


def test_passages_carry_their_document(tmp_path: Path):
    path = lines(tmp_path / "x.jsonl", {"text": "a", "d": 1}, {"text": "b", "d": "x"})
    assert read(path, "passages", document="d") == [Record(["a"], "1"), Record(["b"], "x")]
    assert read(path, "passages") == [Record(["a"], None), Record(["b"], None)]


def test_groups_are_lists_or_hold_one(tmp_path: Path):
    path = lines(tmp_path / "x.jsonl", ["a", "b"], {"src": "s", "text": ["c", "d"]}, ["e", " "])
    counts: Counter[str] = Counter()
    assert [r.texts for r in read_source(source(path, "groups"), counts)] == [["a", "b"], ["c", "d"]]
    assert counts["empty"] == 1


BAD = [
    (b'{"text": "a"}\n{"text": \n', "documents", r"x\.jsonl: line 2: not JSON .*one object a line"),
    (b'{"text": "a"}\n{"text": "\xff"}\n', "documents", r"x\.jsonl: line 2: byte \d+ is not UTF-8; convert"),
    (b'{"body": "a", "n": 1}\n', "documents", r"line 1: no column 'text'; set fields.text to one of body, n$"),
    (b'{"text": 3}\n', "documents", r"line 1: 'text' holds the number 3, text is needed; set fields.text"),
    (b'["a"]\n', "documents", r"line 1: a JSON object is needed, found a list; set format to \"groups\""),
    (b'{"text": "\\ud800"}\n', "documents", r"line 1: 'text' holds half a surrogate pair"),
    (b'["a", "b"]\n["a"]\n', "groups", r"line 2: a group of 1 texts after groups of 2"),
    (b'["a", 2]\n', "groups", r"line 1: 'text 2' holds the number 2"),
    (b'{"text": "a"}\n', "groups", r"line 1: a group is a list of texts, found text"),
    (b"[]\n", "groups", r"line 1: a group is a list of texts, found an empty list"),
]


@pytest.mark.parametrize(("data", "form", "message"), BAD)
def test_a_malformed_line_is_named_with_its_fix(tmp_path: Path, data: bytes, form: str, message: str):
    (tmp_path / "x.jsonl").write_bytes(data)
    with pytest.raises(RecipeError, match=message) as caught:
        read(tmp_path, form)
    assert "\n" not in str(caught.value)


def test_groups_of_two_sizes_name_their_sources():
    check_group_sizes({})
    check_group_sizes({3: "folder: a"})
    with pytest.raises(RecipeError, match="folder: a holds groups of 3 texts, hub: b holds groups of 4 texts; give"):
        check_group_sizes({3: "folder: a", 4: "hub: b"})


def test_damaged_files_are_named(tmp_path: Path):
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    (tmp_path / "x.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RecipeError, match=r"x\.jsonl\.gz: line \d+: damaged gzip"):
        read(tmp_path)
    (tmp_path / "x.jsonl.gz").unlink()
    (tmp_path / "x.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(RecipeError, match=r"x\.parquet: not a readable parquet file"):
        read(tmp_path)


def test_parquet_columns_are_checked(tmp_path: Path):
    pq.write_table(pa.table({"body": ["a"], "text": [1]}), tmp_path / "x.parquet")
    with pytest.raises(RecipeError, match=r"no column 'head'; set fields.text to one of body, text"):
        read(tmp_path, text="head")
    with pytest.raises(RecipeError, match=r"x\.parquet: row 1: 'text' holds the number 1"):
        read(tmp_path)
    assert [record.texts for record in read(tmp_path, text="body")] == [["a"]]


def test_missing_places_are_named(tmp_path: Path):
    with pytest.raises(RecipeError, match="does not exist"):
        read(tmp_path / "none")
    with pytest.raises(RecipeError, match=r"holds no \.jsonl"):
        read(tmp_path)
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(RecipeError, match=r"is no \.jsonl"):
        read(tmp_path / "x.csv")


class DatasetNotFoundError(Exception):
    """Named as the library's own, which the reader tells by its name."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."),
            r"huggingface.co/datasets/a/b and set HF_TOKEN",
        ),
        (DatasetNotFoundError("Dataset 'a/b' doesn't exist"), "not found on the hub"),
        (ConnectionError("Couldn't reach 'a/b'\nmore"), r"cannot be reached \(Couldn't reach 'a/b'\)"),
        (ValueError("Unknown split 'x'"), r"cannot be loaded \(Unknown split 'x'\)"),
    ],
)
def test_hub_failures_are_one_line_with_the_way_out(error: Exception, message: str):
    def load(*_: object, **__: object) -> None:
        raise error

    with pytest.raises(RecipeError, match=message) as caught:
        load_from_hub(hub_source(hub="a/b"), load)
    assert "\n" not in str(caught.value) and '{"folder": "<path>"}' in str(caught.value)


def test_fingerprint_changes_with_the_file(tmp_path: Path):
    path = lines(tmp_path / "x.jsonl", {"text": "a"})
    before = fingerprint(source(tmp_path))
    assert fingerprint(source(tmp_path)) == before
    lines(path, {"text": "ab"})
    assert fingerprint(source(tmp_path)) != before
