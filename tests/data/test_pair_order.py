"""The order of training over sources of pairs: shares, epochs, and pools that are a function of their number."""

import numpy as np
import pytest

from toolkit.data.pairs import PairPlan
from toolkit.recipe.errors import RecipeError


def sources_of(plan_sizes: list[int], rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(plan_sizes), rows, side="right")


def test_one_source_is_shuffled_anew_each_epoch_and_its_tail_dropped():
    plan = PairPlan([50], None, 8, None, seed=1)
    assert plan.pools_per_epoch == 50 / 8
    epochs = [np.concatenate([plan.pool(t) for t in range(6 * e, 6 * e + 6)]) for e in range(20)]
    for rows in epochs:
        assert rows.dtype == np.int64 and len(set(rows.tolist())) == 48
        assert rows.min() >= 0 and rows.max() < 50
    assert len({tuple(rows) for rows in epochs}) == 20
    assert set(np.concatenate(epochs).tolist()) == set(range(50))
    assert not np.array_equal(plan.pool(0), PairPlan([50], None, 8, None, seed=2).pool(0))


MIXES = [
    ([50], None, 8, None),
    ([40, 300, 25], None, 16, "pools"),
    ([40, 300, 25], [0.7, 0.2, 0.1], 16, "pools"),
    ([40, 300, 25], None, 16, "rows"),
    ([40, 300, 25], [0.7, 0.2, 0.1], 16, "rows"),
    ([12, 1000], [3.0, 1.0], 16, "rows"),  # 12 rows to every pool: all there are
    ([20, 9, 1000], [1.0, 1.0, 1.0], 16, "rows"),  # fewer rows than three pools take
    ([3, 5000], [0.001, 0.999], 10, "rows"),  # a row every 100 pools
    ([97, 101, 103], [2**0.5, 3**0.5, 5**0.5], 20, "rows"),
]


@pytest.mark.parametrize(("sizes", "weights", "pool", "mix"), MIXES)
def test_a_pool_is_a_function_of_its_number_alone_and_holds_no_row_twice(sizes, weights, pool, mix):
    plan = PairPlan(sizes, weights, pool, mix, seed=5)
    pools = [plan.pool(t) for t in range(400)]
    for rows in pools:
        assert len(rows) == len(set(rows.tolist())) == pool and rows.min() >= 0 and rows.max() < sum(sizes)
    for t in (399, 0, 123, 250, 251):  # a plan that starts there knows nothing of the others
        assert np.array_equal(PairPlan(sizes, weights, pool, mix, seed=5).pool(t), pools[t])
    assert not np.array_equal(PairPlan(sizes, weights, pool, mix, seed=6).pool(3), pools[3])
    assert len({tuple(rows) for rows in pools}) == 400


def test_without_its_margin_a_pool_across_two_epochs_would_hold_rows_twice():
    plan = PairPlan([40, 300, 25], [0.7, 0.2, 0.1], 16, "rows", seed=5)
    plan._margin = [0, 0, 0]
    assert any(len(set(plan.pool(t).tolist())) < 16 for t in range(400))


@pytest.mark.parametrize(("sizes", "weights", "pool", "mix"), [case for case in MIXES if case[3]])
def test_every_block_keeps_the_shares(sizes, weights, pool, mix):
    plan = PairPlan(sizes, weights, pool, mix, seed=0)
    shares = np.asarray(weights or sizes) / sum(weights or sizes)
    units = plan.block * (pool if mix == "rows" else 1)
    assert sum(plan.quotas) == units
    up = np.array(plan.quotas) > units * shares + 1e-6  # the largest remainders alone are rounded up
    remainders = units * shares - np.floor(units * shares + 1e-6)
    assert (np.abs(plan.quotas - units * shares) < 1).all()
    assert remainders[up].min(initial=1) >= remainders[~up].max(initial=0)
    assert np.abs(np.asarray(plan.quotas) / units / shares - 1).max() <= 0.01
    for block in (0, 1, 7):
        rows = [sources_of(sizes, plan.pool(t)) for t in range(block * plan.block, (block + 1) * plan.block)]
        if mix == "pools":
            assert all(len(set(row.tolist())) == 1 for row in rows)
            rows = [row[:1] for row in rows]
        else:  # and every pool of the block, rounded up or down
            per_pool = np.stack([np.bincount(row, minlength=len(sizes)) for row in rows])
            assert np.abs(per_pool - np.asarray(plan.quotas) / plan.block).max() < 1
        assert np.bincount(np.concatenate(rows), minlength=len(sizes)).tolist() == plan.quotas


