"""Whether scores have the order of the grades: Kendall's tau-b against pairs counted one by one, ties, and searches."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from tiny_retriever import CASES, make

from toolkit.generate.graded_files import Sampled
from toolkit.generate.order import bm25_of, check_search, order_of, retriever_of
from toolkit.generate.queries import Query
from toolkit.recipe.errors import RecipeError


def sampled(query: str, *texts: str) -> Sampled:
    passages = [{"grade": grade, "text": text, "seed": 1} for grade, text in zip((3, 2, 1, 0), texts, strict=True)]
    return Sampled(Query(query, query), {"passages": passages})


def plain_tau(scores: np.ndarray) -> float:
    """tau-b without a library: pairs in order less pairs turned round, over the root of those that are not tied."""
    signs = [np.sign(first - second) for first, second in combinations(scores, 2)]
    untied = sum(sign != 0 for sign in signs)
    return float(sum(signs) / (untied * len(signs)) ** 0.5) if untied else 0.0


def test_tau_and_pairs():
    scores = np.array([[4.0, 3, 2, 1], [1, 2, 3, 4], [0, 0, 0, 0], [2, 2, 1, 0], [3, 1, 2, 0]])
    found = order_of("x", scores, 1)
    taus = [plain_tau(row) for row in scores]
    assert taus[0] == 1 and taus[1] == -1 and taus[2] == 0
    assert found.tau == pytest.approx(np.mean(taus)) and found.undecided == 1 and found.queries == 5
    assert found.agree == pytest.approx((6 + 0 + 0 + 5 + 5) / 30) and found.tied == pytest.approx(7 / 30)
    assert found.low is not None and found.high is not None and -1 <= found.low < found.tau < found.high <= 1
    assert order_of("x", scores, 1) == found and order_of("x", -scores, 1).tau == pytest.approx(-found.tau)
    assert order_of("x", scores[:1], 1)[3:5] == (None, None)


def test_the_interval_is_narrower_for_more_queries():
    scores = np.random.default_rng(1).normal(size=(400, 4)) + np.array([3, 2, 1, 0])
    few, many = order_of("x", scores[:40], 1), order_of("x", scores, 1)
    assert few.low is not None and few.high is not None and many.low is not None and many.high is not None
    assert many.high - many.low < 0.5 * (few.high - few.low)
    assert many.tau == pytest.approx(np.mean([kendalltau((3, 2, 1, 0), row).statistic for row in scores]))


def test_bm25_orders_by_shared_words():
    rows = [
        sampled("red fish swim", "red fish swim well", "red fish eat", "fish are cold", "stones are grey"),
        sampled("old oak trees", "stones are round", "oak leaves fall", "old oak doors", "old oak trees stand"),
    ]
    reading, scores = bm25_of(rows)
    assert reading == "english" and scores.shape == (2, 4)
    assert list(np.argsort(-scores[0])) == [0, 1, 2, 3] and list(np.argsort(scores[1])) == [0, 1, 2, 3]
    assert order_of("bm25", scores, 1).agree == 0.5


def test_a_retriever_scores_its_query_s_own_passages(tmp_path: Path):
    export = make(CASES["bert_full"], tmp_path / "base").write(tmp_path / "export")
    rows = [sampled(f"query {i}", *(f"passage {i} {grade} of some words" for grade in range(4))) for i in range(3)]
    scores = retriever_of(str(export), rows, torch.device("cpu"))
    alone = retriever_of(str(export), rows[1:2], torch.device("cpu"))
    assert scores.shape == (3, 4)
    np.testing.assert_allclose(scores[1:2], alone, atol=1e-5)
    check_search(str(export))
    check_search("bm25")
    check_search("owner/model")
    for wrong in (str(tmp_path), str(tmp_path / "none"), "a/b/c", str(tmp_path / "base")):
        with pytest.raises(RecipeError, match="is no retriever that says how it embeds; name an export"):
            check_search(wrong)
