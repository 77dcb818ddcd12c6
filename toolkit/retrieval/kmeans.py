"""Paired spherical K-means by faiss (CDE, arXiv 2410.02525): clusters of pairs of vectors, read in blocks.

Each pair is two points, [q; d] and [d; q], so that a cluster of queries and one of documents find each other. Called
by prepare_clusters on rank 0. faiss runs on a GPU where its GPU build is installed, else on the CPU.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_array

from toolkit.data.packing import squared_distances
from toolkit.retrieval.search import faiss_module

BLOCK = 2**15  # pairs that are read at a time
_NEAR_BLOCK, _NEAR_MARGIN = 256, 16  # clusters that are compared at a time; rows beyond those asked for
_RESTART = 15_486_557  # what faiss adds to the seed for each start

# Row numbers, rising -> vectors of their queries and documents, fp32 [rows, dim] each.
Read = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
Say = Callable[[str], None]


class Fit(NamedTuple):
    """The best of all starts."""

    centroids: np.ndarray  # fp32 [clusters, 2 dim], unit length
    objective: float  # mean inner product of a point and the centroid nearest to it


def point_bytes(dim: int) -> int:
    """Bytes that K-means holds for each pair it reads: two points of fp32."""
    return 2 * 2 * dim * 4


def place_of_kmeans() -> str:
    """Where K-means runs."""
    return "on a GPU" if faiss_module().get_num_gpus() else "on the CPU"


def paired_kmeans(
    read: Read, rows: np.ndarray, clusters: int, *, iterations: int, restarts: int, seed: int, say: Say
) -> Fit:
    """Centroids of the points of some pairs.

    Points are divided by their norm (both halves together; a pair without any word stays zero) and held once, as fp32:
    `point_bytes` a pair. faiss draws its first centroids from them by the seed, and gives an empty cluster a part of a
    large one. A start ends early where nothing moves any more.

    Args:
        rows: int64 [m], rising: the pairs that are read.
        clusters: at most m.
        say: gets what is being done.

    Raises:
        ValueError: for vectors that are not finite.
    """
    say("reads vectors")
    points = _points(read, rows)
    best: Fit | None = None
    for start in range(restarts):

        def heard(iteration: int, mean: float | None, start: int = start) -> None:
            reached = "" if mean is None else f", mean inner product {mean:.6f}"
            say(f"start {start + 1} of {restarts}, iteration {iteration + 1} of {iterations}{reached}")

        fit = _one_start(points, clusters, iterations, (seed + start * _RESTART) % 2**31, heard)
        if best is None or fit.objective > best.objective:
            best = fit
    assert best is not None
    return best


def _points(read: Read, rows: np.ndarray) -> np.ndarray:
    """[q; d] of all rows, then [d; q] of all rows: fp32 [2 m, 2 dim]."""
    points: Any = None
    for first, query, document in _blocks(read, rows):
        if points is None:
            points = np.empty((2 * len(rows), 2 * query.shape[1]), np.float32)
        forward = joint(query, document)
        if not np.isfinite(forward).all():
            raise ValueError("vectors are not finite")
        points[first : first + len(query)] = forward
        there = points[len(rows) + first : len(rows) + first + len(query)]
        there[:, : query.shape[1]], there[:, query.shape[1] :] = np.split(forward, 2, axis=1)[::-1]
    return points


def joint(query: np.ndarray, document: np.ndarray) -> np.ndarray:
    """[q; d] / |[q; d]|: fp32 [n, 2 dim]; zero where both are."""
    points = np.concatenate([query, document], axis=1, dtype=np.float32)
    norms = np.linalg.norm(points, axis=1, keepdims=True)
    return points / np.where(norms == 0, 1, norms)


def _blocks(read: Read, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    for first in range(0, len(rows), BLOCK):
        yield first, *read(rows[first : first + BLOCK])


def _one_start(
    points: np.ndarray, clusters: int, iterations: int, seed: int, heard: Callable[[int, float | None], None]
) -> Fit:
    """faiss's own K-means, one iteration a call, so that each can be told of."""
    faiss = faiss_module()
    kmeans = faiss.Kmeans(
        points.shape[1],
        clusters,
        niter=1,
        spherical=True,
        seed=seed,
        gpu=min(1, faiss.get_num_gpus()),
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),  # what is read is drawn by the caller
    )
    centroids, mean = None, None
    for iteration in range(iterations):
        heard(iteration, mean)
        before = centroids
        mean = kmeans.train(points, init_centroids=before) / len(points)
        centroids = kmeans.centroids
        if before is not None and np.array_equal(before, centroids):
            break
    assert centroids is not None and mean is not None
    return Fit(centroids, float(mean))


