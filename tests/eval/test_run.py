"""Evaluation end to end: files, shared documents, candidates, ranks, and the command."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from beir import write_beir
from distributed import run_on_ranks, run_python
from retrievers import tiny_retriever

from eval import evaluate as evaluation
from eval.evaluate import evaluate, evaluate_bm25
from eval.run import main
from eval.suites import load_suite
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.evaluation import EvalSettings
from toolkit.retrieval import bm25
from toolkit.retrieval.retrievers import Loaded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_beir(tmp_path / "small")


def test_what_is_written(folder: Path, tmp_path: Path):
    scores = evaluate(tiny_retriever(), [str(folder), f"{folder}:dev"], tmp_path / "out", label="tiny", step=7)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "metrics.json", "per_query.json", "rankings", "small_dev.json", "small_test.json"
    ]  # fmt: skip
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    per_query = json.loads((tmp_path / "out" / "per_query.json").read_text())
    assert (metrics["label"], metrics["step"]) == ("tiny", 7)
    assert metrics["system"]["settings"] == tiny_retriever().settings.model_dump()
    assert metrics["system"]["dtype"] == "float32"
    assert list(scores) == ["small:test", "small:dev", "local"]
    assert list(metrics["collections"]) == ["small:test", "small:dev"]
    for key, mean in metrics["groups"]["local"].items():
        both = [row["ndcg_at_10" if key == "main_score" else key] for row in metrics["collections"].values()]
        assert scores["local"][key] == mean == pytest.approx(np.mean(both), abs=1e-12)
    for name, row in metrics["collections"].items():
        assert list(scores[name]) == ["ndcg_at_10", "recall_at_100", "mrr_at_10"]
        for key, mean in scores[name].items():
            assert row[key] == mean == pytest.approx(np.mean(list(per_query[name][key].values())), abs=1e-12)
        assert (row["documents"], row["queries"]) == (60, len(per_query[name]["ndcg_at_10"]))
        assert row["judged_documents_missing"] == 0
    assert list(per_query["small:dev"]["mrr_at_10"]) == [f"q{i}" for i in range(5)]


def test_shared_documents_are_embedded_once(folder: Path, tmp_path: Path):
    retriever = tiny_retriever()
    rows = []
    retriever.encoder.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    evaluate(retriever, [str(folder), f"{folder}:dev"], tmp_path / "out", label="", step=None)
    (task,) = load_suite(str(folder))
    assert sum(rows) == len(set(task.collection.documents.values())) + 6 + 5


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_vectors_are_kept_where_asked(dtype, folder: Path, tmp_path: Path):
    retriever, kept, rows = tiny_retriever(), tmp_path / "kept", []
    retriever.encoder.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    (task,) = load_suite(str(folder))
    found = []
    for name, vectors in (("a", kept), ("b", kept), ("c", None)):
        rows.clear()
        settings = {"vectors": vectors, "changes": EvalSettings(vectors_dtype=dtype)}
        found.append(evaluate(retriever, [str(folder)], tmp_path / name, label="", step=None, **settings))
        encoded = 0 if name == "b" else len(set(task.collection.documents.values())) + 6  # queries are kept, too
        assert sum(rows) == encoded
        assert not (tmp_path / name / "vectors").exists()
    assert found[0] == found[1] == found[2]
    for kind, name in (("passage", f"float{dtype[2:]}"), ("query", "float32")):
        (file, *_) = kept.rglob(f"{kind}_*/*.npy")
        assert np.load(file, allow_pickle=False).dtype.name == name
    system = json.loads((tmp_path / "a" / "metrics.json").read_text())["system"]
    assert (system["vectors"], system["checkpoint"]) == (dtype, next(kept.iterdir()).name)


def test_shared_documents_are_indexed_once(folder: Path, tmp_path: Path, monkeypatch):
    made = []
    build = bm25._index
    monkeypatch.setattr(bm25, "_index", lambda words, code: made.append(code) or build(words, code))
    suites, cache = [str(folder), f"{folder}:dev"], tmp_path / "cache"
    scores = [evaluate_bm25(suites, tmp_path / "out", cache=cache) for _ in range(2)]
    assert len(made) == 1 and scores[0] == scores[1] == evaluate_bm25(suites, tmp_path / "out")


def test_bm25_reads_a_folder_as_it_is_told(tmp_path: Path):
    """Names in code are found by their parts; as prose they are one word."""
    (tmp_path / "code" / "qrels").mkdir(parents=True)
    names = ["readFile", "write_file", "closeSocket"]
    documents = [{"_id": name, "title": "", "text": f"def {name}(): pass"} for name in names]
    (tmp_path / "code" / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    (tmp_path / "code" / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "close the socket"}) + "\n")
    (tmp_path / "code" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\tcloseSocket\t1\n")
    for text, score in (("code", 1.0), ("prose", 0.0), (None, 0.0)):
        output = tmp_path / f"out_{text}"
        given = [] if text is None else ["--bm25-text", text]
        assert main(["bm25", "--suite", str(tmp_path / "code"), "--output", str(output), *given]) == 0
        row = json.loads((output / "metrics.json").read_text())["collections"]["code:test"]
        assert (row["ndcg_at_10"], row["bm25_words"]) == (score, text or "prose")


def test_two_folders_of_one_name(folder: Path, tmp_path: Path):
    other = write_beir(tmp_path / "other" / "small", num_documents=50)
    with pytest.raises(RecipeError, match="two different collections are called small:test"):
        evaluate_bm25([str(folder), str(other)], tmp_path / "out")
    assert list(evaluate_bm25([str(folder), str(folder)], tmp_path / "out")) == ["small:test"]


@pytest.mark.parametrize("system", ["dense", "bm25"])
def test_candidates(system: str, folder: Path, tmp_path: Path, monkeypatch):
    """Of a query's candidates only those count; ids shared by queries and documents mean nothing by themselves."""
    (task,) = load_suite(str(folder))
    wanted = {
        query: [f"d{i}", f"d{i + 20}"] for query, i in ((query, int(query[1:])) for query in task.collection.queries)
    }
    renamed = task.collection._replace(
        queries={f"d{q[1:]}": text for q, text in task.collection.queries.items()},
        qrels={f"d{q[1:]}": grades for q, grades in task.collection.qrels.items()},
    )
    variants = {
        "all": task,
        "candidates": task._replace(candidates=wanted),
        "kept": task._replace(collection=renamed),
    }
    found = {}
    for name, variant in variants.items():
        monkeypatch.setattr(evaluation, "load_suite", lambda suite, variant=variant: [variant])
        if system == "dense":
            found[name] = evaluate(tiny_retriever(), ["x"], tmp_path / name, label="", step=None)["small:test"]
        else:
            found[name] = evaluate_bm25(["x"], tmp_path / name)["small:test"]
    if system == "dense":  # both candidates are relevant, and all documents are found
        assert found["candidates"]["recall_at_100"] == found["candidates"]["mrr_at_10"] == 1.0
    assert found["candidates"]["ndcg_at_10"] > found["all"]["ndcg_at_10"]
    assert found["kept"] == found["all"]


