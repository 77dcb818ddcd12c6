"""Tasks that mteb scores itself get mteb's scores, on one rank and on several, with the prefixes that are asked for."""

import json
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
from beir import write_beir
from distributed import run_on_ranks
from mteb_local import PlainEncoder, others
from retrievers import tiny_retriever

from eval import evaluate as evaluation
from eval.evaluate import evaluate, evaluate_bm25
from eval.results import MtebResult
from eval.suites import check_prompts
from eval.tasks import MtebTask
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.evaluation import EvalSettings
from toolkit.retrieval.embed import Retriever, embed_texts

NAMES = ["LocalSTS", "LocalClassification", "LocalClustering", "LocalPairs"]
RUN = {"dataset_revision": "1"}  # mteb's result of a whole task, as far as it is read here


def theirs(retriever: Retriever) -> dict[str, float]:
    """mteb's own evaluation, all texts as queries."""
    encoder: Any = PlainEncoder(lambda texts, kind: embed_texts(retriever, texts, "query"))
    done = mteb.evaluate(encoder, others(), cache=None, co2_tracker=False, show_progress_bar=False)
    return {found.task_name: found.get_score() for found in done.task_results}


@pytest.fixture(scope="module")
def expected() -> dict[str, float]:
    return theirs(tiny_retriever())


@pytest.fixture
def suite(monkeypatch) -> list[str]:
    """A name for the four tasks, in one group."""
    found = [MtebTask(task, task.metadata.name, None, "kinds", task.metadata.name) for task in others()]
    monkeypatch.setattr(evaluation, "load_suite", lambda name: found)
    return ["x"]


def test_scores_are_those_of_mteb(expected: dict[str, float], suite: list[str], tmp_path: Path):
    found = evaluate(tiny_retriever(), suite, tmp_path / "out", label="tiny", step=None)
    assert {name: next(iter(found[name].values())) for name in NAMES} == pytest.approx(expected, abs=1e-6)
    assert list(expected) == NAMES and len(set(expected.values())) == 4
    assert found["kinds"] == {"main_score": pytest.approx(np.mean(list(expected.values())), abs=1e-6)}
    (model,) = mteb.ResultCache(cache_path=tmp_path / "out").load_results().model_results
    assert (model.model_name, sorted(written.task_name for written in model.task_results)) == (
        "local/tiny",
        sorted(NAMES),
    )
    for written in model.task_results:
        name = written.task_name
        assert written.get_score() == pytest.approx(expected[name], abs=1e-6)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["collections"]["LocalSTS"]["main_score"] == "cosine_spearman"
    assert json.loads((tmp_path / "out" / "per_query.json").read_text()) == {}


def test_prompts_by_type_of_task(expected: dict[str, float], suite: list[str], tmp_path: Path):
    changes = EvalSettings(prompts={"Clustering": "w7 w7 w7 ", "LocalSTS": "w8 w8 w8 "})  # pyright: ignore[reportCallIssue]
    found = evaluate(tiny_retriever(), suite, tmp_path / "out", label="tiny", step=None, changes=changes)
    for name, prefix in (("LocalClustering", "w7 w7 w7 "), ("LocalSTS", "w8 w8 w8 ")):
        wanted = theirs(tiny_retriever(query_prefix=prefix))[name]
        assert next(iter(found[name].values())) == pytest.approx(wanted, abs=1e-6)
        assert abs(wanted - expected[name]) > 1e-4
    assert found["LocalPairs"]["max_ap"] == pytest.approx(expected["LocalPairs"], abs=1e-6)


def test_a_prompt_for_no_task_is_refused(tmp_path: Path):
    suites = [str(write_beir(tmp_path / "small")), f"quick:{tmp_path / 'small'}:dev", "SciFact"]
    check_prompts(
        ["small", "quick_small", "Retrieval", "Clustering", "STSBenchmark", "CQADupstackUnixRetrieval"], suites
    )
    for name, message in (
        ("Clusterin", "prompts: Clusterin: no task or type of task of this name; did you mean Clustering"),
        ("smal", "prompts: smal: no task or type of task of this name; did you mean small"),
        ("CQADupstackRetrieval", "no task or type of task of this name; did you mean CQADupstack"),  # its parts are
        ("other", "no task or type of task of this name"),
    ):
        with pytest.raises(RecipeError, match=message):
            check_prompts(["Clustering", name], suites)