def assign(read: Read, count: int, centroids: np.ndarray, say: Say) -> np.ndarray:
    """The centroid with the largest inner product to [q; d] of each of `count` pairs: int64 [count]."""
    faiss = faiss_module()
    index = faiss.IndexFlatIP(centroids.shape[1])
    resources = faiss.StandardGpuResources() if faiss.get_num_gpus() else None
    if resources is not None:
        index = faiss.index_cpu_to_gpu(resources, 0, index)
    index.add(centroids)
    found = np.empty(count, np.int64)
    for first, query, document in _blocks(read, np.arange(count)):
        say(f"{first:,} of {count:,} rows have their cluster")
        found[first : first + len(query)] = index.search(joint(query, document), 1)[1][:, 0]
    return found


def mean_documents(read: Read, cluster: np.ndarray, clusters: int, say: Say) -> np.ndarray:
    """Mean vector of the documents of each cluster: fp32 [clusters, dim]; no cluster is empty. Sums are of fp64."""
    sums: Any = None
    for first, _, document in _blocks(read, np.arange(len(cluster))):
        say(f"{first:,} of {len(cluster):,} rows are in the means")
        if sums is None:
            sums = np.zeros((clusters, document.shape[1]))
        met, place = np.unique(cluster[first : first + len(document)], return_inverse=True)
        one_hot = csr_array((np.ones(len(place)), (place, np.arange(len(place)))), shape=(len(met), len(place)))
        sums[met] += one_hot @ document.astype(np.float64)
    return (sums / np.bincount(cluster, minlength=clusters)[:, None]).astype(np.float32)


def nearest_others(vectors: np.ndarray, count: int, say: Say) -> np.ndarray:
    """Of each vector its nearest others by Euclidean distance, nearest first, compared in fp64; equal ones by number.

    faiss finds them in fp32. Where its error leaves open whether one that it left out is nearer, the list ends.

    Returns:
        int32 [n, count]; -1 behind the end of a list. Memory grows with n count.
    """
    faiss, total = faiss_module(), len(vectors)
    found = min(total, count + _NEAR_MARGIN)
    near = np.full((total, count), -1, np.int32)
    wide = vectors.astype(np.float64)
    narrow = (wide - wide.mean(0)).astype(np.float32)  # distances stay, and fp32 tells smaller ones apart
    norms = np.linalg.norm(narrow, axis=1)
    for first in range(0, total, _NEAR_BLOCK):
        say(f"{first:,} of {total:,} clusters have their neighbours")
        own = np.arange(first, min(first + _NEAR_BLOCK, total))
        rough, others = faiss.knn(narrow[own], narrow, found, metric=faiss.METRIC_L2)
        exact = squared_distances(wide[others], wide[own][:, None])
        reach = norms[own] + norms.max()
        error = 2 * (vectors.shape[1] + 8) * np.finfo(np.float32).eps * reach**2  # of |x|^2 + |y|^2 - 2 xy in fp32
        certain = rough[:, -1] - error if found < total else np.full(len(own), np.inf)
        exact[(others == own[:, None]) | (exact >= certain[:, None])] = np.inf
        order = np.lexsort((others, exact), axis=1)[:, :count]
        sure = np.isfinite(np.take_along_axis(exact, order, 1))
        near[own, : order.shape[1]] = np.where(sure, np.take_along_axis(others, order, 1), -1)
    return near
