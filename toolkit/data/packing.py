"""Pools cut from clusters of rows (CDE, arXiv 2410.02525): an order of the clusters, then windows of one pool.

Called by training, where ClusterPlan stands in the place of PairPlan.
"""

import functools
from collections.abc import Callable
from typing import Literal

import numpy as np

from toolkit.data.clusters import ClusterStore
from toolkit.determinism import generator
from toolkit.recipe.errors import RecipeError

Walk = Literal["random", "greedy"]
Permutation = Callable[[int], np.ndarray]  # n -> the numbers below n in random order


class ClusterPlan:
    """Which rows make global pool number t: a pure function of (seed, t), whatever the number of ranks.

    An epoch walks through the clusters of each source, one source after another, and lays out their rows; what is
    left over at the end of a whole number of pools is cut off. Then the pools are shuffled, and the rows in each.
    So a large cluster fills several pools, and small ones that follow each other share one. No row comes twice in an
    epoch.
    """

    def __init__(self, store: ClusterStore, pool: int, walk: Walk, within: Literal["all", "source"], seed: int) -> None:
        """Args: clusters of rows; rows per pool; the order of clusters; whether a pool may straddle two sources.

        Raises:
            RecipeError: for fewer rows than a pool holds.
        """
        self.pools_per_epoch: float = pools_of(store.sizes, pool, within)
        self._store, self._pool, self._within, self._seed = store, pool, within, seed
        self._walk: Walk = walk
        self._epoch = functools.lru_cache(maxsize=2)(self._pools)

    def pool(self, t: int) -> np.ndarray:
        """Row ids of global pool number t: int64 [pool], no id twice."""
        epoch, place = divmod(t, int(self.pools_per_epoch))
        return self._epoch(epoch)[place]

    def _pools(self, epoch: int) -> np.ndarray:
        """All pools of an epoch: int64 [pools, pool]."""
        parts = []
        for source in range(len(self._store.sizes)):
            draw = generator("clusters", self._seed, source, epoch)
            order = cluster_order(*self._store.of_source(source), self._walk, draw)
            parts.append(self._store.rows_of(source, order))
        parts = parts if self._within == "source" else [np.concatenate(parts)]
        return windows(parts, self._pool, generator("windows", self._seed, epoch).permutation)


def pools_of(sizes: list[int], pool: int, within: Literal["all", "source"]) -> int:
    """Pools of an epoch. Raises RecipeError where there is none, or a source would give none."""
    if within == "all":
        if sum(sizes) < pool:
            fix = "lower batch.pool or add data"
            raise RecipeError(f"data.sources: {sum(sizes):,} rows are fewer than a pool of {pool:,}; {fix}")
        return sum(sizes) // pool
    for number, size in enumerate(sizes):
        if size < pool:
            fix = 'lower batch.pool, add data, or set data.packing.within to "all"'
            raise RecipeError(f"data.sources.{number}: {size:,} rows are fewer than a pool of {pool:,}; {fix}")
    return sum(size // pool for size in sizes)


def windows(parts: list[np.ndarray], pool: int, permutation: Permutation) -> np.ndarray:
    """Rows in their order -> pools in random order, each with its rows in random order: [pools, pool].

    The random stream is read as the authors' sampler reads it: the order of the pools, then that inside each of them.

    Args:
        parts: rows [n] that pools may not straddle; what is left over of each is cut off.
    """
    cut = np.concatenate([part[: len(part) // pool * pool].reshape(-1, pool) for part in parts])
    cut = cut[permutation(len(cut))]
    for window in cut:
        window[:] = window[permutation(pool)]
    return cut


# --------------------------------------------------------------------------- the order of clusters


def cluster_order(means: np.ndarray, near: np.ndarray, walk: Walk, draw: np.random.Generator) -> np.ndarray:
    """The clusters of one source in the order of an epoch: int64 [clusters], each once; see `greedy_walk`."""
    if walk == "random":
        return draw.permutation(len(means))
    return greedy_walk(means, near, int(draw.integers(len(means))))


def greedy_walk(means: np.ndarray, near: np.ndarray, start: int) -> np.ndarray:
    """From `start` always on to the nearest that was not visited: int64 [clusters].

    Distances are Euclidean and compared in fp64; of equally near ones the first is taken. Memory grows with the number
    of clusters, not with its square: most steps find the next one in the list of the current one's neighbours, and
    only where all of these were visited all that are left are looked at.

    Args:
        means: fp32 [clusters, dim].
        near: int32 [clusters, any], of each the first of its neighbours, nearest first, then -1.
    """
    wide = means.astype(np.float64)
    left, held = np.arange(len(wide)), wide
    order, seen = np.empty(len(wide), np.int64), np.zeros(len(wide), bool)
    for step in range(len(wide)):
        order[step] = start
        seen[start] = True
        following = next((other for other in near[start].tolist() if other < 0 or not seen[other]), -1)
        if following < 0 and step + 1 < len(wide):
            if step + 1 - (len(wide) - len(left)) > len(left) // 2:  # more than half of them were seen meanwhile
                left = left[~seen[left]]
                held = wide[left]
            following = _nearest(held, left, seen, wide[start])
        start = following
    return order


def _nearest(vectors: np.ndarray, names: np.ndarray, seen: np.ndarray, of: np.ndarray) -> int:
    """The name of the vector that is nearest to another, fp64 [n, dim] and [dim], without those seen."""
    squares = np.einsum("ij,ij->i", vectors, vectors)
    rough = squares - 2 * (vectors @ of)  # the squared distance up to |of|^2, and up to rounding
    rough[seen[names]] = np.inf
    error = 4 * (len(of) + 8) * np.finfo(np.float64).eps * (squares.max() + of @ of)
    close = np.flatnonzero(rough <= rough.min() + error)
    return int(names[close[squared_distances(vectors[close], of).argmin()]])


def squared_distances(vectors: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Squared distances in fp64 along the last axis; equal vectors give equal bits wherever they stand."""
    difference = vectors - of
    return np.einsum("...j,...j->...", difference, difference)
