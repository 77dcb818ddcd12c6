"""What a folder's queries may find: excluded documents, candidates; in every layout, with scores worked out by hand."""

import json
import math
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
from beir import write_hub_layout
from mteb_local import PlainEncoder, retrieval
from retrievers import tiny_retriever

from eval import evaluate as evaluation
from eval.compare import compare_systems, read_system
from eval.evaluate import evaluate, evaluate_bm25
from eval.folders import shrink
from eval.suites import load_suite
from eval.tasks import Task
from toolkit.recipe.errors import RecipeError
from toolkit.retrieval.embed import embed_texts

TEXTS = {"d0": "w1 w2 w3", "d1": "w1 w2 w3 w9", "d2": "w50 w60 w61", "d3": "w70 w71"}
QUERIES = {"q0": "w1 w2 w3", "q1": "w50 w60 w61", "q2": "w70"}
QRELS = {"q0": {"d1": 1}, "q1": {"d2": 1}}
SECOND = 1 / math.log2(3)  # nDCG of one relevant document in the second place


def write(folder: Path, fields: dict[str, list[Any]] | None = None, **files: list[tuple[str, ...]]) -> Path:
    """The four documents in BEIR layout; q0's relevant document stands behind d0, which is the query itself."""
    (folder / "qrels").mkdir(parents=True)
    rows: dict[str, list[dict[str, Any]]] = {
        "corpus": [{"_id": i, "title": "", "text": text} for i, text in TEXTS.items()],
        "queries": [{"_id": i, "text": text} for i, text in QUERIES.items()],
    }
    for row in rows["queries"] if fields else ():
        row["excluded_ids"] = (fields or {}).get(row["_id"], [])
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    judged = [(query, document, str(grade)) for query, of in QRELS.items() for document, grade in of.items()]
    (folder / "qrels" / "test.tsv").write_text(table(("query-id", "corpus-id", "score"), judged))
    for name, pairs in files.items():
        (folder / f"{name}.tsv").write_text(table(("query-id", "corpus-id"), pairs))
    return folder


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "".join("\t".join(row) + "\n" for row in (header, *rows))


def scored(system: str, suite: Path | str, out: Path) -> dict[str, float]:
    """Query id -> nDCG@10."""
    if system == "dense":
        evaluate(tiny_retriever(query_prefix="", passage_prefix=""), [str(suite)], out, label="", step=None)
    else:
        evaluate_bm25([str(suite)], out)
    (found,) = json.loads((out / "per_query.json").read_text()).values()
    return found["ndcg_at_10"]


def row(out: Path) -> dict[str, Any]:
    (found,) = json.loads((out / "metrics.json").read_text())["collections"].values()
    return found


@pytest.mark.parametrize("system", ["dense", "bm25"])
def test_excluded_documents_are_not_found(system: str, tmp_path: Path, capsys):
    plain = scored(system, write(tmp_path / "plain" / "c"), tmp_path / "out_plain")
    assert plain == {"q0": pytest.approx(SECOND), "q1": 1.0}  # the control
    assert not {"excluded", "candidates"} & row(tmp_path / "out_plain").keys()
    capsys.readouterr()
    ways = {
        "file": write(tmp_path / "file" / "c", excluded=[("q0", "d0")]),
        "field": write(tmp_path / "field" / "c", fields={"q0": ["d0", "N/A"], "q1": ["N/A"]}),
        "split": write(tmp_path / "split" / "c"),
    }
    (ways["split"] / "excluded").mkdir()
    (ways["split"] / "excluded" / "test.tsv").write_text(table(("query-id", "corpus-id"), [("q0", "d0")]))
    ways["hub"] = write_hub_layout(tmp_path / "hub" / "c", ways["field"])
    ways["hub file"] = write_hub_layout(tmp_path / "hub_file" / "c", write(tmp_path / "for_hub"))
    (ways["hub file"] / "excluded.tsv").write_text((ways["file"] / "excluded.tsv").read_text())
    for name, folder in ways.items():
        out = tmp_path / f"out_{name}"
        assert scored(system, folder, out) == {"q0": 1.0, "q1": 1.0}, name
        assert row(out)["excluded"] == 1 and "1 excluded" in capsys.readouterr().out
        ranked = [line.split() for line in (out / "rankings" / "c_test.trec").read_text().splitlines()]
        assert next(line[2] for line in ranked if line[0] == "q0") == "d1"
        assert ("q0", "d0") not in {(line[0], line[2]) for line in ranked}
        with pytest.raises(ValueError, match="scored different data"):
            compare_systems(read_system(tmp_path / "out_plain", "before"), read_system(out, "after"))


