"""Pools from clusters against the authors' own sampler: the order of clusters and every id of its streams.

The authors' random streams are numpy's default_rng(seed + epoch) for the clusters and a torch.Generator of the same
seed for the windows; `reference` writes their sampler down once more, plainly, for the cases that the fixture lacks.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from toolkit.data.packing import Walk, cluster_order, windows

SEED = 42
WALKS: dict[str, Walk] = {"random": "random", "tsp_greedy": "greedy"}
CASES = [("random/b8", 8), ("tsp_greedy/b8", 8)]


@pytest.fixture(scope="module")
def fixture() -> dict[str, Any]:
    with np.load(Path(__file__).parent.parent / "fixtures" / "cde" / "packing.npz", allow_pickle=False) as data:
        return dict(data)


def domains_of(fixture: dict[str, Any]) -> list[list[np.ndarray]]:
    """Of each domain the ids of its clusters."""
    domain, cluster, ids = fixture["clusters"].T
    return [[ids[(domain == d) & (cluster == c)] for c in np.unique(cluster[domain == d])] for d in np.unique(domain)]


def permutations(seed: int) -> Callable[[int], np.ndarray]:
    stream = torch.Generator().manual_seed(seed)
    return lambda n: torch.randperm(n, generator=stream).numpy()


def ours(fixture: dict[str, Any], walk: Walk, pool: int, epoch: int = 0) -> tuple[list[list[int]], np.ndarray]:
    """The order of clusters, and the pools."""
    draw, order, parts = np.random.default_rng(SEED + epoch), [], []
    for domain, clusters in enumerate(domains_of(fixture)):
        means = np.stack([fixture["embeddings"][ids].mean(0) for ids in clusters])
        own = cluster_order(means, np.full((len(means), 1), -1, np.int32), walk, draw)
        order += [[domain, int(cluster)] for cluster in own]
        parts += [clusters[cluster] for cluster in own]
    return order, windows([np.concatenate(parts)], pool, permutations(SEED + epoch))


@pytest.mark.parametrize(("run", "pool"), CASES)
def test_clusters_and_streams_are_the_authors_to_the_integer(run: str, pool: int, fixture: dict[str, Any]):
    order, pools = ours(fixture, WALKS[run.split("/")[0]], pool)
    assert order == fixture[f"{run}/cluster_order"].tolist()
    assert pools.shape == (47 // pool, pool) and pools.ravel().tolist() == fixture[f"{run}/stream"].tolist()


@pytest.mark.parametrize(("run", "pool"), CASES)
def test_windows_of_the_authors_order_of_clusters(run: str, pool: int, fixture: dict[str, Any]):
    clusters = domains_of(fixture)
    rows = np.concatenate([clusters[domain][cluster] for domain, cluster in fixture[f"{run}/cluster_order"]])
    expected = fixture[f"{run}/stream"].tolist()
    assert windows([rows], pool, permutations(SEED)).ravel().tolist() == expected
    assert windows([rows], pool, permutations(SEED + 1)).ravel().tolist() != expected  # controls
    assert windows([rows[::-1]], pool, permutations(SEED)).ravel().tolist() != expected


def reference(fixture: dict[str, Any], walk: Walk, pool: int, epoch: int, rank: int, world: int, shared: bool) -> list:
    """What a rank of the authors' sampler yields."""
    draw, stream = np.random.default_rng(SEED + epoch), torch.Generator().manual_seed(SEED + epoch)
    flat: list[int] = []
    for clusters in domains_of(fixture):
        order = np.arange(len(clusters))
        if walk == "random":
            draw.shuffle(order)
        else:
            means = [fixture["embeddings"][ids].astype(np.float64).mean(0) for ids in clusters]
            order = [int(draw.integers(len(clusters)))]
            while len(order) < len(clusters):
                left = [c for c in range(len(clusters)) if c not in order]
                order.append(min(left, key=lambda c: float(np.linalg.norm(means[c] - means[order[-1]]))))
        for cluster in order:
            flat += clusters[cluster].tolist()
    window = pool * world if shared else pool
    flat = flat[: len(flat) // window * window]
    batches = [flat[i : i + window] for i in range(0, len(flat), window)]
    batches = [batches[i] for i in torch.randperm(len(batches), generator=stream)]
    batches = [[batch[i] for i in torch.randperm(window, generator=stream)] for batch in batches]
    flat = [one for batch in batches for one in batch]
    chunks = len(flat) // world // pool
    starts = [(chunk * world + rank) * pool for chunk in range(chunks)]
    return [one for start in starts for one in flat[start : start + pool]]


@pytest.mark.parametrize("walk", ["random", "greedy"])
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize(("pool", "world", "shared"), [(8, 1, False), (5, 1, False), (4, 2, True), (4, 2, False)])
def test_other_epochs_pools_and_ranks(
    walk: Walk, epoch: int, pool: int, world: int, shared: bool, fixture: dict[str, Any]
):
    """A pool that spans ranks is a window of all their rows; one that does not goes to one rank after another."""
    if (epoch, pool, world) == (0, 8, 1):  # the reference is the authors'
        run = "random/b8" if walk == "random" else "tsp_greedy/b8"
        assert reference(fixture, walk, pool, 0, 0, 1, False) == fixture[f"{run}/stream"].tolist()
    _, pools = ours(fixture, walk, pool * world if shared else pool, epoch)
    for rank in range(world):
        whole = pools[: len(pools) // world * world]
        own = pools[:, rank * pool : (rank + 1) * pool] if shared else whole[rank::world]
        assert own.ravel().tolist() == reference(fixture, walk, pool, epoch, rank, world, shared)
