"""Clusters of the rows of pairs by a surrogate's vectors, made once and kept by content in <run>/../prepared.

Called by training on every rank: all ranks embed, rank 0 clusters; a problem is a RecipeError on every rank.
"""

import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch

from toolkit.collectives import on_rank_zero
from toolkit.data.clusters import ClusterStore, write_clusters
from toolkit.data.pairs import PairStore
from toolkit.data.surrogate import SurrogateVectors
from toolkit.determinism import generator
from toolkit.files import placing_folder
from toolkit.prepare.surrogate import know_surrogate, surrogate_vectors
from toolkit.ranks.telling import telling
from toolkit.ranks.together import open_everywhere, together
from toolkit.recipe.clusters import Clusters
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.pairs import PairsData
from toolkit.retrieval.kmeans import (
    Read,
    assign,
    mean_documents,
    nearest_others,
    paired_kmeans,
    place_of_kmeans,
    point_bytes,
)

NEIGHBOURS = 64  # of a cluster that a greedy walk looks at before it looks at all that are left
_LAYOUT = 1  # of what is kept; one more makes older folders unread
_AT = "data.clusters"
_WIDE = 768  # dimensions by which the dry run tells memory where the surrogate's own are not known


def prepare_clusters(
    data: PairsData, store: PairStore, previous: Path | None, run: Path, seed: int, device: torch.device | str
) -> ClusterStore:
    """The clusters of each source's rows, by paired spherical K-means over queries and their first positives.

    Made anew on another machine, rows that lie nearly equally near to two centroids may fall to the other one; whoever
    resumes knows that by the digest.

    Args: see `surrogate_vectors`.

    Raises:
        RecipeError: for a cluster size above a source's rows, too small a sample, what `surrogate_vectors` raises, or a
            damaged folder.
    """
    settings = data.clusters
    assert settings is not None  # the recipe demands it
    check_clusters(settings, [*store.sizes])
    key = know_surrogate(settings.surrogate, store, previous, device, f"{_AT}.surrogate").key
    folder = run.parent / "prepared" / f"clusters_{together(lambda: _key(settings, store, key))}"
    if not on_rank_zero(folder.is_dir):
        together(place_of_kmeans)  # an error without faiss, before hours of embedding
        vectors = surrogate_vectors(settings.surrogate, data, store, previous, run, seed, device)
        together(lambda: _write(settings, store, vectors, folder))
    return open_everywhere(folder, lambda found: ClusterStore(found, store.sizes))


def check_clusters(settings: Clusters, sizes: list[int | None]) -> None:
    """Raise RecipeError if clusters of this size cannot be made of sources of so many rows (None: not known)."""
    for number, rows in enumerate(sizes):
        if rows is None:
            continue
        if settings.size > rows:
            problem = f"{settings.size:,} is more than the {rows:,} rows of data.sources.{number}; lower it"
            raise RecipeError(f"{_AT}.size: {problem}")
        clusters = -(-rows // settings.size)
        if settings.sample < clusters:
            problem = f"{settings.sample:,} rows cannot make the {clusters:,} clusters of data.sources.{number}"
            raise RecipeError(f"{_AT}.sample: {problem}; raise it, or size")


def clusters_ahead(settings: Clusters, sizes: list[int | None]) -> list[tuple[str, str]]:
    """(name, value) of what clustering sources of so many rows takes, for the dry run; None: that is not known.

    Raises:
        RecipeError: as `check_clusters`.
    """
    check_clusters(settings, sizes)
    dim = settings.surrogate.svd
    wide = "" if dim else f" if vectors have {_WIDE} dimensions"
    lines = []
    for number, rows in enumerate(sizes):
        name = "clusters" if len(sizes) == 1 else f"clusters of source {number}"
        lines.append((name, _told(settings, rows, dim or _WIDE) + wide))
    return lines


def _told(settings: Clusters, rows: int | None, dim: int) -> str:
    """What K-means does with the rows of a source, and what it holds."""
    held = settings.sample * point_bytes(dim)
    if rows is None:
        reads = f"not known: not all rows are counted; K-means reads {settings.sample:,} of them at most"
        holds = f"{_size(held)} of points at most"
    else:
        sample, clusters = min(rows, settings.sample), -(-rows // settings.size)
        which = "all of them" if sample == rows else f"{sample:,} of them, drawn by the seed"
        reads = f"{clusters:,} for {rows:,} rows; K-means reads {which}"
        # Of centroids there are the best, those at work, and faiss's.
        holds = _size(sample * point_bytes(dim) + 3 * clusters * 2 * dim * 4)
    times = f"{settings.restarts} times {settings.iterations} iterations at most"
    return f"{reads}, two points each, {times}, and holds {holds}"


def _size(held: int) -> str:
    return f"{held / 2**30:.1f} GiB" if held >= 2**30 else f"{held / 2**20:.0f} MiB"


def _key(settings: Clusters, store: PairStore, surrogate: str) -> str:
    """16 hex digits of all that decides the clusters: which texts make which rows, who embeds them, K-means."""
    own = settings.model_dump(mode="json", exclude={"surrogate"})
    parts = [_LAYOUT, surrogate, store.digest, store.sizes, own]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _write(settings: Clusters, store: PairStore, vectors: SurrogateVectors, folder: Path) -> None:
    clusters, means, near = [], [], []
    first = 0
    for number, rows in enumerate(store.sizes):

        def read(some: np.ndarray, first: int = first) -> tuple[np.ndarray, np.ndarray]:
            return vectors.of_rows(store, first + some)

        found = _of_source(settings, number, rows, read, vectors.query.shape[1])
        for all_sources, own in zip((clusters, means, near), found, strict=True):
            all_sources.append(own)
        first += rows
    with placing_folder(folder) as work:
        write_clusters(work, clusters, means, near)


def _of_source(
    settings: Clusters, number: int, rows: int, read: Read, dim: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cluster of each row of a source, mean documents and neighbours of the clusters; empty clusters are left out."""
    began, name = time.monotonic(), f"clusters of data.sources.{number}"
    print(f"{name}: {_told(settings, rows, dim)}, {place_of_kmeans()}", flush=True)
    count = -(-rows // settings.size)
    with telling() as say:

        def heard(text: str) -> None:
            say(f"{name}: {text}")

        fit = paired_kmeans(
            read,
            _sample(settings, number, rows),
            count,
            iterations=settings.iterations,
            restarts=settings.restarts,
            seed=settings.seed,
            say=heard,
        )
        centroid = assign(read, rows, fit.centroids, heard)
        used, cluster = np.unique(centroid, return_inverse=True)
        means = mean_documents(read, cluster, len(used), heard)
        near = nearest_others(means, NEIGHBOURS, heard)
    held = np.bincount(cluster)
    print(
        f"{name}: {len(used):,} of {count:,} hold rows, {held.min():,} to {held.max():,} of them, median "
        f"{np.median(held):,.0f}; mean inner product {fit.objective:.4f}, {time.monotonic() - began:,.0f} s",
        flush=True,
    )
    return cluster, means, near


def _sample(settings: Clusters, number: int, rows: int) -> np.ndarray:
    """The rows of a source that K-means reads, rising."""
    if rows <= settings.sample:
        return np.arange(rows)
    return np.sort(generator("k-means", settings.seed, number).permutation(rows)[: settings.sample])