@pytest.mark.parametrize("system", ["dense", "bm25"])
def test_queries_without_candidates_and_unknown_ones(system: str, folder: Path, tmp_path: Path, monkeypatch):
    (task,) = load_suite(str(folder))
    none, missing, *others = task.collection.queries
    wanted = {query: [f"d{query[1:]}", f"d{int(query[1:]) + 20}"] for query in task.collection.queries}
    few = {none: [], **{query: [*wanted[query], "unknown"] for query in others}}
    found = {}
    for name, candidates in (("wanted", wanted), ("few", few)):
        variant = task._replace(candidates=candidates)
        monkeypatch.setattr(evaluation, "load_suite", lambda suite, variant=variant: [variant])
        if system == "dense":
            evaluate(tiny_retriever(), ["x"], tmp_path / name, label="", step=None)
        else:
            evaluate_bm25(["x"], tmp_path / name)
        found[name] = json.loads((tmp_path / name / "per_query.json").read_text())["small:test"]["ndcg_at_10"]
    assert found["few"] == found["wanted"] | {none: 0.0, missing: 0.0}
    assert min(found["wanted"].values()) > 0


def test_a_main_score_of_its_own_is_reported(folder: Path, tmp_path: Path, monkeypatch):
    (task,) = load_suite(str(folder))
    monkeypatch.setattr(evaluation, "load_suite", lambda suite: [task._replace(main_score="recall_at_1")])
    assert "recall_at_1" in evaluate_bm25(["x"], tmp_path / "out")["small:test"]
    written = json.loads((tmp_path / "out" / "small_test.json").read_text())["scores"]["test"][0]
    assert written["main_score"] == written["recall_at_1"]
    monkeypatch.setattr(evaluation, "load_suite", lambda suite: [task._replace(main_score="other")])
    with pytest.raises(RecipeError, match="its score other is not computed"):
        evaluate_bm25(["x"], tmp_path / "out")


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_score_as_one_process(world_size: int, folder: Path, tmp_path: Path):
    answer = run_on_ranks("evaluate_ranks.py", world_size, [str(folder), str(tmp_path), ""], tmp_path)
    dense = evaluate(tiny_retriever(), [str(folder)], tmp_path / "one", label="", step=None)
    lexical = evaluate_bm25([str(folder)], tmp_path / "one_bm25")
    assert answer == [[dense, lexical]] * world_size
    for one, many in (("one", "dense"), ("one_bm25", "bm25")):
        read = [(tmp_path / name / "per_query.json").read_text() for name in (one, many)]
        assert read[0] == read[1]


