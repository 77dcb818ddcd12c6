"""Pairs from a folder in BEIR layout and from docstrings; and what tells that a source has changed."""

import os
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from pairs import STYLES, answer, error, hub, source, write

from toolkit.data import stdlib_corpus
from toolkit.data.pair_records import PairRecord, content_hash, pair_files, pair_fingerprint, read_pairs
from toolkit.data.records import Collection
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.pairs import StdlibPairs


def write_beir(folder: Path, **qrels: str) -> Path:
    (folder / "qrels").mkdir(parents=True)
    write(
        folder / "corpus.jsonl",
        *({"_id": f"d{i}", "title": "T" if i == 2 else "", "text": f"text {i}"} for i in range(5)),
        {"_id": "blank", "text": " "},
    )
    write(folder / "queries.jsonl", *({"_id": f"q{i}", "text": f"query {i}" if i < 4 else " "} for i in range(5)))
    for split, lines in qrels.items():
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return folder


def test_beir_gives_the_judged_queries_of_the_split(tmp_path: Path):
    train = "q2\td3\t1\nq2\td0\t0\nq0\td4\t1\nq2\td2\t2\nq2\td1\t-1\n"
    folder = write_beir(tmp_path / "b", train=train, dev="q1\td1\t1\n")
    counts: Counter[str] = Counter()
    assert list(read_pairs(source(folder, "beir"), counts)) == [
        PairRecord("query 2", ["T text 2", "text 3"], ["text 0", "text 1"], 1.0),
        PairRecord("query 0", ["text 4"], [], 1.0),
    ]
    assert +counts == {"rows": 2}
    assert list(read_pairs(source(folder, "beir", "dev"), Counter())) == [PairRecord("query 1", ["text 1"], [], 1.0)]


def test_beir_counts_what_the_folder_lacks(tmp_path: Path):
    train = "q0\td0\t1\nq0\tgone\t1\ngone\td1\t1\nq1\tgone\t1\nq2\td1\t0\nq3\tblank\t1\nq4\td1\t1\n"
    counts: Counter[str] = Counter()
    records = list(read_pairs(source(write_beir(tmp_path / "b", train=train), "beir"), counts))
    assert records == [PairRecord("query 0", ["text 0"], [], 1.0)]
    assert counts == {"rows": 6, "missing": 3, "empty": 4}


def test_beir_mistakes(tmp_path: Path):
    folder = write_beir(tmp_path / "b", test="q0\tgone\t1\n", dev="q0\td0\t0\n")
    none = f"data.sources: {folder} has no qrels/train.tsv; set split to dev or test"
    assert error(folder, "beir") == none
    with pytest.raises(RecipeError) as caught:  # found before any text is read
        pair_files(source(folder, "beir"))
    assert str(caught.value) == none
    for split in ("test", "dev"):
        assert error(folder, "beir", split) == (
            f"{folder}/qrels/{split}.tsv: no query has a relevant document in corpus.jsonl; their ids must agree"
        )
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t--1\n")
    assert error(folder, "beir", "dev") == (
        f"{folder}/qrels/dev.tsv: line 2: write query-id, corpus-id and a whole number (at most six digits) "
        "between tabs; found 'q0\\td0\\t--1'"
    )
    write(folder / "corpus.jsonl", {"_id": "d0", "text": "\ud800"})
    assert error(folder, "beir", "test") == (
        f"{folder}/corpus.jsonl: line 1: 'text' holds half a surrogate pair (\\ud800 to \\udfff); mend the text"
    )
    (folder / "corpus.jsonl").write_text('{"_id": ' + "1" * 5000)
    assert error(folder, "beir", "test") == (
        f"{folder}/corpus.jsonl: line 1: not JSON of use (a number too long); write one object a line"
    )
    for path in (folder / "qrels").iterdir():
        path.unlink()
    assert error(folder, "beir") == f"data.sources: {folder} has no qrels/train.tsv; put the judgements there"
    (folder / "qrels" / "train.tsv.gz").write_bytes(b"")
    assert "has no qrels/train.tsv; unpack train.tsv.gz there (gunzip), or name it" in error(folder, "beir")
    (folder / "corpus.jsonl").rename(folder / "corpus.jsonl.gz")
    assert error(folder, "beir") == f"{folder}/corpus.jsonl.gz: is not read in a BEIR folder; unpack it (gunzip)"
    (folder / "corpus.jsonl.gz").unlink()
    assert error(folder, "beir") == (
        f"{folder}: corpus.jsonl is missing; a BEIR folder has corpus.jsonl, queries.jsonl and qrels/*.tsv"
    )
    assert error(tmp_path / "no", "beir") == f"data.sources: {tmp_path}/no is no folder; name a folder in BEIR layout"


