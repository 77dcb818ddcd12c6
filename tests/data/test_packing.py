"""Pools cut from clusters: the greedy walk against a plain one, and pools that are a function of their number."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolkit.data.clusters import ClusterStore, write_clusters
from toolkit.data.packing import ClusterPlan, greedy_walk, pools_of
from toolkit.recipe.errors import RecipeError
from toolkit.retrieval.kmeans import nearest_others


def plain_walk(means: np.ndarray, start: int) -> list[int]:
    """The nearest of those that are left, by all distances."""
    wide = means.astype(np.float64)
    order, left = [start], [i for i in range(len(means)) if i != start]
    while left:
        distances = ((wide[left] - wide[order[-1]]) ** 2).sum(1)
        order.append(left.pop(int(distances.argmin())))
    return order


def points(kind: str) -> np.ndarray:
    draw = np.random.default_rng(3)
    clumps = np.repeat(draw.normal(size=(6, 8)), 60, 0) + 0.01 * draw.normal(size=(360, 8))
    made: dict[str, Any] = {
        "random": draw.normal(size=(300, 16)),
        "clumps": clumps,
        "far from zero": 100 + 1e-4 * draw.normal(size=(300, 8)),
        "grid of equal distances": np.stack(np.meshgrid(range(15), range(15)), -1).reshape(-1, 2),
        "all the same": np.zeros((40, 3)),
        "two": np.eye(2),
        "one": np.ones((1, 4)),
    }
    return made[kind].astype(np.float32)


KINDS = ["random", "clumps", "far from zero", "grid of equal distances", "all the same", "two", "one"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("neighbours", [0, 3, 64])
def test_a_greedy_walk_is_the_plain_one(kind: str, neighbours: int):
    """With lists of neighbours of any length, which most steps need not leave, or with none at all."""
    means = points(kind)
    near = nearest_others(means, neighbours, lambda _: None)
    assert near.shape == (len(means), neighbours)
    for start in {0, len(means) // 2, len(means) - 1}:
        walk = greedy_walk(means, near, start)
        assert walk.dtype == np.int64 and walk.tolist() == plain_walk(means, start)


def test_a_walk_that_trusts_wrong_neighbours_is_another():
    """The control: the lists decide."""
    means = points("random")
    near = nearest_others(means, 8, lambda _: None)
    assert greedy_walk(means, near[:, ::-1], 0).tolist() != plain_walk(means, 0)


def store(folder: Path, *sizes: dict[int, int]) -> ClusterStore:
    """Sources of clusters of these numbers of rows, rows in mixed order."""
    draw = np.random.default_rng(0)
    clusters = [draw.permutation(np.repeat(list(each), list(each.values()))) for each in sizes]
    means = [draw.normal(size=(len(each), 4)).astype(np.float32) for each in sizes]
    folder.mkdir()
    write_clusters(folder, clusters, means, [nearest_others(each, 4, lambda _: None) for each in means])
    return ClusterStore(folder, [sum(each.values()) for each in sizes])


def cluster_of(found: ClusterStore) -> np.ndarray:
    """Of each row its (source, cluster) as one number."""
    known = np.empty(sum(found.sizes), np.int64)
    for source in range(len(found.sizes)):
        for cluster in range(len(found.of_source(source)[0])):
            known[found.rows_of(source, np.array([cluster]))] = 1000 * source + cluster
    return known


SOURCES = ({0: 30, 1: 4, 2: 11, 3: 8}, {0: 9, 1: 20, 2: 3}, {0: 17})


@pytest.mark.parametrize("walk", ["random", "greedy"])
@pytest.mark.parametrize("within", ["all", "source"])
def test_a_pool_is_a_function_of_its_number_and_an_epoch_holds_no_row_twice(walk: Any, within: Any, tmp_path: Path):
    found = store(tmp_path / "clusters", *SOURCES)
    assert found.sizes == [53, 32, 17]
    plan = ClusterPlan(found, 8, walk, within, seed=5)
    assert plan.pools_per_epoch == (12 if within == "all" else 6 + 4 + 2)
    pools = [plan.pool(t) for t in range(36)]
    for epoch in range(3):
        rows = np.concatenate(pools[12 * epoch : 12 * epoch + 12])
        assert rows.dtype == np.int64 and len(set(rows.tolist())) == 96 and rows.min() >= 0 and rows.max() < 102
    for t in (35, 0, 17, 12):  # a plan that starts there knows nothing of the others
        assert np.array_equal(ClusterPlan(found, 8, walk, within, seed=5).pool(t), pools[t])
    assert any(not np.array_equal(ClusterPlan(found, 8, walk, within, seed=6).pool(t), pools[t]) for t in range(3))
    assert len({tuple(rows) for rows in pools}) == 36


def sources_in(rows: np.ndarray) -> int:
    return len(set(np.searchsorted([53, 85], rows, side="right").tolist()))


def test_pools_straddle_two_sources_only_where_they_may(tmp_path: Path):
    found = store(tmp_path / "clusters", *SOURCES)
    among_all, apart = (ClusterPlan(found, 8, "random", within, seed=1) for within in ("all", "source"))
    assert [sources_in(apart.pool(t)) for t in range(36)] == [1] * 36
    straddling = [sources_in(among_all.pool(t)) for t in range(36)]
    assert set(straddling) == {1, 2} and straddling.count(2) <= 2 * 3  # the two seams of each epoch


def test_a_pool_is_made_of_clusters_that_follow_each_other(tmp_path: Path):
    """Large clusters are cut and small ones joined: a pool of 8 meets 2 clusters on average here, shuffled rows 4."""
    found = store(tmp_path / "clusters", dict.fromkeys(range(10), 10))
    of_row = cluster_of(found)
    plan = ClusterPlan(found, 10, "random", "all", seed=1)
    assert [len(set(of_row[plan.pool(t)].tolist())) for t in range(10)] == [1] * 10
    uneven = store(tmp_path / "uneven", {0: 25, 1: 3, 2: 4, 3: 40, 4: 8})
    plan, of_row = ClusterPlan(uneven, 8, "greedy", "all", seed=1), cluster_of(uneven)
    met = [len(set(of_row[plan.pool(t)].tolist())) for t in range(10)]
    shuffled = np.random.default_rng(0).permutation(80).reshape(10, 8)
    assert sum(met) <= 10 + 4 < sum(len(set(of_row[rows].tolist())) for rows in shuffled)


def test_the_greedy_order_starts_elsewhere_in_each_epoch(tmp_path: Path):
    found = store(tmp_path / "clusters", dict.fromkeys(range(30), 4))
    plan = ClusterPlan(found, 120, "greedy", "all", seed=1)
    of_row = cluster_of(found)
    means, near = found.of_source(0)
    orders = {tuple(greedy_walk(means, near, start)) for start in range(30)}
    assert len(orders) == 30 and len({tuple(of_row[plan.pool(t)]) for t in range(5)}) == 5


@pytest.mark.parametrize(
    ("sizes", "within", "problem"),
    [
        ([5, 2], "all", "data.sources: 7 rows are fewer than a pool of 8; lower batch.pool or add data"),
        (
            [50, 7],
            "source",
            "data.sources.1: 7 rows are fewer than a pool of 8; lower batch.pool, add data, or set data.packing.within "
            'to "all"',
        ),
    ],
)
def test_too_few_rows_are_one_line(sizes: list[int], within: Any, problem: str):
    with pytest.raises(RecipeError) as caught:
        pools_of(sizes, 8, within)
    assert str(caught.value) == problem
    assert pools_of([5, 3], 8, "all") == 1 and pools_of([50, 8], 8, "source") == 7


def test_damaged_clusters_and_those_of_other_pairs_are_told(tmp_path: Path):
    folder = tmp_path / "clusters"
    found = store(folder, *SOURCES)
    assert ClusterStore(folder, [53, 32, 17]).digest == found.digest
    with pytest.raises(
        ValueError, match=r"it clusters other pairs: \[53, 32, 17\] rows of each source, not \[53, 32\]"
    ):
        ClusterStore(folder, [53, 32])
    for name in ("rows", "starts", "means", "near"):
        path = folder / f"{name}.npy"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"{name}.npy is not as it was written"):
            ClusterStore(folder, [53, 32, 17])
        path.write_bytes(whole)
    for text in ("{}", "[]", '{"sizes": [1]}', "x"):
        (folder / "meta.json").write_text(text)
        with pytest.raises(ValueError, match=r"meta.json lacks sizes, clusters or sha256|Expecting value"):
            ClusterStore(folder, [53, 32, 17])
