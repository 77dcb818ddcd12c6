"""Clusters of the rows of pairs on disk: which rows are in each, its mean document, and the clusters near it.

Written by prepare_clusters, read by the plan of training.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.files import sha256

_ARRAYS = ("rows", "starts", "means", "near")


def write_clusters(folder: Path, clusters: list[np.ndarray], means: list[np.ndarray], near: list[np.ndarray]) -> None:
    """Write the clusters of all sources into an existing folder; meta.json comes last.

    Args, of each source:
        clusters: int64 [rows], the cluster of each row, counted from 0 without a gap.
        means: fp32 [clusters, dim], of documents.
        near: int32 [clusters, N], as `greedy_walk` reads them.
    """
    sizes = [len(each) for each in clusters]
    rows = [first + np.argsort(each, kind="stable") for first, each in zip(_before(sizes), clusters, strict=True)]
    counts = np.concatenate([np.bincount(each) for each in clusters])
    arrays = {
        "rows": np.concatenate(rows),
        "starts": np.concatenate([[0], np.cumsum(counts)]),
        "means": np.concatenate(means).astype(np.float32, copy=False),
        "near": np.concatenate(near).astype(np.int32, copy=False),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    digests = {name: sha256(folder / f"{name}.npy") for name in _ARRAYS}
    meta = {"sizes": sizes, "clusters": [len(each) for each in means], "sha256": digests}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


class ClusterStore:
    """The clusters of all sources; those of a source are numbered from 0, and none of them is empty."""

    def __init__(self, folder: Path, sizes: list[int]) -> None:
        """Args: `sizes`: the rows of each source, as the pairs have them.

        Raises:
            FileNotFoundError: if the folder holds no finished store. ValueError: if a file of it is damaged, or its
                clusters are of other pairs.
        """
        meta: Any = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        try:
            found, counts, digests = meta["sizes"], meta["clusters"], [meta["sha256"][name] for name in _ARRAYS]
        except (KeyError, TypeError):
            raise ValueError("meta.json lacks sizes, clusters or sha256") from None
        if found != sizes:
            raise ValueError(f"it clusters other pairs: {found} rows of each source, not {sizes}")
        for name, digest in zip(_ARRAYS, digests, strict=True):
            if sha256(folder / f"{name}.npy") != digest:
                raise ValueError(f"{name}.npy is not as it was written")
        rows, starts, means, near = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in _ARRAYS)
        self._rows, self._starts, self._means, self._near = rows, starts, means, near
        self._first = [*_before(counts), sum(counts)]
        self.sizes = sizes
        self.digest = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]  # of all that decides an order

    def of_source(self, source: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean documents of its clusters, fp32 [clusters, dim], and the clusters near each, int32 [clusters, N]."""
        some = slice(self._first[source], self._first[source + 1])
        return self._means[some], self._near[some]

    def rows_of(self, source: int, order: np.ndarray) -> np.ndarray:
        """Row ids of a source's clusters, one cluster after another: int64 [rows]."""
        starts, ends = (self._starts[order + self._first[source] + place] for place in (0, 1))
        counts = ends - starts
        places = np.arange(counts.sum()) + np.repeat(starts - (counts.cumsum() - counts), counts)
        return self._rows[places]


def _before(sizes: list[int]) -> list[int]:
    """What comes before each: the sum of those before it."""
    return np.cumsum([0, *sizes])[:-1].tolist()