@pytest.mark.parametrize("system", ["dense", "bm25"])
def test_as_many_documents_as_without_exclusions_are_found(system: str, tmp_path: Path, monkeypatch):
    """Those behind them move up: the search goes deeper, and its cut is that of a corpus without them."""
    monkeypatch.setattr(evaluation, "DEPTH", 2)
    folder = write(tmp_path / "c", excluded=[("q0", "d0"), ("q0", "d2")])
    found = scored(system, folder, tmp_path / "out")
    assert found["q0"] == 1.0
    for suffix, expected in (("", 1), ("deep", 1)):
        assert found["q1"] == expected, suffix
    lines = [line.split() for line in (tmp_path / "out" / "rankings" / "c_test.trec").read_text().splitlines()]
    own = [line[2] for line in lines if line[0] == "q0"]
    assert own == (["d1", "d3"] if system == "dense" else ["d1"])


def test_exclusions_score_as_mteb_does_with_bright(tmp_path: Path):
    """mteb gives a query that excludes some all other documents as candidates."""
    folder = write(tmp_path / "c", excluded=[("q0", "d0")])
    (task,) = load_suite(str(folder))
    assert isinstance(task, Task) and task.excluded == {"q0": ["d0"]}
    allowed = {"q0": ["d1", "d2", "d3"], "q1": list(TEXTS)}
    retriever = tiny_retriever(query_prefix="", passage_prefix="")
    encoder: Any = PlainEncoder(lambda texts, kind: embed_texts(retriever, texts, kind))
    done = mteb.evaluate(
        encoder, retrieval(task.collection, allowed), cache=None, co2_tracker=False, show_progress_bar=False
    )
    theirs = done.task_results[0].scores["test"][0]
    ours = scored("dense", folder, tmp_path / "out")
    assert np.mean(list(ours.values())) == pytest.approx(theirs["ndcg_at_10"], abs=1e-5)


@pytest.mark.parametrize("system", ["dense", "bm25"])
def test_candidates_alone_are_ranked(system: str, tmp_path: Path, capsys):
    pairs = [("q0", "d1"), ("q0", "d3"), ("q1", "d0"), ("q1", "d2"), ("q2", "d3")]
    folder = write(tmp_path / "c", candidates=pairs)
    assert scored(system, folder, tmp_path / "out") == {"q0": 1.0, "q1": 1.0}
    assert row(tmp_path / "out")["candidates"] == 4 and capsys.readouterr().err == ""
    both = write(tmp_path / "both" / "c", candidates=pairs, excluded=[("q1", "d0")])
    assert scored(system, both, tmp_path / "out_both") == {"q0": 1.0, "q1": 1.0}
    lines = (tmp_path / "out_both" / "rankings" / "c_test.trec").read_text().splitlines()
    assert [line.split()[2] for line in lines if line.startswith("q1 ")] == ["d2"]


