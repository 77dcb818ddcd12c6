"""Exact search against a plain fp64 sort."""

import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from distributed import run_on_ranks

from toolkit.retrieval import search
from toolkit.retrieval.search import best, search_among, top_k
from toolkit.retrieval.vectors import Shard, Vectors, open_shard, save_shard


class Gpu:
    """Stands in for faiss's GPU build: the same call, answered by the CPU's search of what `seen` makes of vectors."""

    def __init__(self) -> None:
        self.calls = 0
        self.seen: Callable[[np.ndarray], np.ndarray] = lambda vectors: vectors

    def knn(self, resources: Any, queries: np.ndarray, block: np.ndarray, k: int, **options: Any) -> tuple:
        assert isinstance(resources, Resources) and k <= min(2048, len(block))
        assert queries.dtype == block.dtype == np.float32 and queries.flags.c_contiguous and block.flags.c_contiguous
        assert options == {"metric": faiss.METRIC_INNER_PRODUCT, "device": 3, "use_cuvs": False}
        self.calls += 1
        return faiss.knn(self.seen(queries), self.seen(block), k, metric=options["metric"])


class Resources:
    pass


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    """The machine has CUDA and faiss's GPU build, so far as the choice of a library sees; tensors stay on the CPU."""
    stand_in = Gpu()
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 4)
    monkeypatch.setattr(faiss, "StandardGpuResources", Resources, raising=False)
    monkeypatch.setattr(faiss, "knn_gpu", stand_in.knn)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    return stand_in


@pytest.fixture(params=["faiss", "torch", "faiss on a GPU"], autouse=True)
def library(request, monkeypatch):
    """Each test runs on all ways to search, in small blocks; those meant for CUDA run here on the CPU."""
    monkeypatch.setattr(search, "BLOCK_BYTES", 37 * 32 * 4)
    monkeypatch.setattr(search, "PAIR_BYTES", 100 * 32 * 8)
    monkeypatch.setattr(search, "QUERY_BLOCK", 8)
    monkeypatch.setattr(search, "QUERIES", 150)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if request.param != "faiss":
        choose = search._first_pass
        monkeypatch.setattr(search, "_first_pass", lambda k, cuda: choose(k, cuda=True))
    if request.param == "faiss on a GPU":
        request.getfixturevalue("gpu")


@pytest.fixture
def decided_in_fp64(monkeypatch) -> list[int]:
    """The numbers of queries that the second pass was asked for."""
    asked, second = [], search._second
    monkeypatch.setattr(
        search, "_second", lambda queries, *rest: (asked.append(len(queries)), second(queries, *rest))[1]
    )
    return asked


