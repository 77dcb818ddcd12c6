"""Means of groups: of members, not of collections; in the result and in TensorBoard."""

from pathlib import Path

import numpy as np
import pytest
from beir import write_beir
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eval import evaluate as evaluation
from eval.evaluate import evaluate_bm25
from eval.results import Result, group_means
from eval.suites import load_suite
from eval.tasks import Task
from eval.trec import keep_rankings
from toolkit.recipe.errors import RecipeError
from toolkit.training.metrics import write_eval_scalars

PARTS = ("Android", "Gis")


@pytest.fixture
def task(tmp_path: Path) -> Task:
    (found,) = load_suite(str(write_beir(tmp_path / "small")))
    assert isinstance(found, Task)
    return found


def result(task: Task, main: str = "ndcg_at_10", **scores: float) -> Result:
    per_query = {key: np.array([value, value]) for key, value in scores.items()}
    return Result(
        task._replace(main_score=main), ["q0", "q1"], per_query, keep_rankings(task.collection, {}), 0, {}, 0.0
    )


def test_the_mean_of_a_group(task: Task):
    results = {
        "SciFact": result(task, ndcg_at_10=0.8, recall_at_100=0.9),
        "CQADupstackAndroid": result(task, ndcg_at_10=0.2, recall_at_100=0.3),
        "CQADupstackGis": result(task, ndcg_at_10=0.4, recall_at_100=0.5),
        "MSMARCO": result(task, "mrr_at_10", ndcg_at_10=0.6, mrr_at_10=0.5),
        "alone": result(task, ndcg_at_10=0.7),
    }
    usual = "ndcg_at_10"
    groups = {
        "BEIR": {"SciFact": {"SciFact": usual}, "CQADupstack": {f"CQADupstack{part}": usual for part in PARTS}},
        "mixed": {"SciFact": {"SciFact": usual}, "MSMARCO": {"MSMARCO": "mrr_at_10"}},
        "same": {"SciFact": {"SciFact": usual}, "MSMARCO": {"MSMARCO": usual}},
        "one": {"alone": {"alone": usual}},
        "": {"SciFact": {"SciFact": usual}, "MSMARCO": {"MSMARCO": usual}},
    }
    means = group_means(groups, dict(results))
    assert list(means) == ["BEIR", "mixed", "same"]
    assert means["BEIR"] == pytest.approx({"ndcg_at_10": 0.55, "recall_at_100": 0.65, "main_score": 0.55})
    assert means["mixed"] == pytest.approx({"ndcg_at_10": 0.7, "main_score": 0.65})  # only what both have
    assert means["same"] == pytest.approx({"ndcg_at_10": 0.7, "main_score": 0.7})
    assert means["BEIR"]["ndcg_at_10"] != pytest.approx(np.mean([0.8, 0.2, 0.4]))  # of collections


@pytest.mark.parametrize("order", [["alone", "grouped"], ["grouped", "alone"]])
def test_a_collection_of_two_suites_counts_in_each_as_it_says(
    order: list[str], task: Task, tmp_path: Path, monkeypatch
):
    """As MS MARCO: by itself MRR@10 with recall at 50, in BEIR nDCG@10; whichever suite is named first."""
    second = task._replace(collection=task.collection._replace(name="second"), group="BEIR", member="second")
    suites = {
        "alone": [task._replace(main_score="mrr_at_10", reported=("recall_at_50",), group="", member="first")],
        "grouped": [task._replace(group="BEIR", member="first"), second],
    }
    monkeypatch.setattr(evaluation, "load_suite", suites.__getitem__)
    scores = evaluate_bm25(order, tmp_path / "out")
    assert scores["BEIR"]["main_score"] == pytest.approx(scores["small:test"]["ndcg_at_10"])
    assert scores["small:test"]["ndcg_at_10"] != pytest.approx(scores["small:test"]["mrr_at_10"])
    assert "recall_at_50" in scores["small:test"] and "recall_at_50" not in scores["second"]
    suites[order[1]][0] = suites[order[1]][0]._replace(main_score="other")
    with pytest.raises(RecipeError, match="small:test: its score other is not computed here"):
        evaluate_bm25(order, tmp_path / "out")


def test_parts_of_one_suite_make_one_mean(task: Task, tmp_path: Path, monkeypatch):
    """Three collections of two members, through evaluation, to TensorBoard at the global step."""
    parts = [("a", "first"), ("b", "second"), ("c", "second")]
    tasks = [
        task._replace(
            collection=task.collection._replace(name=name, qrels={q: {f"d{i}": 1} for q in task.collection.queries}),
            group="BEIR",
            member=member,
        )
        for i, (name, member) in enumerate(parts, 5)
    ]
    monkeypatch.setattr(evaluation, "load_suite", lambda name: tasks)
    scores = evaluate_bm25(["x", "x"], tmp_path / "out")  # named twice, counted once
    values = [scores[name]["ndcg_at_10"] for name, _ in parts]
    assert scores["BEIR"]["ndcg_at_10"] == pytest.approx((values[0] + (values[1] + values[2]) / 2) / 2)
    assert scores["BEIR"]["ndcg_at_10"] != pytest.approx(np.mean(values))
    write_eval_scalars(tmp_path, scores, step=70)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    for name in ("a", "b", "c", "BEIR"):
        (point,) = board.Scalars(f"eval/{name}/ndcg_at_10")
        assert (point.step, point.value) == (70, pytest.approx(scores[name]["ndcg_at_10"], rel=1e-6))