def test_a_task_of_another_kind_from_its_copy_on_disk(tmp_path: Path, monkeypatch):
    """In the hub's layout; the score is mteb's on the same folder, and the record has a digest of the data."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "sts"
    folder.mkdir()
    rows = [dict(row) for row in others()[0].dataset["default"]["test"]]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    configs = ["configs:", "- config_name: default", "  data_files:", "  - split: test", "    path: test.jsonl"]
    (folder / "README.md").write_text("\n".join(["---", *configs, "---", ""]))
    official: Any = mteb.get_task("STSBenchmark")
    official.metadata = official.metadata.model_copy(update={"dataset": {"path": str(folder), "revision": "1"}})
    encoder: Any = PlainEncoder(lambda texts, kind: embed_texts(tiny_retriever(), texts, "query"))
    done = mteb.evaluate(encoder, official, cache=None, co2_tracker=False, show_progress_bar=False)
    suite = f"STSBenchmark={folder}"
    found = evaluate(tiny_retriever(), [suite], tmp_path / "out", label="tiny", step=None)["STSBenchmark"]
    assert found == {"cosine_spearman": pytest.approx(done.task_results[0].get_score(), abs=1e-6)}
    before = json.loads((tmp_path / "out" / "metrics.json").read_text())["collections"]["STSBenchmark"]["revision"]
    (folder / "test.jsonl").write_text("".join(json.dumps(row | {"score": i % 5}) + "\n" for i, row in enumerate(rows)))
    other = evaluate(tiny_retriever(), [suite], tmp_path / "out", label="tiny", step=None)["STSBenchmark"]
    after = json.loads((tmp_path / "out" / "metrics.json").read_text())["collections"]["STSBenchmark"]["revision"]
    assert other != found and before != after and before.startswith("disk-")


def test_a_task_from_two_places_is_an_error(tmp_path: Path, monkeypatch):
    """Its scores would stand under one name."""
    (task, *_) = others()
    hub = MtebTask(task, task.metadata.name)
    suites = {"hub": [hub], "disk": [hub._replace(folder=tmp_path)]}
    monkeypatch.setattr(evaluation, "load_suite", suites.__getitem__)
    monkeypatch.setattr(
        evaluation, "score_by_mteb", lambda *_: {hub.name: MtebResult("s", {"main_score": 1.0}, RUN, 0)}
    )
    with pytest.raises(RecipeError, match="two different collections are called LocalSTS; name one of them"):
        evaluate(tiny_retriever(), ["hub", "disk"], tmp_path / "out", label="tiny", step=None)
    for suite in suites:
        assert evaluate(tiny_retriever(), [suite] * 2, tmp_path / "out", label="", step=None) == {hub.name: {"s": 1.0}}


def test_bm25_leaves_them_out(suite: list[str], tmp_path: Path):
    assert evaluate_bm25(suite, tmp_path / "out") == {}
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["skipped"] == NAMES


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_score_as_one_and_fail_together(world_size: int, expected: dict[str, float], tmp_path: Path):
    answer = run_on_ranks("mteb_ranks.py", world_size, str(tmp_path / "out"), tmp_path, timeout=500)
    for scores, not_finite, _ in answer:
        assert {name: next(iter(scores[name].values())) for name in NAMES} == pytest.approx(expected, abs=1e-5)
        assert not_finite.startswith("ValueError: ") and "not finite" in not_finite
    assert answer[0][2] == "RecipeError: suite LocalSTS: local cannot be loaded (no network); give a folder"
    assert [own[2] for own in answer[1:]] == ["RankZeroFailed: "] * (world_size - 1)
