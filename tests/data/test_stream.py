"""The stream of one rank: whose rows, in which order, and what happens to its thread."""

import threading
import time

import numpy as np
import pytest

from toolkit.data.bundles import BundlePlan
from toolkit.data.pairs import PairPlan
from toolkit.data.spans import PoolPlan
from toolkit.data.stream import StepData, Stream
from toolkit.determinism import batch_digest

DOCUMENT = np.repeat(np.arange(20), 10)
POOL, POOLS = 8, 4


def keep(pool: int, places: np.ndarray, rows: np.ndarray) -> tuple[int, list[int], list[int]]:
    return pool, places.tolist(), rows.tolist()


def plan() -> PoolPlan:
    return PoolPlan(DOCUMENT, None, POOL, 2, seed=3)


def stream(collate=keep, start=0, steps=5, **place) -> Stream:
    place = {"span": "world", "rank": 0, "world_size": 1} | place
    return Stream(plan(), collate, pools_per_step=POOLS, start_step=start, num_steps=steps, **place)


def read(**settings) -> list[StepData]:
    with stream(**settings) as opened:
        return list(opened)


def test_steps_hold_their_pools_in_order():
    pools = plan()
    for step, data in enumerate(read()):
        expected = [pools.pool(step * POOLS + k) for k in range(POOLS)]
        assert data.step == step
        numbers = range(step * POOLS, (step + 1) * POOLS)
        places = list(range(POOL))
        assert data.batches == [(t, places, pool.tolist()) for t, pool in zip(numbers, expected, strict=True)]
        assert data.digest == batch_digest(np.stack(expected)) and np.array_equal(data.rows, np.stack(expected))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_hold_the_rows_of_one(world_size: int):
    alone = read()
    for span in ("world", "rank"):
        ranks = [read(span=span, rank=rank, world_size=world_size) for rank in range(world_size)]
        for step, whole in enumerate(alone):
            parts = [rank[step] for rank in ranks]
            assert {part.digest for part in parts} == {whole.digest}
            if span == "world":  # every pool in slices, in rank order
                assert all(len(batch[2]) == POOL // world_size for part in parts for batch in part.batches)
                slices = zip(*(part.batches for part in parts), strict=True)
                joined = [
                    (of_pool[0][0], *([row for batch in of_pool for row in batch[k]] for k in (1, 2)))
                    for of_pool in slices
                ]
            else:  # whole pools, in rank order
                assert all(len(part.batches) == POOLS // world_size for part in parts)
                joined = [batch for part in parts for batch in part.batches]
            assert joined == whole.batches


def test_starting_late_is_resuming():
    late, whole = read(start=3, steps=9), read(steps=9)
    assert [data._replace(rows=data.rows.tolist()) for data in late] == [
        data._replace(rows=data.rows.tolist()) for data in whole[3:]
    ]
    assert read(start=5, steps=5) == []


@pytest.mark.parametrize(
    "plan",
    [
        PoolPlan(DOCUMENT, None, POOL, 2, seed=3),
        PoolPlan(DOCUMENT, 4, POOL, 2, seed=3),
        BundlePlan(DOCUMENT, np.arange(20), 4, POOL, seed=3),
        PairPlan([40, 300, 25], [0.7, 0.2, 0.1], POOL, "rows", 3),
        PairPlan([40, 300, 25], None, POOL, "pools", 3),
    ],
)
def test_a_step_is_found_without_those_before_it(plan):
    """Of a step that no replay would reach, the pools of the step alone are asked for, from at most two epochs each."""
    far, asked, pool = 10**14, [], plan.pool
    plan.pool = lambda t: asked.append(t) or pool(t)
    place = {"span": "world", "rank": 0, "world_size": 1}
    with Stream(plan, keep, pools_per_step=POOLS, start_step=far, num_steps=far + 1, **place) as opened:
        (data,) = opened
    assert data.step == far and set(asked) == set(range(far * POOLS, (far + 1) * POOLS))
    assert plan._epoch.cache_info().misses <= 2 * 3  # sources of the pairs


def test_ranks_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="3 ranks do not divide 8 rows"):
        stream(world_size=3)
    with pytest.raises(ValueError, match="8 ranks do not divide 4 pools"):
        stream(span="rank", world_size=8)


def test_a_failure_in_the_thread_reaches_the_consumer_after_the_good_steps():
    calls = []

    def fail_in_step_2(pool, places, rows):
        calls.append(1)
        if len(calls) > 2 * POOLS:
            raise KeyError("broken row")
        return keep(pool, places, rows)

    opened = stream(collate=fail_in_step_2)
    assert [next(opened).step, next(opened).step] == [0, 1]
    with pytest.raises(KeyError, match="broken row"):
        next(opened)
    assert list(opened) == []


def test_reads_two_steps_ahead_and_no_further():
    calls = []

    def count(pool, places, rows):
        calls.append(1)
        return keep(pool, places, rows)

    with stream(collate=count, steps=100) as opened:
        next(opened)
        until = time.monotonic() + 60
        while len(calls) < 4 * POOLS and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.2)
        assert len(calls) == 4 * POOLS  # step 0 taken, two waiting, one read and without room


def test_closing_ends_the_thread():
    before = threading.active_count()
    opened = stream(steps=100)
    next(opened)
    assert threading.active_count() == before + 1
    opened.close()
    assert threading.active_count() == before
    assert list(opened) == []
