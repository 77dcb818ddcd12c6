"""The metrics against hand calculation, and against mteb's own figures on a local task with the same vectors."""

import math
from typing import Any

import mteb
import numpy as np
import pytest
from beir import write_beir
from mteb_local import PlainEncoder, retrieval
from retrievers import tiny_retriever

from eval import evaluate as evaluation
from eval.evaluate import evaluate, evaluate_bm25
from eval.scores import as_run, per_query_scores
from eval.suites import load_suite
from eval.tasks import Task
from toolkit.retrieval.embed import embed_texts


def test_by_hand():
    run = {"q": {"a": 3.0, "b": 2.0, "c": 1.0}}
    scores = per_query_scores(run, {"q": {"b": 2, "c": 1, "z": 1}})
    ideal = 2 + 1 / math.log2(3) + 1 / math.log2(4)
    assert scores["ndcg_at_10"][0] == pytest.approx((2 / math.log2(3) + 1 / math.log2(4)) / ideal, abs=1e-12)
    assert scores["mrr_at_10"][0] == 0.5
    assert scores["mrr_at_1"][0] == 0.0
    assert scores["recall_at_100"][0] == pytest.approx(2 / 3)
    assert scores["precision_at_3"][0] == pytest.approx(2 / 3)
    assert scores["map_at_10"][0] == pytest.approx((1 / 2 + 2 / 3) / 3)


def test_the_reciprocal_rank_is_cut_at_ten():
    run = {"q": {f"d{i:02}": -float(i) for i in range(20)}}
    assert per_query_scores(run, {"q": {"d09": 1}})["mrr_at_10"][0] == 0.1
    assert per_query_scores(run, {"q": {"d10": 1}})["mrr_at_10"][0] == 0.0
    assert per_query_scores(run, {"q": {"d10": 1}})["mrr_at_20"][0] == pytest.approx(1 / 11)


def test_queries_without_run_or_relevant_document_count_as_zero():
    scores = per_query_scores({"q1": {"a": 1.0}}, {"q0": {"a": 1}, "q1": {"a": 1}, "q2": {"a": 0}})
    assert scores["ndcg_at_10"].tolist() == [0.0, 1.0, 0.0]
    assert scores["mrr_at_10"].tolist() == [0.0, 1.0, 0.0]


def test_places_without_a_document_are_left_out():
    run = as_run(["q"], ["a", "b"], np.array([[2.0, 0.0]]), np.array([[1, -1]]))
    assert run == {"q": {"b": 2.0}}


@pytest.mark.parametrize("reranked", [False, True])
def test_scores_equal_those_of_mteb(reranked: bool, tmp_path, monkeypatch):
    """Of all documents, or (as in reranking) of some for each query."""
    (task,) = load_suite(str(write_beir(tmp_path / "small")))
    assert isinstance(task, Task)
    few = {q: [f"d{i}" for i in range(int(q[1:]), 60, 5)] for q in task.collection.queries} if reranked else None
    task = task._replace(candidates=few)
    monkeypatch.setattr(evaluation, "load_suite", lambda name: [task])
    retriever = tiny_retriever()
    encoder: Any = PlainEncoder(lambda texts, kind: embed_texts(retriever, texts, kind))
    local = retrieval(task.collection, few)
    theirs = mteb.evaluate(encoder, local, cache=None, co2_tracker=False, show_progress_bar=False)
    ours = evaluate(retriever, ["x"], tmp_path / "eval", label="tiny", step=None)["small:test"]
    expected = theirs.task_results[0].scores["test"][0]
    assert 0.05 < expected["ndcg_at_10"] < 0.95
    written = mteb.TaskResult.from_disk(tmp_path / "eval" / "small_test.json")
    compared = [key for key in written.scores["test"][0] if "_at_" in key]
    assert len(compared) == 42
    for key in compared:
        assert written.scores["test"][0][key] == pytest.approx(expected[key], abs=1.1e-5), key
    assert written.get_score() == pytest.approx(ours["ndcg_at_10"], abs=1e-5)
    assert set(written.scores["test"][0]) <= set(expected)


def test_msmarco_by_its_usual_scores(tmp_path):
    for name in ("MSMARCO", "TRECDL2019", "TRECDL2020"):
        write_beir(tmp_path / "mirror" / name)
    found = evaluate_bm25([f"msmarco={tmp_path / 'mirror'}"], tmp_path / "out")
    usual = ["ndcg_at_10", "recall_at_100", "mrr_at_10"]
    assert {name: list(scores) for name, scores in found.items()} == {
        "MSMARCO": [*usual, "recall_at_50", "recall_at_1000"], "TRECDL2019": usual, "TRECDL2020": usual
    }  # fmt: skip
    (path,) = (tmp_path / "out" / "results").rglob("MSMARCO.json")
    written = mteb.TaskResult.from_disk(path).scores["dev"][0]
    assert written["mrr_at_10"] == pytest.approx(found["MSMARCO"]["mrr_at_10"], abs=1e-5)
    assert written["main_score"] == written["ndcg_at_10"]  # as mteb has it


def test_recall_at_50_by_hand():
    run = {"q": {f"d{i:02}": -float(i) for i in range(60)}}
    scores = per_query_scores(run, {"q": {"d09": 1, "d49": 1, "d50": 1, "d99": 1}})
    assert [scores[f"recall_at_{k}"][0] for k in (20, 50, 100)] == [0.25, 0.5, 0.75]
