"""Results in mteb's cache layout: mteb's own reader finds every task whole, and nothing that it does not know."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import mteb
import pytest
from beir import write_beir
from mteb_local import of_subsets
from retrievers import tiny_retriever

from eval import evaluate as evaluation
from eval.evaluate import evaluate, evaluate_bm25
from eval.mteb_files import Scored, name_scored, task_file, write_aggregates
from eval.mteb_tasks import load_task
from eval.suites import load_suite
from eval.tasks import Task
from toolkit.recipe.evaluation import EvalSettings


@pytest.fixture
def suites(tmp_path: Path, monkeypatch) -> dict[str, Any]:
    """Suite -> what it loads: a task of mteb with two subsets and two splits, and a folder that mteb does not know."""
    folder = write_beir(tmp_path / "small")
    collections = {split: next(iter(load_suite(f"{folder}:{split}"))).collection for split in ("dev", "test")}
    few = collections["test"]._replace(qrels={query: {"d0": 1} for query in collections["test"].queries})
    parts = {(subset, split): collections[split] for subset in ("a", "b") for split in ("dev", "test")}
    parts |= {("b", "test"): few}
    read = evaluation.load_suite
    monkeypatch.setattr(
        evaluation, "load_suite", lambda name: load_task(of_subsets(parts), None) if name == "task" else read(name)
    )
    return {"task": of_subsets(parts), "folder": str(folder)}


@pytest.mark.parametrize("system", ["dense", "bm25"])
def test_mteb_reads_a_task_of_several_subsets_and_splits(system: str, suites: dict[str, Any], tmp_path: Path, caplog):
    out, names = tmp_path / "out", ["task", suites["folder"]]
    if system == "dense":
        scores = evaluate(tiny_retriever(), names, out, label="tiny", step=None)
    else:
        scores = evaluate_bm25(names, out)
    metrics = json.loads((out / "metrics.json").read_text())
    cache = mteb.ResultCache(cache_path=out)
    (model,) = cache.load_results().model_results
    assert (model.model_name, model.model_revision) == tuple(metrics["mteb"].values())
    assert model.model_name == ("local/tiny" if system == "dense" else "local/BM25")
    (found,) = model.task_results  # the folder is no task of mteb's
    assert found.task_name == "LocalRetrieval" and sorted(found.scores) == ["dev", "test"]
    for split, rows in found.scores.items():
        assert [row["hf_subset"] for row in rows] == ["a", "b"]
        for row in rows:
            ours = scores[f"LocalRetrieval:{row['hf_subset']}:{split}"]
            assert row["main_score"] == row["ndcg_at_10"] == pytest.approx(ours["ndcg_at_10"], abs=1e-5)
    assert len({row["main_score"] for rows in found.scores.values() for row in rows}) == 3  # a:test is not b:test
    with caplog.at_level(logging.WARNING):
        whole = found.validate_and_filter_scores(suites["task"])
        (filtered,) = cache.load_results(tasks=[suites["task"]], validate_and_filter=True).model_results
    assert "Missing" not in caplog.text
    assert all(not math.isnan(row["main_score"]) for rows in whole.scores.values() for row in rows)
    expected = sum(scores[name]["ndcg_at_10"] for name in scores if name.startswith("LocalRetrieval:")) / 4
    for result in (found, whole, *filtered.task_results):
        assert sorted(result.scores) == ["dev", "test"], (result is found, result is whole)
        assert result.get_score() == pytest.approx(expected, abs=1e-5)
    assert not list(out.rglob("*.unfinished"))
    path = out / "small_test.json"  # beside, in the same format
    assert mteb.TaskResult.from_disk(path).get_score() == pytest.approx(scores["small:test"]["ndcg_at_10"], abs=1e-5)
    del found.scores["test"][1]
    lacking = found.validate_and_filter_scores(suites["task"])  # the control: mteb does notice
    assert math.isnan(lacking.scores["test"][1]["main_score"])


def test_a_task_that_is_not_whole_is_not_there_for_mteb(suites: dict[str, Any], tmp_path: Path, monkeypatch):
    score = evaluation._score
    monkeypatch.setattr(evaluation, "_score", lambda task, rank: 1 / 0 if task.subset == "b" else score(task, rank))
    with pytest.raises(ZeroDivisionError):
        evaluate_bm25(["task"], tmp_path / "out")
    cache = mteb.ResultCache(cache_path=tmp_path / "out")
    assert cache.load_results().model_results == []
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(metrics["collections"]) == ["LocalRetrieval:a:dev", "LocalRetrieval:a:test"]
    monkeypatch.setattr(evaluation, "_score", score)
    scores = evaluate_bm25(["task"], tmp_path / "out")
    (model,) = cache.load_results().model_results
    mean = sum(of["ndcg_at_10"] for name, of in scores.items() if name) / 4
    assert model.task_results[0].get_score() == pytest.approx(mean, abs=1e-5)


def test_the_main_score_in_mtebs_file_is_mtebs(tmp_path: Path, monkeypatch):
    """Suite msmarco reports MRR@10 of MSMARCO, whose main score in mteb is nDCG@10."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("msmarco", "TRECDL2019", "TRECDL2020"):
        write_beir(tmp_path / "mirror" / name)
    scores = evaluate_bm25([f"msmarco={tmp_path / 'mirror'}"], tmp_path / "out")["MSMARCO"]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["collections"]["MSMARCO"]["main_score"] == "mrr_at_10"
    path = task_file(tmp_path / "out", Scored(**metrics["mteb"]), "MSMARCO")
    assert mteb.TaskResult.from_disk(path).get_score() == pytest.approx(scores["ndcg_at_10"], abs=1e-5)
    assert scores["ndcg_at_10"] != pytest.approx(scores["mrr_at_10"], abs=1e-3)