def test_what_cannot_be_found_is_warned_of(tmp_path: Path, capsys):
    folder = write(tmp_path / "c", candidates=[("q0", "d0"), ("q0", "x")], excluded=[("q0", "y"), ("q0", "d3")])
    assert scored("bm25", folder, tmp_path / "out") == {"q0": 0.0, "q1": 0.0}
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {folder}: 1 of 2 excluded documents are not in corpus.jsonl ('y')",
        f"warning: {folder}: 1 of 2 candidate documents are not in corpus.jsonl ('x')",
        f"warning: {folder}: 1 of 2 queries have no candidates and score 0 ('q1')",
        f"warning: {folder}: 2 relevant documents are no candidates of their queries and cannot be found",
    ]
    list(load_suite(f"SciFact={folder}"))
    assert "read as mteb's SciFact, so excluded and candidates do not count" in capsys.readouterr().err
    for name in ("excluded", "candidates"):
        (folder / f"{name}.tsv").unlink()
    queries = folder / "queries.jsonl"
    rows = [json.loads(line) for line in queries.read_text().splitlines()]
    for ids, warned in ((["N/A"], False), (["d3"], True), ("no list", True)):
        queries.write_text("".join(json.dumps(row | {"excluded_ids": ids}) + "\n" for row in rows))
        list(load_suite(f"SciFact={folder}"))
        assert ("read as mteb's SciFact, so excluded_ids do not count" in capsys.readouterr().err) == warned


PAIRS = {
    "q0\td0\t1\n": "line 2: write query-id and corpus-id between tabs; found 'q0\\td0\\t1'",
    "q0\n": "line 2: write query-id and corpus-id between tabs; found 'q0'",
    "\td0\n": "line 2: write query-id and corpus-id between tabs",
    "x\td0\n": "line 2: query 'x' is not in queries.jsonl; add it there",
}


@pytest.mark.parametrize("name", ["excluded", "candidates"])
def test_faults_of_the_files_are_one_line(name: str, tmp_path: Path):
    folder = write(tmp_path / "c")
    path = folder / f"{name}.tsv"

    def fault(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(RecipeError) as raised:
            load_suite(str(folder))
        assert "\n" not in str(raised.value)
        return str(raised.value)

    for line, problem in PAIRS.items():
        assert fault(b"query-id\tcorpus-id\n" + line.encode()).startswith(f"{path}: {problem}")
    header = f"{path}: line 1: the header is missing; the first line is query-id, corpus-id"
    assert fault(b"q0\td0\n") == header
    assert fault(b"") == f"{path}: is empty; write the header query-id, corpus-id, and a pair a line"
    assert f"{path}: line 2: byte 4 is not UTF-8" in fault(b"query-id\tcorpus-id\nq0\t\xff\n")
    one = name.removesuffix("s")
    assert f"no {one} document is in corpus.jsonl ('x'); their ids" in fault(b"query-id\tcorpus-id\nq0\tx\n")
    (folder / name).mkdir()
    assert f"holds {name}.tsv and {name}/; keep" in fault(b"query-id\tcorpus-id\nq0\td0\n")
    path.unlink()
    (folder / name / "dev.tsv").write_text("query-id\tcorpus-id\n")
    with pytest.raises(RecipeError, match=f"{name}/test.tsv: is missing beside those of other splits"):
        load_suite(str(folder))


def test_faults_of_what_they_say(tmp_path: Path):
    relevant = write(tmp_path / "relevant", excluded=[("q0", "d1")])
    with pytest.raises(RecipeError, match="document 'd1' is relevant for query 'q0' and excluded; take it out"):
        load_suite(str(relevant))
    with pytest.raises(RecipeError, match="no judged query has candidates"):
        load_suite(str(write(tmp_path / "none", candidates=[("q2", "d0")])))
    for place, bad in enumerate(("d0", [None], [{"a": 1}], {"d0": 1})):
        folder = write(tmp_path / f"field{place}", fields={"q0": bad})  # pyright: ignore[reportArgumentType]
        with pytest.raises(RecipeError, match=r"queries.jsonl: line 1: excluded_ids holds .*; write a list of ids"):
            load_suite(str(folder))


def test_a_few_documents_of_a_folder_keep_its_limits(tmp_path: Path):
    (whole,) = load_suite(str(write(tmp_path / "c", excluded=[("q0", "d0"), ("q2", "d0")])))
    assert isinstance(whole, Task)
    few = shrink(whole, limit=3)
    assert set(few.excluded or {}) <= set(few.collection.queries) and few.revision != whole.revision
    kept = few.collection.documents
    assert (few.excluded or {})["q0"] == (["d0"] if "d0" in kept else [])
