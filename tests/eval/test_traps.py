"""Traps on the way to a score, each with the naive way that falls into it, run on mteb where the trap is mteb's."""

import json
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
import torch
from beir import write_beir
from mteb.cache import ResultCache
from mteb_local import LocalClassification, PlainEncoder, others, retrieval
from retrievers import tiny_retriever

from eval import evaluate as evaluation
from eval.evaluate import evaluate, evaluate_bm25
from eval.mteb_encoder import MtebEncoder
from eval.suites import load_suite
from eval.tasks import MtebTask, Task
from toolkit.data.records import Collection
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.evaluation import EvalSettings
from toolkit.retrieval.embed import Retriever, embed_texts, encode


@pytest.fixture
def task(tmp_path: Path) -> Task:
    (found,) = load_suite(str(write_beir(tmp_path / "small")))
    assert isinstance(found, Task)
    return found


def by_mteb(encoder: PlainEncoder, task: Any, cache: ResultCache | None = None, overwrite: str = "only-missing") -> Any:
    done = mteb.evaluate(
        encoder, task, cache=cache, overwrite_strategy=overwrite, co2_tracker=False, show_progress_bar=False
    )
    return done.task_results[0].scores["test"][0]


def scored(monkeypatch, tasks: list[Any], folder: Path, retriever: Retriever | None = None, **changes: Any) -> Any:
    """Our scores of tasks that no name stands for."""
    monkeypatch.setattr(evaluation, "load_suite", lambda name: tasks)
    settings = EvalSettings(**changes)
    return evaluate(retriever or tiny_retriever(), ["x"], folder, label="tiny", step=None, changes=settings)


def other_weights(retriever: Retriever) -> Retriever:
    with torch.no_grad():
        for weight in retriever.encoder.parameters():
            weight.copy_(weight.flip(0))
    return retriever


# --------------------------------------------------------------------------- vectors


@pytest.mark.parametrize("kind", ["search", "other"])
def test_vectors_that_are_not_finite_are_an_error(kind: str, task: Task, tmp_path: Path, monkeypatch):
    def broken(texts: list[str], _: Any) -> np.ndarray:
        return np.full((len(texts), 4), np.nan, np.float32)

    if kind == "search":  # mteb gives NaN vectors a score like any other
        naive = by_mteb(PlainEncoder(broken), retrieval(task.collection))
        assert 0 <= naive["ndcg_at_10"] < 1 and naive["recall_at_100"] == 1.0
    retriever = tiny_retriever()
    with torch.no_grad():
        next(retriever.encoder.parameters()).fill_(torch.nan)
    tasks = [task] if kind == "search" else [MtebTask(others()[0], "LocalSTS")]
    with pytest.raises(ValueError, match="not finite"):
        scored(monkeypatch, tasks, tmp_path / "out", retriever)
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_every_vector_is_that_of_its_text(task: Task, monkeypatch, tmp_path: Path):
    """mteb believes any order: vectors sorted by length, and not put back, get another score and no error."""
    retriever = tiny_retriever()

    def unsorted(texts: list[str], kind: Any) -> np.ndarray:
        return embed_texts(retriever, sorted(texts, key=len), kind)

    right = by_mteb(PlainEncoder(lambda texts, kind: embed_texts(retriever, texts, kind)), retrieval(task.collection))
    naive = by_mteb(PlainEncoder(unsorted), retrieval(task.collection))
    assert abs(naive["ndcg_at_10"] - right["ndcg_at_10"]) > 0.05
    ours = scored(monkeypatch, [task], tmp_path / "out", retriever)["small:test"]
    assert ours["ndcg_at_10"] == pytest.approx(right["ndcg_at_10"], abs=1e-5)
    texts = list(task.collection.documents.values())
    alone = np.concatenate([embed_texts(retriever, [text], "passage") for text in texts])
    assert np.abs(embed_texts(retriever, texts, "passage", tokens_per_batch=64) - alone).max() < 1e-5


def test_too_few_vectors_are_an_error():
    """mteb's classification takes the vectors that are there; with labels beyond them it fails far from the cause."""
    local = next(t for t in others() if isinstance(t, LocalClassification))
    short = MtebEncoder("a/b", "1", embed=lambda *request: np.zeros((len(request[-1]) - 1, 4)), cosine=True)
    with pytest.raises(IndexError):
        by_mteb(PlainEncoder(lambda texts, _: np.zeros((len(texts) - 1, 4))), local)
    with pytest.raises(ValueError, match=r"LocalClassification: \d+ vectors came back for \d+ texts"):
        by_mteb(short, local)  # pyright: ignore[reportArgumentType]


# --------------------------------------------------------------------------- caches


