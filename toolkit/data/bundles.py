"""Pools whose documents are neighbours: documents in bundles, and the order of training that follows from them.

Called by prepare_neighbours (bundle) and by training (BundlePlan).
"""

import functools

import numpy as np

from toolkit.data.spans import check_sizes, document_places, end_to_end
from toolkit.determinism import generator


def bundle(neighbours: np.ndarray, size: int) -> np.ndarray:
    """The order of documents in which each run of `size` is a bundle of neighbours; a function of its arguments alone.

    Greedy: the first document without a bundle takes the best of its neighbours that have none, then theirs, until the
    bundle is full. What stays short of `size` is put together at the end, in order.

    Args:
        neighbours: int [documents, k], best first; -1 for none.
        size: documents per bundle; the last one has what is left over.

    Returns:
        int64 [documents], each document once.
    """
    free = [True] * len(neighbours)
    full: list[int] = []
    short: list[int] = []
    for first in range(len(neighbours)):
        if not free[first]:
            continue
        free[first] = False
        members = [first]
        for member in members:  # grows while it is read
            if len(members) == size:
                break
            for other in neighbours[member].tolist():
                if len(members) < size and other >= 0 and free[other]:
                    free[other] = False
                    members.append(other)
        (full if len(members) == size else short).extend(members)
    return np.array(full + short, dtype=np.int64)


class BundlePlan:
    """Which passages make global pool number t: a pure function of (seed, t), whatever the number of ranks.

    Within a bundle the passages of its documents are dealt in turn (d11, d21, ..., dn1, d12, ...), those of longer
    documents more often, so that all end together: however unequal they are, the last pools mix them too. Each epoch
    shuffles the bundles, lays them end to end, cuts that line into pools, drops the tail and shuffles the pools. A
    bundle is in one pool, or in pools that were neighbours on the line.
    """

    def __init__(self, store_document: np.ndarray, order: np.ndarray, size: int, pool: int, seed: int) -> None:
        """Args: document number of each passage; documents, each run of `size` a bundle; passages per pool.

        Raises:
            RecipeError: for a pool above the data, and for fewer documents than a bundle has.
        """
        total = len(store_document)
        first, length = document_places(store_document)
        check_sizes(pool, total, size, len(first))
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        number = np.arange(total) - np.repeat(first, length)  # of each passage in its document
        share = (2 * number + 1) / np.repeat(2 * length, length)  # of the document up to the passage's middle
        place = np.repeat(place, length)
        self._dealt = np.lexsort((place, share, place // size))  # passage ids, bundle after bundle
        self._length = np.bincount(place // size)
        self._pool, self._seed = pool, seed
        self.pools_per_epoch = total // pool
        self._epoch = functools.lru_cache(maxsize=2)(self._pools)

    def pool(self, t: int) -> np.ndarray:
        """Passage ids of global pool number t: int64 [pool], no id twice."""
        epoch, place = divmod(t, self.pools_per_epoch)
        return self._epoch(epoch)[place]

    def _pools(self, epoch: int) -> np.ndarray:
        random = generator("bundles", self._seed, epoch)
        order = random.permutation(len(self._length))
        first = np.cumsum(self._length) - self._length
        line = self._dealt[end_to_end(first[order], self._length[order])]
        pools = line[: self.pools_per_epoch * self._pool].reshape(-1, self._pool)
        return pools[random.permutation(len(pools))]