def test_what_one_rank_cannot_read_is_told_by_all(folder: Path, tmp_path: Path):
    """And rank 0 alone makes BM25's index, which the others read; a cache that cannot be written is told by all."""
    damaged = write_beir(tmp_path / "damaged")
    (damaged / "corpus.jsonl").write_text("{\n")
    request = {"whole": str(folder), "damaged": str(damaged), "output": str(tmp_path / "out")}
    places = {"cache": "cache", "output_cached": "cached", "no_folder": "damaged/corpus.jsonl"}
    request |= {name: str(tmp_path / place) for name, place in places.items()}
    answer = run_on_ranks("suite_ranks.py", 2, request, tmp_path, timeout=500)
    assert [own.pop(0) for own in answer] == [[evaluate_bm25([str(folder)], tmp_path / "one"), made] for made in (1, 0)]
    assert answer[0] == answer[1]
    assert answer[0][0].startswith(f"{damaged}/corpus.jsonl/") and "cannot be used (Not a directory)" in answer[0][0]
    assert answer[0][1].startswith(f"{damaged}/corpus.jsonl: line 1: not JSON (")
    assert answer[0][2] == f"{folder}: cannot be read"
    assert not (tmp_path / "out").exists()


def test_command_on_bm25(folder: Path, tmp_path: Path, capsys):
    assert main(["bm25", "--suite", str(folder), "--output", str(tmp_path / "out")]) == 0
    row = json.loads((tmp_path / "out" / "metrics.json").read_text())["collections"]["small:test"]
    printed = capsys.readouterr().out
    for text in (
        "small:test",
        "BM25",
        f"{row['ndcg_at_10']:.4f}",
        f"{row['recall_at_100']:.4f}",
        f"{row['mrr_at_10']:.4f}",
    ):
        assert text in printed


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """The tiny retriever, whatever is named; the names in their order."""
    names: list[str] = []
    load = lambda what, *_: names.append(what) or Loaded(tiny_retriever(), {})  # noqa: E731
    monkeypatch.setattr("eval.run.load_any", load)
    return names


def test_command_on_a_retriever(loaded: list[str], folder: Path, tmp_path: Path, capsys):
    """Beside BM25, with a test of the difference where there are two queries; alone if asked."""
    arguments = ["any", "--suite", str(folder), "--output", str(tmp_path / "out")]
    cache = tmp_path / "cache"
    assert main([*arguments, "--bm25-cache", str(cache)]) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'out'} (after) against {tmp_path / 'out' / 'bm25'} (before)" in " ".join(printed.split())
    assert "p Holm" in printed and "BM25" in printed and len(list(cache.glob("bm25_*"))) == 1
    shutil.rmtree(tmp_path / "out")
    assert main([*arguments, "--no-bm25"]) == 0
    printed = capsys.readouterr().out
    assert "retriever" in printed and "BM25" not in printed and "p Holm" not in printed
    assert not (tmp_path / "out" / "bm25").exists()
    qrels = folder / "qrels" / "test.tsv"
    qrels.write_text("".join(qrels.read_text().splitlines(keepends=True)[:2]))
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "BM25" in printed and "p Holm" not in printed
    assert main(["bm25", "--no-bm25", *arguments[1:]]) == 2
    assert capsys.readouterr().err.startswith("error: --no-bm25: ")


def test_earlier_results_are_read_before_anything_is_scored(loaded: list[str], folder: Path, tmp_path: Path, capsys):
    arguments = ["any", "--suite", str(folder), "--output", str(tmp_path / "out"), "--no-bm25", "--compare"]
    assert main([*arguments, str(tmp_path / "typo")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'typo'}: holds no result") and loaded == []
    evaluate_bm25([str(folder)], tmp_path / "earlier")
    assert main([*arguments, str(tmp_path / "earlier")]) == 0 and loaded == ["any"]
    assert f"against {tmp_path / 'earlier'} (before)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("what", ["bm25", "nothing"])
def test_command_errors_are_one_line(what: str, folder: Path, tmp_path: Path):
    suite = str(folder) if what == "nothing" else f"{folder}:train"
    done = run_python("-m", "eval.run", what, "--suite", suite, "--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_named_before_anything_is_read(
    folder: Path, tmp_path: Path, monkeypatch, capsys
):
    output = tmp_path / "kept" / "out"
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and allowed(path, mode))  # also for root
    assert main(["nothing", "--suite", str(folder), "--output", str(output)]) == 2
    assert capsys.readouterr().err == f"error: --output {output}: {tmp_path} cannot be written; name another folder\n"
    (tmp_path / "kept").mkdir()
    assert main(["nothing", "--suite", str(folder), "--output", str(output)]) == 2
    assert capsys.readouterr().err.startswith("error: nothing: no such folder, not bm25")