def test_no_score_of_other_weights_is_taken_from_a_cache(task: Task, tmp_path: Path, monkeypatch):
    first, second = tiny_retriever(), other_weights(tiny_retriever())
    encoders = [PlainEncoder(lambda texts, kind, r=r: embed_texts(r, texts, kind)) for r in (first, second)]
    cache = ResultCache(tmp_path / "cache")
    naive = [by_mteb(encoder, retrieval(task.collection), cache)["ndcg_at_10"] for encoder in encoders]
    assert (
        naive[1] == pytest.approx(naive[0], abs=1e-5) and encoders[1].calls == 0
    )  # one name and revision: the first one's score again
    truth = [by_mteb(encoder, retrieval(task.collection), cache, "always")["ndcg_at_10"] for encoder in encoders]
    assert abs(truth[0] - truth[1]) > 0.01

    tasks = [task, MtebTask(others()[0], "LocalSTS")]
    ours, revisions = [], []
    for retriever in (first, second):  # into one folder
        ours.append(scored(monkeypatch, tasks, tmp_path / "out", retriever))
        revisions.append(json.loads((tmp_path / "out" / "metrics.json").read_text())["system"]["checkpoint"])
    assert [found["small:test"]["ndcg_at_10"] for found in ours] == pytest.approx(truth, abs=1e-5)
    assert ours[0]["LocalSTS"] != ours[1]["LocalSTS"] and revisions[0] != revisions[1]


def test_no_score_of_other_data_is_taken_from_a_cache(task: Task, tmp_path: Path, monkeypatch):
    retriever = tiny_retriever()
    encoder = PlainEncoder(lambda texts, kind: embed_texts(retriever, texts, kind))
    other = task.collection._replace(qrels={query: {"d0": 1} for query in task.collection.queries})
    cache = ResultCache(tmp_path / "cache")
    before = by_mteb(encoder, retrieval(task.collection), cache)["ndcg_at_10"]
    again = retrieval(other)
    again.metadata = again.metadata.model_copy(update={"dataset": {"path": "local", "revision": "2"}})
    assert by_mteb(encoder, again, cache)["ndcg_at_10"] == pytest.approx(
        before, abs=1e-5
    )  # the score of the first data
    whole = scored(monkeypatch, [task], tmp_path / "out", retriever)["small:test"]
    changed = scored(monkeypatch, [task._replace(collection=other)], tmp_path / "out", retriever)["small:test"]
    assert changed["ndcg_at_10"] < whole["ndcg_at_10"] - 0.05


# --------------------------------------------------------------------------- judgements and ids


def same_ids(task: Task, shift: int) -> Task:
    """Queries named as documents: as their relevant ones (0), or as others."""
    name = {query: f"d{int(query[1:]) + shift}" for query in task.collection.queries}
    _, documents, queries, qrels = task.collection
    renamed = Collection(
        "small:test",
        documents,
        {name[query]: text for query, text in queries.items()},
        {name[query]: dict(grades) for query, grades in qrels.items()},
    )
    return task._replace(collection=renamed)


def test_documents_with_the_querys_id_are_kept_or_dropped_as_a_setting_says(task: Task, tmp_path: Path, monkeypatch):
    clash = same_ids(task, 0)
    local = retrieval(clash.collection)
    encoder = PlainEncoder(lambda texts, kind: embed_texts(tiny_retriever(), texts, kind))
    kept = by_mteb(encoder, local)
    local = retrieval(clash.collection)
    local.ignore_identical_ids = True
    dropped = by_mteb(encoder, local)
    assert dropped["recall_at_100"] == kept["recall_at_100"] / 2  # in silence: each query's best document is gone
    with pytest.raises(RecipeError, match="would take relevant ones from 6 queries"):
        scored(monkeypatch, [clash], tmp_path / "out", identical_ids="drop")
    ours = scored(monkeypatch, [clash], tmp_path / "out", identical_ids="keep")["small:test"]
    assert ours["ndcg_at_10"] == pytest.approx(kept["ndcg_at_10"], abs=1e-5)

    official = same_ids(task, 1)._replace(ignore_identical_ids=True)  # as ArguAna: the query's own text is a document
    for how, expected in (("task", 6), ("drop", 6), ("keep", 0)):
        scored(monkeypatch, [official], tmp_path / "out", identical_ids=how)
        row = json.loads((tmp_path / "out" / "metrics.json").read_text())["collections"]["small:test"]
        assert (row["identical_ids_dropped"], row["ignore_identical_ids"]) == (expected, how != "keep")