def test_the_mean_of_an_aggregated_task_is_written_once_all_parts_are_there(tmp_path: Path):
    scored = Scored("local/x", "0" * 16)
    parts = mteb.get_task("CQADupstackRetrieval").tasks
    for i, part in enumerate(parts):
        write_aggregates(tmp_path, scored, {"BEIR", "CQADupstackRetrieval"})
        assert not task_file(tmp_path, scored, "CQADupstackRetrieval").exists()
        path = task_file(tmp_path, scored, part.metadata.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"main_score": i / 10, "hf_subset": "default", "languages": ["eng-Latn"]}
        whole = {"dataset_revision": "1", "task_name": part.metadata.name, "mteb_version": "2.0.0"}
        path.write_text(json.dumps({**whole, "scores": {"test": [row]}, "evaluation_time": 1.0}))
    write_aggregates(tmp_path, scored, {"BEIR", "CQADupstackRetrieval"})
    (model,) = mteb.ResultCache(cache_path=tmp_path).load_results().model_results
    found = {result.task_name: result.get_score() for result in model.task_results}
    assert len(found) == 13 and found["CQADupstackRetrieval"] == pytest.approx(sum(range(12)) / 120)


def test_how_mteb_names_what_was_scored(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export = tmp_path / "quick start" / "stage_1" / "export"
    export.mkdir(parents=True)
    names = {
        "sentence-transformers/all-MiniLM-L6-v2": "sentence-transformers/all-MiniLM-L6-v2",
        str(export): "local/quick_start_stage_1_export",
        "quick start/stage_1": "local/" + "_".join([*tmp_path.parts, "quick_start", "stage_1"][-3:]),
        "BM25": "local/BM25",
        "before training (stage 2)": "local/before_training_stage_2",
        "org/base with adapters/one": "local/org_base_with_adapters_one",
        "": "local/model",
    }
    assert {label: name_scored(label, []).model for label in names} == names
    one, other = (name_scored("a", {"prefix": prefix}).revision for prefix in ("", "query: "))
    assert one != other and len(one) == 16


def test_another_result_in_the_folder_is_replaced_whole(suites: dict[str, Any], tmp_path: Path):
    """mteb would take both for results of today."""
    out = tmp_path / "out"
    evaluate(tiny_retriever(), ["task", suites["folder"]], out, label="tiny", step=None)
    (before,) = mteb.ResultCache(cache_path=out).load_results().model_results
    changes = EvalSettings(query_prefix="w5 ")  # pyright: ignore[reportCallIssue]
    evaluate(tiny_retriever(), ["task"], out, label="tiny", step=None, changes=changes)
    (after,) = mteb.ResultCache(cache_path=out).load_results().model_results
    assert after.model_revision != before.model_revision
    assert not (out / "small_test.json").exists() and not (out / "rankings" / "small_test.trec").exists()
    assert list(json.loads((out / "metrics.json").read_text())["collections"]) == [
        f"LocalRetrieval:{subset}:{split}" for subset in "ab" for split in ("dev", "test")
    ]


def test_the_parts_of_a_task(suites: dict[str, Any]):
    tasks = list(load_task(suites["task"], None))
    assert [(task.official.parts, task.official.main_score) for task in tasks if isinstance(task, Task)] == [
        (4, "ndcg_at_10")
    ] * 4