# --------------------------------------------------------------------------- the standard library


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Collection:
    """A standard library of one file, instead of Python's own."""
    paragraphs = [f"Give back the number {i} of the row." for i in range(40)]
    (tmp_path / "base64.py").write_text(
        "".join(f'def f{i}():\n    """{text}"""\n    return {i}\n\n\n' for i, text in enumerate(paragraphs))
    )
    for name in ("collection", "summary"):
        own = partial(getattr(stdlib_corpus, name), folder=tmp_path)
        monkeypatch.setattr(f"toolkit.data.pair_records.{name}", own)
    return stdlib_corpus.collection("train", tmp_path)


def stdlib() -> StdlibPairs:
    return StdlibPairs.model_validate({"stdlib": "docstrings"})


def test_training_docstrings_with_their_code(library: Collection):
    counts: Counter[str] = Counter()
    records = list(read_pairs(stdlib(), counts))
    assert 20 < len(records) < 40  # the others belong to dev and test
    assert counts == {"rows": len(records)}
    assert [record.query for record in records] == list(library.queries.values())
    for record in records:
        number = record.query.split()[4]
        assert record == PairRecord(record.query, [f"def f{number}():\n    return {number}"], [], 1.0)


# --------------------------------------------------------------------------- what changed


def test_content_hash_is_of_bytes_and_fingerprint_of_times_too(tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    path = write(folder / "x.jsonl", *STYLES["FlagEmbedding"])
    before, mark = content_hash(source(folder)), pair_fingerprint(source(folder))
    os.utime(path, ns=(1, 1))
    assert content_hash(source(folder)) == before == content_hash(source(path))
    assert pair_fingerprint(source(folder)) != mark
    data = path.read_bytes()
    path.write_bytes(data.replace(b"n3", b"n5"))
    assert content_hash(source(folder)) != before
    path.write_bytes(data)
    assert content_hash(source(folder)) == before
    path.rename(tmp_path / "x.jsonl")
    assert content_hash(source(tmp_path / "x.jsonl")) == before  # wherever it lies
    (folder / "x.jsonl").write_bytes(data[:100])
    (folder / "y.jsonl").write_bytes(data[100:])
    assert content_hash(source(folder)) != before


@pytest.mark.parametrize("part", ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/dev.tsv"])
def test_beir_content_is_corpus_queries_and_the_own_judgements(tmp_path: Path, part: str):
    folder = write_beir(tmp_path / "b", train="q0\td0\t1\n", dev="q1\td1\t1\n")
    before, mark = content_hash(source(folder, "beir")), pair_fingerprint(source(folder, "beir"))
    path = folder / part
    path.write_bytes(path.read_bytes().replace(b"0", b"2", 1) + b"\n")
    other_split = part == "qrels/dev.tsv"
    assert (content_hash(source(folder, "beir")) == before) == other_split
    assert (pair_fingerprint(source(folder, "beir")) == mark) == other_split


@pytest.mark.usefixtures("library")
def test_hub_and_stdlib_content(monkeypatch: pytest.MonkeyPatch):
    assert pair_fingerprint(hub()) == ["a/b", None, "dev"]
    answer(monkeypatch, *STYLES["FlagEmbedding"])
    before = content_hash(hub())
    assert content_hash(hub()) == before
    answer(monkeypatch, *STYLES["tevatron"])
    assert content_hash(hub()) != before
    assert len({before, content_hash(stdlib())}) == 2
    mark, before = pair_fingerprint(stdlib()), content_hash(stdlib())
    monkeypatch.setattr("toolkit.data.pair_records.summary", lambda: {"digest": "of another Python"})
    assert pair_fingerprint(stdlib()) != mark and content_hash(stdlib()) != before