def test_a_query_whose_judgements_are_all_zero_stays_in_the_mean(task: Task, tmp_path: Path, monkeypatch):
    first = next(iter(task.collection.qrels))
    qrels = task.collection.qrels | {first: dict.fromkeys(task.collection.qrels[first], 0)}
    zero = task._replace(collection=task.collection._replace(qrels=qrels))
    theirs = by_mteb(
        PlainEncoder(lambda texts, kind: embed_texts(tiny_retriever(), texts, kind)), retrieval(zero.collection)
    )
    ours = scored(monkeypatch, [zero], tmp_path / "out")["small:test"]
    per_query = json.loads((tmp_path / "out" / "per_query.json").read_text())["small:test"]["ndcg_at_10"]
    assert per_query[first] == 0.0 and len(per_query) == 6
    assert ours["ndcg_at_10"] == pytest.approx(theirs["ndcg_at_10"], abs=1e-5)
    naive = np.mean([value for query, value in per_query.items() if query != first])
    assert naive > ours["ndcg_at_10"] * 1.1  # the mean over queries with something to find


# --------------------------------------------------------------------------- BRIGHT


def write_bright(folder: Path) -> Path:
    """One domain of BRIGHT as on the hub: d0 is as the query, and the query may not find it."""
    folder.mkdir()
    rows = {
        "documents": [
            {"id": f"d{i}", "content": text} for i, text in enumerate(["w1 w2 w3", "w1 w2 w3 w9", "w50 w60 w61"])
        ],
        "examples": [
            {"id": "q0", "query": "w1 w2 w3", "gold_ids": ["d1"], "excluded_ids": ["d0"]},
            {"id": "q1", "query": "w50 w60 w61", "gold_ids": ["d2"], "excluded_ids": ["N/A"]},
        ],
    }
    lines = ["---", "configs:"]
    for name, part in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        lines += [f"- config_name: {name}", "  data_files:", "  - split: pony", f"    path: {name}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


@pytest.mark.parametrize("system", ["dense", "bm25"])
def test_excluded_documents_of_bright_are_not_found(system: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    suite = f"BrightPonyRetrieval={write_bright(tmp_path / 'bright')}"

    def first(task: Task | None) -> tuple[float, dict[str, float]]:
        if task is not None:
            monkeypatch.setattr(evaluation, "load_suite", lambda name: [task])
        if system == "dense":
            retriever = tiny_retriever(query_prefix="", passage_prefix="")
            found = evaluate(retriever, [suite], tmp_path / "out", label="", step=None)
        else:
            found = evaluate_bm25([suite], tmp_path / "out")
        per_query = json.loads((tmp_path / "out" / "per_query.json").read_text())["BrightPonyRetrieval"]
        return found["BrightPonyRetrieval"]["ndcg_at_10"], per_query["mrr_at_10"]

    (task,) = load_suite(suite)
    assert isinstance(task, Task) and task.candidates is not None
    assert task.candidates["q0"] == ["d1", "d2"]
    ndcg, ranks = first(None)
    assert ndcg == 1.0 and ranks == {"q0": 1.0, "q1": 1.0}
    naive, ranks = first(task._replace(candidates=None))  # as the tasks of mteb's first version
    assert naive < 1.0 and ranks == {"q0": 0.5, "q1": 1.0}


def test_the_first_version_of_bright_is_warned_of(monkeypatch, capsys):
    monkeypatch.setattr("eval.mteb_tasks.load_task", lambda task, folder: [])
    for name, warned in (("bright", False), ("BRIGHT(v1.1)", False), ("BrightRetrieval", True), ("BRIGHT", True)):
        list(load_suite(name))
        assert ("lets queries find the documents they are to leave out" in capsys.readouterr().err) == warned


def test_prompts_in_mtebs_metadata_are_not_put_before_texts(tmp_path: Path, monkeypatch):
    """What stands before a text is what the export or the recipe says; BRIGHT's prompts in mteb were wrong once."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    suite = f"BrightPonyRetrieval={write_bright(tmp_path / 'bright')}"
    assert mteb.get_task("BrightPonyRetrieval").metadata.prompt  # there is one
    seen: list[tuple[str, str]] = []

    def record(retriever: Retriever, texts: dict[str, str], kind: Any, *more: Any, **settings: Any) -> Any:
        prefixes = {"query": retriever.settings.query_prefix, "passage": retriever.settings.passage_prefix}
        seen.append((prefixes[kind], next(iter(texts.values()))))
        return encode(retriever, texts, kind, *more, **settings)

    monkeypatch.setattr(evaluation, "encode", record)
    evaluate(tiny_retriever(), [suite], tmp_path / "out", label="", step=None)
    assert seen == [("w1 ", "w1 w2 w3"), ("w0 ", "w1 w2 w3")]
    seen.clear()
    changes = EvalSettings(prompts={"BrightPonyRetrieval": "w5 "})
    evaluate(tiny_retriever(), [suite], tmp_path / "out", label="", step=None, changes=changes)
    assert seen == [("w5 ", "w1 w2 w3"), ("w5 ", "w1 w2 w3")]
