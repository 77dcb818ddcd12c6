"""TREC run files: what another program reads from them, ids that would break a column, and the texts kept beside."""

import json
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from beir import write_beir
from retrievers import tiny_retriever

from eval.evaluate import evaluate, evaluate_bm25
from eval.scores import Run, as_run
from eval.suites import load_suite
from eval.trec import SHOWN, first_words, keep_rankings, read_top, write_rankings
from toolkit.data.records import Collection


def read_trec(path: Path) -> Run:
    """As any program reads it: six columns between white space."""
    found: Run = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        query, zero, document, place, score, _ = line.split()
        assert zero == "Q0"
        found.setdefault(query, {})[document] = float(score)
        assert int(place) == len(found[query])
    return found


@pytest.mark.parametrize("system", ["dense", "bm25"])
def test_the_run_file_gives_the_scores_of_the_evaluation(system: str, tmp_path: Path):
    suite = str(write_beir(tmp_path / "small"))
    if system == "dense":
        evaluate(tiny_retriever(), [suite], tmp_path / "out", label="a b", step=None)
    else:
        evaluate_bm25([suite], tmp_path / "out")
    path = tmp_path / "out" / "rankings" / "small_test.trec"
    found = read_trec(path)
    (task,) = load_suite(suite)
    evaluator = pytrec_eval.RelevanceEvaluator(task.collection.qrels, {"ndcg_cut.10"})
    scores = {query: row["ndcg_cut_10"] for query, row in evaluator.evaluate(found).items()}
    written = json.loads((tmp_path / "out" / "per_query.json").read_text())["small:test"]["ndcg_at_10"]
    assert scores == written and len(written) == 6
    reversed_run = {query: {d: -score for d, score in ranking.items()} for query, ranking in found.items()}
    assert {query: row["ndcg_cut_10"] for query, row in evaluator.evaluate(reversed_run).items()} != written
    assert {line.split()[-1] for line in path.read_text().splitlines()} == {"a_b" if system == "dense" else "BM25"}


def test_a_hundred_documents_in_the_order_of_trec_eval():
    """Ties by descending id, as trec_eval breaks them: the rank that is written is the rank that counts."""
    ids = [f"d{i:03}" for i in range(150)]
    scores = np.repeat(np.float32([0.5, 0.25]), 75)[None]
    (ranking,) = keep_rankings(collection(["q"], ids), as_run(["q"], ids, scores, np.arange(150)[None])).run.values()
    assert list(ranking) == [*sorted(ids[:75], reverse=True), *sorted(ids[75:], reverse=True)[:25]]


def collection(queries: list[str], documents: list[str]) -> Collection:
    return Collection(
        "c", {d: f"text of {d}" for d in documents}, {q: f"about {q}" for q in queries}, {q: {} for q in queries}
    )


def test_scores_keep_all_bits_of_fp32(tmp_path: Path):
    scores = np.float32([[1 / 3, np.nextafter(np.float32(1 / 3), np.float32(0)), 1e-30, -12345.678]])
    kept = keep_rankings(collection(["q"], list("abcd")), as_run(["q"], list("abcd"), scores, np.arange(4)[None]))
    write_rankings(tmp_path, "c", kept, "x")
    assert [np.float32(score) for score in read_trec(tmp_path / "c.trec")["q"].values()] == scores[0].tolist()
    assert len(set(read_trec(tmp_path / "c.trec")["q"].values())) == 4


def test_white_space_in_ids_is_encoded(tmp_path: Path):
    queries, documents = ["q 1", "q\u30002"], ["New York", "a\tb", "100%", "a%20b"]
    run = {query: {document: 1.0 - i for i, document in enumerate(documents)} for query in queries}
    write_rankings(tmp_path, "c", keep_rankings(collection(queries, documents), run), "two words")
    found = read_trec(tmp_path / "c.trec")  # six columns a line
    assert list(found) == ["q%201", "q%E3%80%802"]
    assert list(found["q%201"]) == ["New%20York", "a%09b", "100%", "a%20b"]
    top = read_top(tmp_path, "c")
    assert top is not None and top.ranked["q 1"][0] == ("New York", 0)  # there ids stay as they are
    twice = keep_rankings(collection(["q"], ["a b", "a%20b"]), {"q": {"a b": 1.0, "a%20b": 0.5}})
    with pytest.raises(ValueError, match="two ids differ in white space"):
        write_rankings(tmp_path, "d", twice, "x")


def test_what_readers_see_of_a_ranking(tmp_path: Path):
    documents = [f"d{i}" for i in range(20)]
    data = collection(["q"], documents)._replace(qrels={"q": {"d2": 3, "d3": 0, "d19": 1}})
    write_rankings(tmp_path, "c", keep_rankings(data, {"q": {d: -float(i) for i, d in enumerate(documents)}}), "x")
    top = read_top(tmp_path, "c")
    assert top is not None
    assert top.ranked == {"q": [("d0", 0), ("d1", 0), ("d2", 3), ("d3", 0), ("d4", 0)]}
    assert top.documents == {d: f"text of {d}" for d in documents[:SHOWN]} and top.queries == {"q": "about q"}
    assert read_top(tmp_path, "other") is None


def test_first_words():
    assert first_words("  a\n  b\tc ", 10) == "a b c"
    assert first_words("one two three four", 12) == "one two…"
    assert first_words("x" * 30, 12) == "x" * 11 + "…"
    assert first_words("ab " + "x" * 30, 12) == "ab xxxxxxxx…"
