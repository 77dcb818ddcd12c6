"""Exact top-k by inner product over vectors in memory or on disk. Called by evaluation, preparation and mining.

A first pass in fp32 keeps more than k rows a query: faiss on the CPU; on CUDA its GPU build where that is installed,
else blocks of torch. They are scored again in fp64, and the error bound of fp32 tells whether a row that was left out
could be among the k best; where it could, a second pass in fp64 decides. A rank searches its share of the shards.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from toolkit.collectives import rank, world_size
from toolkit.retrieval.vectors import Shard, Vectors, blocks, gather_rows, take_rows

MARGIN = 128  # rows beyond k that the first pass keeps
BLOCK_BYTES = 2**27  # of vectors looked at together
QUERY_BLOCK, QUERIES = 256, 8192  # that a block of vectors meets at a time; that one pass over the vectors serves
PAIR_BYTES = 2**22  # of vectors scored again together: what fits into a cache
GPU_ROWS = 2048  # most that faiss's GPU build finds for a query

# The k best rows in fp32: scores [q, k], rows int64 [q, k] counted through the shards, and the largest norm.
FirstPass = Callable[[np.ndarray, list[Shard], int], tuple[np.ndarray, np.ndarray, float]]


def top_k(queries: np.ndarray, documents: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The documents with the largest inner products, best first; equal scores are ordered by index.

    Args:
        queries: fp32 [q, dim].
        documents: fp32 or fp16 [n, dim].
        k: results per query; min(k, n) are returned.

    Returns:
        scores fp32 [q, min(k, n)], indices int64 [q, min(k, n)]: those of inner products in fp64.

    Raises:
        ValueError: if the widths differ, there is no document or k < 1.
        ImportError: if faiss is damaged or, on a machine without CUDA, missing; says how to install it.
    """
    shards = [Shard(np.arange(len(documents)), documents)]
    _check(queries, shards, k)
    scores, indices = _best_rows(queries, shards, k)
    return scores.astype(np.float32), indices


