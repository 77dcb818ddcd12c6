"""Exact search against a plain fp64 sort."""

import sys

import numpy as np
import pytest
import torch

from toolkit import search
from toolkit.search import best, top_k


@pytest.fixture(params=["faiss", "torch"], autouse=True)
def library(request, monkeypatch):
    """Each test runs on both ways to search; torch's, meant for CUDA, runs here on the CPU in small blocks."""
    if request.param == "torch":
        monkeypatch.setattr(search, "DOCUMENT_BLOCK", 37)
        monkeypatch.setattr(search, "QUERY_BLOCK", 8)
        in_blocks = search._search_torch
        monkeypatch.setattr(search, "_search_faiss", lambda q, d, k: in_blocks(q, d, k, device="cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def plain(queries: np.ndarray, documents: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    products = queries.astype(np.float64) @ documents.astype(np.float64).T
    order = np.argsort(-products, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(products, order, 1), order


@pytest.mark.parametrize(
    ("num_queries", "num_documents", "k"), [(300, 5000, 10), (3, 40, 39), (3, 40, 40), (2, 7, 100)]
)
def test_equals_a_plain_sort(num_queries: int, num_documents: int, k: int):
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(num_queries, 32)).astype(np.float32)
    documents = rng.normal(size=(num_documents, 32)).astype(np.float32)
    scores, indices = top_k(queries, documents, k)
    expected_scores, expected = plain(queries, documents, k)
    assert (scores.dtype, indices.dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 7, 50])
def test_ties_are_ordered_by_index(k: int):
    """Small integers are exact in fp32: about 400 documents share 7 scores, so that k cuts through a tie."""
    rng = np.random.default_rng(1)
    documents = rng.integers(-1, 2, size=(400, 3)).astype(np.float32)
    queries = rng.integers(-1, 2, size=(20, 3)).astype(np.float32)
    scores, indices = top_k(queries, documents, k)
    expected_scores, expected = plain(queries, documents, k)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(scores, expected_scores)


def test_no_queries():
    scores, indices = top_k(np.empty((0, 4), np.float32), np.ones((9, 4), np.float32), 5)
    assert scores.shape == indices.shape == (0, 5)


def test_best_of_one_row():
    assert best(np.array([1.0, 3.0, 2.0, 3.0, 3.0]), 2).tolist() == [1, 3]
    assert best(np.array([1.0, 3.0, 2.0, 3.0, 3.0]), 4).tolist() == [1, 3, 4, 2]
    assert best(np.array([1.0, 1.0]), 9).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("queries", "documents", "k", "message"),
    [((2, 4), (3, 5), 1, "one width"), ((2, 4), (0, 4), 1, "0 documents"), ((2, 4), (3, 4), 0, "k = 0")],
)
def test_wrong_shapes(queries: tuple[int, int], documents: tuple[int, int], k: int, message: str):
    with pytest.raises(ValueError, match=message):
        top_k(np.ones(queries, np.float32), np.ones(documents, np.float32), k)


@pytest.mark.parametrize("library", ["faiss"], indirect=True)
def test_missing_faiss_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r'pip install "toolkit\[cpu\]", or "toolkit\[gpu\]"'):
        top_k(np.ones((1, 2), np.float32), np.ones((3, 2), np.float32), 1)
