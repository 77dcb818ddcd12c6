"""Sparse vectors of BM25 weights: by the formula, with words of the queries alone."""

import math

import numpy as np
import pytest

from toolkit.retrieval.word_vectors import weighted, word_weights

QUERIES = ["light leaf", "leaf water", "stone"]
DOCUMENTS = ["the leaf drinks light light", "water and leaf", "sand sand sand"]


def test_weights_are_those_of_lucene_scaled_to_unit_length():
    weights = word_weights(QUERIES, [DOCUMENTS[:2], DOCUMENTS[2:]], "none")
    assert list(weights.place) == ["light", "leaf", "water", "stone"]
    assert weights.mean_length == pytest.approx((5 + 3 + 3) / 3)
    for word, holding in {"light": 1, "leaf": 2, "water": 1, "stone": 0}.items():
        assert weights.idf[weights.place[word]] == pytest.approx(math.log(1 + (3 - holding + 0.5) / (holding + 0.5)))
    found = weighted(DOCUMENTS + QUERIES, weights).toarray()
    saturation = 0.9 * (1 - 0.4 + 0.4 * 5 / weights.mean_length)
    expected = np.array([weights.idf[0] * 2 / (2 + saturation), weights.idf[1] / (1 + saturation), 0, 0])
    assert np.allclose(found[0], expected / np.linalg.norm(expected))
    assert np.allclose(np.linalg.norm(found, axis=1), [1, 1, 0, 1, 1, 1])  # "sand" is in no query


@pytest.mark.parametrize(
    ("queries", "documents", "side"), [(["?"], ["a word"], "query"), (["word"], ["!"], "document")]
)
def test_without_a_word_there_is_nothing_to_weigh(queries: list[str], documents: list[str], side: str):
    with pytest.raises(ValueError, match=f"^no {side} has a word$"):
        word_weights(queries, [documents], "none")