def plain(queries: np.ndarray, documents: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    products = queries.astype(np.float64) @ documents.astype(np.float64).T
    order = np.argsort(-products, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(products, order, 1), order


def random(rows: int, seed: int, dim: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)


def in_shards(documents: np.ndarray, first: np.ndarray, parts: int, folder: Path | None = None) -> Vectors:
    """The vectors of texts of which some are copies, the different ones dealt at random."""
    numbers = np.random.default_rng(1).permutation(np.flatnonzero(first == np.arange(len(first))))
    shards = [Shard(part, documents[part]) for part in np.array_split(numbers, parts)]
    for i, shard in enumerate(shards if folder is not None else []):
        save_shard(folder / f"{i}.npy", shard.vectors)
        shards[i] = shard._replace(vectors=open_shard(folder / f"{i}.npy"))
    return Vectors(shards, first)


@pytest.mark.parametrize(
    ("num_queries", "num_documents", "k"), [(300, 5000, 10), (3, 40, 39), (3, 40, 40), (2, 7, 100), (9, 700, 500)]
)
def test_equals_a_plain_sort(num_queries: int, num_documents: int, k: int):
    queries, documents = random(num_queries, 0), random(num_documents, 1)
    scores, indices = top_k(queries, documents, k)
    expected_scores, expected = plain(queries, documents, k)
    assert (scores.dtype, indices.dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=1e-5)
    by_cosine = plain(queries, documents / np.linalg.norm(documents, axis=1, keepdims=True), k)[1]
    rounded = plain(queries, documents.astype(np.float16), k)
    # controls: cosines, and vectors rounded to fp16, give other ids (those of few documents may agree) and scores
    assert num_documents < 40 or (by_cosine != expected).any(1).all()
    assert num_documents < 700 or (rounded[1] != expected).any()
    assert np.abs(rounded[0] - expected_scores).max() > 1e-4


@pytest.mark.parametrize("k", [1, 3, 7, 50])
def test_ties_are_ordered_by_index(k: int, decided_in_fp64: list[int]):
    """Small integers are exact in fp32: about 4,000 documents share 7 scores, so that k cuts through a tie."""
    rng = np.random.default_rng(1)
    documents = rng.integers(-1, 2, size=(4000, 3)).astype(np.float32)
    queries = rng.integers(-1, 2, size=(20, 3)).astype(np.float32)
    scores, indices = top_k(queries, documents, k)
    expected_scores, expected = plain(queries, documents, k)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(scores, expected_scores)
    assert sum(decided_in_fp64) > 10


@pytest.mark.parametrize("margin", [0, 1, 128])
def test_ids_are_those_of_fp64_where_fp32_cannot_tell(margin: int, decided_in_fp64: list[int], monkeypatch):
    """Documents that differ in the last bits only: the control, the same search in fp32, puts others first."""
    monkeypatch.setattr(search, "MARGIN", margin)
    documents = (random(1, 0) + 2e-7 * random(600, 1)).astype(np.float32)
    queries = random(12, 2)
    _, indices = top_k(queries, documents, 20)
    _, expected = plain(queries, documents, 20)
    np.testing.assert_array_equal(indices, expected)
    in_fp32 = np.argsort(-(queries @ documents.T), axis=1, kind="stable")[:, :20]
    assert (in_fp32 != expected).any(1).all()
    assert sum(decided_in_fp64) == 12


def test_the_second_pass_is_for_near_ties_only(decided_in_fp64: list[int]):
    top_k(random(50, 0), random(3000, 1), 100)
    assert decided_in_fp64 == []


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("parts", [1, 9])
def test_shards_on_disk_with_copies(dtype, parts: int, tmp_path: Path):
    """Text 5 is there four times, 7 twice, and 20 has 33's vector without being its copy."""
    first = np.arange(400)
    first[[77, 100, 399]], first[9] = 5, 7
    documents = random(400, 3).astype(dtype)
    documents[33] = documents[20]
    documents = documents[first]
    vectors, queries = in_shards(documents, first, parts, tmp_path), random(30, 4)
    queries[0] = documents[5]
    for k in (1, 3, 30, 396, 400, 1000):
        scores, indices = search.search(queries, vectors, k)
        expected_scores, expected = plain(queries, documents, k)
        np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=1e-5)
        assert indices[0, :4].tolist() == [5, 77, 100, 399][:k]
        # a matrix product rounds equal vectors differently: equal but for the order of copies
        np.testing.assert_array_equal(documents[indices], documents[expected])
        assert all(len(set(row)) == len(row) for row in indices.tolist())
        places = [row.tolist().index for row in indices]
        assert k < 400 or all(p(20) + 1 == p(33) and p(7) + 1 == p(9) for p in places)


def test_candidates_are_searched_alone():
    first = np.arange(300)
    first[200] = 4
    documents = random(300, 5)[first]
    vectors, queries = in_shards(documents, first, 6), random(3, 6)
    allowed = [np.array([2, 4, 200, 250]), np.array([], np.int64), np.arange(300)]
    scores, indices = search_among(queries, vectors, allowed, 50)
    everything = plain(queries, documents, 300)[1]
    for row, numbers in enumerate(allowed):
        expected = [i for i in everything[row].tolist() if i in numbers][:50]
        assert indices[row].tolist() == expected + [-1] * (50 - len(expected))
        np.testing.assert_allclose(scores[row, : len(expected)], documents[expected] @ queries[row], rtol=0, atol=1e-5)
    assert search_among(queries, vectors, allowed, 1000)[1].shape == (3, 300)


@pytest.mark.parametrize("library", ["faiss on a GPU"], indirect=True)
def test_the_gpu_build_is_asked_and_must_be_exact_to_fp32(gpu: Gpu, monkeypatch):
    """Control: by products of TF32, which keep as many bits as fp16, it overlooks the best, and no bound tells."""
    monkeypatch.setattr(search, "MARGIN", 4)
    documents = np.ones((14, 32), np.float32)
    for row in range(13):
        documents[row, :row] += 2**-10  # the last place of fp16
    documents[13] += 0.42 * 2**-10
    queries = np.ones((1, 32), np.float32)
    assert top_k(queries, documents, 1)[1] == plain(queries, documents, 1)[1] == 13
    gpu.seen = lambda vectors: vectors.astype(np.float16).astype(np.float32)
    assert top_k(queries, documents, 1)[1] == 12
    assert gpu.calls == 2


@pytest.mark.parametrize("library", ["torch", "faiss on a GPU"], indirect=True)
@pytest.mark.parametrize(("k", "asked"), [(1920, True), (1921, False)])
def test_the_gpu_build_is_asked_for_at_most_2048_rows(k: int, asked: bool, request, gpu: Gpu, monkeypatch):
    """With the CPU's build, which counts no GPU, or none, torch searches alone; so it does for 1921 + 128 rows."""
    if "torch" in request.node.name:
        asked = False
        monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    queries, documents = random(3, 0), random(2500, 1)
    monkeypatch.setattr(search, "BLOCK_BYTES", documents.nbytes)
    np.testing.assert_array_equal(top_k(queries, documents, k)[1], plain(queries, documents, k)[1])
    assert gpu.calls == asked


@pytest.mark.parametrize("library", ["torch"], indirect=True)
def test_cuda_needs_no_faiss(gpu: Gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    queries, documents = random(3, 0), random(300, 1)
    np.testing.assert_array_equal(top_k(queries, documents, 9)[1], plain(queries, documents, 9)[1])
    monkeypatch.setitem(sys.modules, "faiss", faiss)  # control: the same search with it asks it
    top_k(queries, documents, 9)
    assert gpu.calls == -(-300 // 37)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("library", ["faiss"], indirect=True)
def test_ranks_find_what_one_process_finds(world_size: int, tmp_path: Path):
    """Of 3 shards the last of four ranks has none."""
    answer = run_on_ranks("search_ranks.py", world_size, {"parts": 3, "k": 40}, tmp_path)
    documents, queries = random(200, 7), random(11, 8)
    expected = plain(queries, documents, 40)[1]
    assert answer == [expected.tolist()] * world_size
    parts = np.array_split(np.random.default_rng(0).permutation(200), 3)  # as the worker deals them
    own = np.sort(np.concatenate(parts[::world_size]))
    assert (own[plain(queries, documents[own], 40)[1]] != expected).any(1).all()  # control: one rank's shards alone


@pytest.mark.parametrize("library", ["torch"], indirect=True)
def test_memory_is_that_of_a_block_not_of_the_vectors(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(search, "BLOCK_BYTES", 2**18)
    documents = random(2**15, 9).astype(np.float16)
    vectors, queries = in_shards(documents, np.arange(len(documents)), 40, tmp_path), random(4, 10)
    size = documents.nbytes
    del documents
    taken = []
    for work in (lambda: search.search(queries, vectors, 10), vectors.array):
        tracemalloc.start()
        work()
        taken.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert taken[0] < size / 2 and taken[1] > size  # control: all vectors in memory


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


@pytest.mark.parametrize("library", ["faiss", "faiss on a GPU"], indirect=True)
def test_a_gpu_build_without_its_libraries_says_so(tmp_path: Path, monkeypatch):
    (tmp_path / "faiss.py").write_text("raise RuntimeError('nvidia-cublas-cu12 is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "faiss")
    with pytest.raises(ImportError, match=r"nvidia-cublas-cu12 is missing.*pip install"):
        top_k(np.ones((1, 2), np.float32), np.ones((3, 2), np.float32), 1)