def search(queries: np.ndarray, vectors: Vectors, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`top_k` over the texts of an encoding, which may be larger than memory; every rank calls it with all queries.

    Each rank reads its share of the shards, and gets the result for all queries.
    """
    _check(queries, vectors.shards, k)
    own = vectors.shards[rank() :: world_size()]
    width = min(k, sum(len(shard.numbers) for shard in vectors.shards))
    parts = []
    scores, numbers = _best_rows(queries, own, k)
    for start in range(0, max(1, len(queries)), QUERY_BLOCK):
        some = slice(start, start + QUERY_BLOCK)
        merged = _merged(_padded(scores[some], width, -np.inf), _padded(numbers[some], width, -1), width)
        parts.append(_with_copies(*merged, vectors.first, k))
    scores, indices = (np.concatenate(part) for part in zip(*parts, strict=True))
    return scores.astype(np.float32), indices


def search_among(
    queries: np.ndarray, vectors: Vectors, candidates: list[np.ndarray], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each query the best of its own candidates (rising numbers of texts), as `top_k`; no rank waits for another.

    Returns:
        scores fp32 [q, min(k, texts)], indices int64 [q, min(k, texts)]; places without a candidate: 0 and -1.
    """
    k = min(k, len(vectors.first))
    scores, indices = np.zeros((len(queries), k), np.float32), np.full((len(queries), k), -1)
    for row, allowed in enumerate(candidates):
        products = _exact_scores(queries[row : row + 1], vectors.shards, vectors.row[allowed][None])[0]
        chosen = best(products, k)
        scores[row, : len(chosen)], indices[row, : len(chosen)] = products[chosen], allowed[chosen]
    return scores, indices


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest of [n] scores, best first; equal scores are ordered by index."""
    chosen = np.arange(len(scores))
    if k < len(scores):
        limit = np.partition(scores, -k)[-k]
        above = np.flatnonzero(scores > limit)
        chosen = np.concatenate([above, np.flatnonzero(scores == limit)[: k - len(above)]])
    return chosen[np.lexsort((chosen, -scores[chosen]))]


def _check(queries: np.ndarray, shards: list[Shard], k: int) -> None:
    documents = shards[0].vectors
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise ValueError(f"queries {queries.shape} and documents {documents.shape} are not matrices of one width")
    if k < 1 or not len(documents):
        raise ValueError(f"nothing to find: k = {k}, {len(documents)} documents")


# --------------------------------------------------------------------------- one rank's rows


def _best_rows(queries: np.ndarray, shards: list[Shard], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best rows, equal scores by number: scores fp64 [q, min(k, rows)], numbers of their texts int64."""
    rows = sum(len(shard.numbers) for shard in shards)
    k, wanted = min(k, rows), min(k + MARGIN, rows)
    if not (rows and len(queries)):
        return np.empty((len(queries), k)), np.empty((len(queries), k), np.int64)
    if len(queries) > QUERIES:
        parts = [_best_rows(queries[i : i + QUERIES], shards, k) for i in range(0, len(queries), QUERIES)]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    numbers = np.concatenate([shard.numbers for shard in shards])
    queries = np.ascontiguousarray(queries, np.float32)
    rough, found, norm = _first_pass(wanted, torch.cuda.is_available())(queries, shards, wanted)
    scores = _exact_scores(queries, shards, found)
    found = numbers[found]
    order = np.lexsort((found, -scores), axis=1)[:, :k]
    scores, found = np.take_along_axis(scores, order, 1), np.take_along_axis(found, order, 1)
    if wanted < rows:
        unsure = np.flatnonzero(rough.min(1) + _error(queries, norm, np.float32) >= scores[:, -1])
        if len(unsure):
            scores[unsure], found[unsure] = _second(queries[unsure], shards, numbers, k, norm)
    return scores, found


def _error(queries: np.ndarray, norm: float, dtype: type[np.floating]) -> np.ndarray:
    """Most that an inner product of [q] queries with a vector of at most `norm` is off, summed in any order.

    Higham, Accuracy and Stability of Numerical Algorithms, section 3.1; the norm itself is rounded, too.
    """
    unit = np.finfo(dtype).eps / 2
    return (queries.shape[1] + 8) * unit * np.linalg.norm(queries.astype(np.float64), axis=1) * norm * 1.001


def _first_pass(k: int, cuda: bool) -> FirstPass:
    """Who searches for k rows a query."""
    if not cuda:
        return _first_faiss
    if k > GPU_ROWS or find_spec("faiss") is None:
        return _first_torch
    return _first_faiss_gpu if faiss_module().get_num_gpus() > 0 else _first_torch  # the CPU's build counts none


def faiss_module() -> Any:
    """The faiss module; ImportError, with the fix, where it is missing or damaged."""
    try:
        import faiss  # here, since its absence is told only to those who search with it
    except (ImportError, RuntimeError) as error:  # RuntimeError: a GPU build without NVIDIA's libraries
        raise ImportError(
            f'faiss cannot be imported ({error}); pip install "toolkit[cpu]", or "toolkit[gpu]" on a machine with CUDA'
        ) from error
    return faiss


def _first_faiss(queries: np.ndarray, shards: list[Shard], k: int) -> tuple[np.ndarray, np.ndarray, float]:
    faiss = faiss_module()
    return _in_a_heap(
        queries, shards, k, lambda block, few: faiss.knn(queries, block, few, metric=faiss.METRIC_INNER_PRODUCT)
    )


def _first_faiss_gpu(queries: np.ndarray, shards: list[Shard], k: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Products of fp32 vectors are fp32's: faiss 1.15 gives cuBLAS a math mode without TF32, and cuVS is not asked."""
    faiss, device = faiss_module(), torch.cuda.current_device()
    torch.cuda.empty_cache()  # what training has left in torch's pool is not there for faiss
    resources, metric = faiss.StandardGpuResources(), faiss.METRIC_INNER_PRODUCT
    return _in_a_heap(
        queries,
        shards,
        k,
        lambda block, few: faiss.knn_gpu(resources, queries, block, few, metric=metric, device=device, use_cuvs=False),
    )


def _in_a_heap(
    queries: np.ndarray,
    shards: list[Shard],
    k: int,
    knn: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, float]:
    """A first pass by a search of one block of vectors."""
    heap, largest = faiss_module().ResultHeap(len(queries), k, keep_max=True), 0.0
    for before, block in blocks(shards, _rows(BLOCK_BYTES, queries, np.float32), np.float32):
        scores, rows = knn(block, min(k, len(block)))
        heap.add_result(scores, rows + before)
        largest = max(largest, float(np.einsum("ij,ij->i", block, block).max()))
    heap.finalize()
    return heap.D, heap.I, largest**0.5


def _first_torch(queries: np.ndarray, shards: list[Shard], k: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Blocks of vectors cross the bus once; the running k best stay on the device."""
    device = _device()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # the error bound is that of fp32
    best_scores = torch.zeros((len(queries), 0), device=device)
    best_rows = torch.zeros((len(queries), 0), dtype=torch.int64, device=device)
    on_device, largest = torch.from_numpy(queries).to(device), 0.0
    for before, vectors in blocks(shards, _rows(BLOCK_BYTES, queries, np.float32), np.float32):
        block = torch.from_numpy(vectors).to(device).T  # [dim, block]
        columns = torch.arange(before, before + block.shape[1], device=device)
        largest = max(largest, float(block.square().sum(0).max()))
        parts = []
        for start in range(0, len(queries), QUERY_BLOCK):
            some = slice(start, start + QUERY_BLOCK)
            scores = torch.cat([best_scores[some], on_device[some] @ block], dim=1)
            rows = torch.cat([best_rows[some], columns.expand(len(scores), -1)], dim=1)
            kept, at = scores.topk(min(k, scores.shape[1]), dim=1)
            parts.append((kept, rows.gather(1, at)))
        best_scores, best_rows = (torch.cat(part) for part in zip(*parts, strict=True))
    torch.set_float32_matmul_precision(precision)
    return best_scores.cpu().numpy(), best_rows.cpu().numpy(), largest**0.5


def _second(
    queries: np.ndarray, shards: list[Shard], numbers: np.ndarray, k: int, norm: float
) -> tuple[np.ndarray, np.ndarray]:
    """The k best rows in fp64, for queries whose scores lie closer together than fp32 can tell, or are equal."""
    device = _device()
    wide, off = torch.from_numpy(queries).double(), 4 * _error(queries, norm, np.float64)
    scores = [np.empty(0)] * len(queries)
    found = [np.empty(0, np.int64)] * len(queries)
    for before, block in blocks(shards, _rows(BLOCK_BYTES, queries, np.float64), np.float64):
        there = torch.from_numpy(block).to(device)
        for start in range(0, len(queries), QUERY_BLOCK):
            products = (wide[start : start + QUERY_BLOCK].to(device) @ there.T).cpu().numpy()
            for query, row in enumerate(products, start):
                limit = scores[query][-1] if len(scores[query]) == k else -np.inf
                if k <= len(row):
                    limit = max(limit, np.partition(row, -k)[-k])
                near = np.flatnonzero(row >= limit - off[query])
                exact = _products(block[near], np.broadcast_to(wide[query].numpy(), (len(near), block.shape[1])))
                both = np.concatenate([scores[query], exact])
                names = np.concatenate([found[query], numbers[before + near]])
                order = np.lexsort((names, -both))[:k]
                scores[query], found[query] = both[order], names[order]
    return np.stack(scores), np.stack(found)


def _exact_scores(queries: np.ndarray, shards: list[Shard], rows: np.ndarray) -> np.ndarray:
    """Inner products in fp64 of each query with rows of its own: [q, n], rows counted through the shards [q, n]."""
    scores, wide = np.empty(rows.size), queries.astype(np.float64)
    for places, vectors in take_rows(shards, rows.ravel(), _rows(PAIR_BYTES, queries, np.float64)):
        scores[places] = _products(vectors.astype(np.float64), wide[places // rows.shape[1]])
    return scores.reshape(rows.shape)


def _products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner products of rows in fp64; unlike in a matrix product, equal rows give equal bits wherever they stand."""
    return np.einsum("ij,ij->i", a, b)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _rows(size: int, queries: np.ndarray, dtype: type[np.floating]) -> int:
    """Vectors that fit into `size` bytes."""
    return max(1, size // (queries.shape[1] * np.dtype(dtype).itemsize))


# --------------------------------------------------------------------------- over ranks and copies


def _padded(x: np.ndarray, width: int, value: float) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=value)


def _merged(scores: np.ndarray, numbers: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of what all ranks found for the same queries: [q, k] each."""
    shape = (world_size(), *scores.shape)
    scores, numbers = (np.hstack(list(gather_rows(part).reshape(shape))) for part in (scores, numbers))
    order = np.lexsort((numbers, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(numbers, order, 1)


def _with_copies(scores: np.ndarray, numbers: np.ndarray, first: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows -> texts: identical texts share a row, and stand behind one another by number: [q, min(k, texts)] each."""
    texts = np.argsort(first, kind="stable")
    if (first[texts] == texts).all():
        return scores, numbers
    k = min(k, len(first))
    start, end = (np.searchsorted(first[texts], numbers, side=side) for side in ("left", "right"))
    found_scores, found = np.empty((len(scores), k)), np.empty((len(scores), k), np.int64)
    for row in range(len(scores)):
        copies = end[row] - start[row]
        names = np.concatenate([texts[a:b] for a, b in zip(start[row], end[row], strict=True)])
        repeated = np.repeat(scores[row], copies)
        order = np.lexsort((names, -repeated))[:k]
        found_scores[row], found[row] = repeated[order], names[order]
    return found_scores, found
