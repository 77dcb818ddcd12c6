"""What a suite's name means, and one clear line for every name or file that is wrong."""

import json
from pathlib import Path

import mteb
import pytest
from beir import write_beir
from datasets import Dataset

from eval.suites import load_suite
from toolkit.recipe import RecipeError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_beir(tmp_path / "small")


def error(name: str | Path) -> str:
    with pytest.raises(RecipeError) as caught:
        list(load_suite(str(name)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder(folder: Path):
    (task,) = load_suite(str(folder))
    name, documents, queries, qrels = task.collection
    assert name == "small:test"
    assert (len(documents), list(queries), list(qrels)) == (60, [f"q{i}" for i in range(5, 11)], list(queries))
    first, second = (json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()[:2])
    assert documents["d0"] == first["text"]
    assert documents["d1"] == "w9 " + second["text"]
    assert qrels["q5"] == {"d5": 2, "d25": 1, "d45": 0}
    assert (task.code, task.main_score, task.split, task.candidates) == (False, "ndcg_at_10", "test", None)


def test_split(folder: Path):
    (dev,) = load_suite(f"{folder}:dev")
    (test,) = load_suite(str(folder))
    assert list(dev.collection.queries) == [f"q{i}" for i in range(5)]
    assert dev.collection.documents == test.collection.documents
    assert dev.revision != test.revision
    (folder / "qrels" / "test.tsv").unlink()
    (only,) = load_suite(str(folder))
    assert only.collection == dev.collection
    (folder / "qrels" / "dev.tsv").rename(folder / "qrels" / "a.tsv")
    (folder / "qrels" / "b.tsv").write_text((folder / "qrels" / "a.tsv").read_text())
    assert f"found {folder}:a, {folder}:b" in error(folder)
    assert f"found {folder}:a, {folder}:b" in error(f"{folder}:dev")


def test_revision_is_that_of_the_content(folder: Path):
    (before,) = load_suite(str(folder))
    (again,) = load_suite(str(folder))
    assert before.revision == again.revision
    corpus = folder / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("w9", "w8", 1))
    (after,) = load_suite(str(folder))
    assert before.revision != after.revision


@pytest.mark.parametrize(
    ("file", "number", "line", "message"),
    [
        ("corpus.jsonl", 3, "{", "corpus.jsonl: line 3: not valid JSON"),
        ("corpus.jsonl", 2, '{"_id": "x"}', "corpus.jsonl: line 2: write"),
        ("corpus.jsonl", 2, '["x"]', "corpus.jsonl: line 2: write"),
        ("corpus.jsonl", 4, '{"_id": "x", "text": "a", "title": 3}', "corpus.jsonl: line 4: title is no text"),
        ("queries.jsonl", 2, '{"_id": "q0", "text": "again"}', "queries.jsonl: line 2: _id 'q0' stands in an earlier"),
        ("qrels/test.tsv", 1, "q5\td5\t1", "test.tsv: line 1: the header is missing"),
        ("qrels/test.tsv", 3, "q5\t0\td5\t1", "test.tsv: line 3: write query-id, corpus-id and a whole number"),
        ("qrels/test.tsv", 3, "q5\td5\thigh", "test.tsv: line 3: write query-id, corpus-id and a whole number"),
        ("qrels/test.tsv", 2, "q99\td5\t1", "test.tsv: line 2: query 'q99' is not in queries.jsonl"),
    ],
)
def test_malformed_line(folder: Path, file: str, number: int, line: str, message: str):
    path = folder / file
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines))
    assert message in error(folder)


def test_files_that_are_missing_or_empty(folder: Path):
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n")
    assert "test.tsv: holds no judgement" in error(f"{folder}:test")
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tother\t1\n")
    assert "no judged document is in corpus.jsonl" in error(f"{folder}:test")
    (folder / "corpus.jsonl").write_text("")
    assert "corpus.jsonl: is empty" in error(folder)
    (folder / "queries.jsonl").write_bytes(b'{"_id": "q", "text": "\xff"}')
    assert "is empty" in error(folder)
    (folder / "corpus.jsonl").write_bytes(b'{"_id": "q", "text": "\xff"}')
    assert "not UTF-8" in error(folder)
    (folder / "queries.jsonl").unlink()
    assert "queries.jsonl is missing" in error(folder)


def test_unknown_names(tmp_path: Path):
    assert "stdlib:dev or stdlib:test" in error("stdlib:train")
    assert "no such folder" in error(tmp_path / "nothing")
    assert "did you mean SciFact" in error("Scifact")
    assert "did you mean NanoBEIR" in error("NanoBIER")
    assert "no text retrieval" in error("Banking77Classification")


def test_stdlib_reads_code():
    (dev,) = load_suite("stdlib:dev")
    (test,) = load_suite("stdlib:test")
    assert dev.code and test.code
    assert dev.collection.documents == test.collection.documents
    assert not dev.collection.queries.keys() & test.collection.queries.keys()


def test_hub_that_cannot_be_reached_is_one_line():
    message = error("SciFact")  # the tests run with the hub switched off
    assert message.startswith("suite SciFact: mteb/scifact cannot be loaded")
    assert message.endswith("give a folder")


def test_mteb_task_with_subsets_candidates_and_instructions(monkeypatch):
    """A task as mteb loads it from the hub, with the data put in by hand."""
    task = mteb.get_task("BrightRetrieval", hf_subsets=["biology", "pony"])
    data = {
        "corpus": Dataset.from_list([{"id": "a", "title": "T", "text": "x "}, {"id": "b", "title": "", "text": "y"}]),
        "queries": Dataset.from_list([{"id": i, "text": f"t{i}", "instruction": "do"} for i in ("1", "2")]),
        "relevant_docs": {"1": {"a": 1}},
        "top_ranked": {"1": ["b"]},
    }
    monkeypatch.setattr(type(task), "load_data", lambda self, **_: setattr(
        self, "dataset", {subset: {"standard": dict(data)} for subset in self.hf_subsets}))  # fmt: skip
    monkeypatch.setattr("mteb.get_task", lambda name: task)
    biology, pony = load_suite("BrightRetrieval")
    assert biology.collection == (
        "BrightRetrieval:biology", {"a": "T x", "b": "y"}, {"1": "t1 do"}, {"1": {"a": 1}}
    )  # fmt: skip
    assert pony.collection.name == "BrightRetrieval:pony"
    assert (pony.task_name, pony.subset, pony.split) == ("BrightRetrieval", "pony", "standard")
    assert (pony.main_score, pony.candidates, pony.languages) == ("ndcg_at_10", {"1": ["b"]}, ["eng-Latn"])


@pytest.mark.parametrize(("name", "count"), [("BEIR", 26), ("NanoBEIR", 13), ("CoIR", 10), ("BRIGHT(v1.1)", 20)])
def test_benchmarks_are_known(name: str, count: int, monkeypatch):
    """BEIR: 15 tasks, of which one is an aggregate of 12."""
    asked = []
    monkeypatch.setattr("eval.mteb_tasks.load_task", lambda task, folder: asked.append(task.metadata.name) or [])
    assert list(load_suite(name)) == []
    assert len(set(asked)) == count