def test_shares_of_a_few_pools_are_met_to_the_row():
    assert (PairPlan([99] * 3, [0.7, 0.2, 0.1], 16, "pools", 0).block, [7, 2, 1]) == (10, [7, 2, 1])
    assert PairPlan([99] * 3, [0.7, 0.2, 0.1], 16, "pools", 0).quotas == [7, 2, 1]
    rows = PairPlan([99] * 3, [0.7, 0.2, 0.1], 16, "rows", 0)
    assert (rows.block, rows.quotas) == (5, [56, 16, 8])
    assert PairPlan([99] * 3, [7.0, 1.0, 2.0], 16, "pools", 0).quotas == [7, 1, 2]


def test_the_seed_deals_the_quotas_anew_in_each_block():
    def sources(seed: int) -> list[tuple[int, ...]]:
        plan = PairPlan([99] * 3, [0.7, 0.2, 0.1], 8, "pools", seed)
        order = [int(sources_of([99] * 3, plan.pool(t))[0]) for t in range(100)]
        return [tuple(order[i : i + 10]) for i in range(0, 100, 10)]

    assert len(set(sources(0))) > 5 and sources(0) == sources(0) != sources(1)


def uneven_uses(sizes: list[int], weights: list[float] | None, source: int) -> int:
    """Pools after which some rows of a source were used twice more often than others of it; 200 are looked at."""
    plan = PairPlan(sizes, weights, 20, "rows", seed=0)
    used = np.zeros(sum(sizes), dtype=int)
    own = slice(sum(sizes[:source]), sum(sizes[: source + 1]))
    uneven = 0
    for t in range(200):
        used[plan.pool(t)] += 1
        uneven += used[own].max() - used[own].min() > 1
    assert used[own].max() > 2
    return uneven


@pytest.mark.parametrize(("sizes", "weights"), [([200, 600], None), ([165, 607], [1.0, 1.0]), ([31, 90], [0.3, 0.7])])
def test_rows_of_a_mixed_source_are_all_used_before_any_is_used_again(sizes, weights):
    assert uneven_uses(sizes, weights, 0) == uneven_uses(sizes, weights, 1) == 0
    assert uneven_uses([20, 500], [1.0, 1.0], 0) > 0  # of fewer rows than three pools take they are drawn anew


def test_mixed_rows_lie_in_any_order_in_the_pool():
    plan = PairPlan([500, 500], None, 16, "rows", seed=0)
    halves = np.array([sources_of([500, 500], plan.pool(t))[:8].sum() for t in range(200)])
    assert 3.5 < halves.mean() < 4.5 and halves.std() > 0.5  # a rank that has the first half gets both sources


def test_pools_per_epoch_is_the_time_of_the_slowest_source():
    assert PairPlan([100, 400], None, 10, "rows", 0).pools_per_epoch == 50
    assert PairPlan([100, 400], [0.5, 0.5], 10, "rows", 0).pools_per_epoch == 80
    assert PairPlan([100, 400], [0.5, 0.5], 10, "pools", 0).pools_per_epoch == 80
    assert PairPlan([100, 400], [0.9, 0.1], 10, "pools", 0).pools_per_epoch == 400


def test_sources_that_are_too_small_are_refused():
    PairPlan([16], None, 16, None, 0)
    with pytest.raises(
        RecipeError, match=r"data\.sources\.0: 15 rows are fewer than the 16 it gives to a pool of 16; l"
    ):
        PairPlan([15], None, 16, None, 0)
    with pytest.raises(RecipeError, match=r"data\.sources\.1: 15 rows are fewer than the 16 "):
        PairPlan([99, 15], None, 16, "pools", 0)
    PairPlan([99, 15], None, 16, "rows", 0)
    with pytest.raises(RecipeError, match=r"data\.sources\.1: 7 rows are fewer than the 8 .* or lower its weight"):
        PairPlan([99, 7], [1.0, 1.0], 16, "rows", 0)
    with pytest.raises(RecipeError, match=r"data\.sources\.1: a share of 1e-10 is too small to be kept"):
        PairPlan([99, 99], [1.0, 1e-10], 16, "rows", 0)
    with pytest.raises(ValueError, match="2 sources need a mix"):
        PairPlan([99, 99], None, 16, None, 0)
    for pool in (100, 113, 114):  # by size no source gives more than it has, up to a pool of all rows
        assert len(set(PairPlan([99, 15], None, pool, "rows", 0).pool(3).tolist())) == pool
