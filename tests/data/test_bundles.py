"""Bundles of neighbouring documents and the order of training that follows from them."""

import numpy as np
import pytest

from toolkit.data.bundles import BundlePlan, bundle
from toolkit.data.spans import PoolPlan
from toolkit.recipe.errors import RecipeError


def documents(*lengths: int) -> np.ndarray:
    return np.repeat(np.arange(len(lengths)), lengths)


def epoch(plan: BundlePlan | PoolPlan, number: int) -> np.ndarray:
    n = plan.pools_per_epoch
    return np.stack([plan.pool(t) for t in range(number * n, (number + 1) * n)])


def test_the_first_free_document_takes_its_best_free_neighbours():
    neighbours = np.array([[3, 1], [0, 2], [3, 1], [0, 5], [5, 1], [4, -1]])
    assert bundle(neighbours, 2).tolist() == [0, 3, 1, 2, 4, 5]
    assert bundle(neighbours, 3).tolist() == [0, 3, 1, 2, 4, 5]  # 2 finds nobody free and waits for the end
    assert bundle(neighbours[:, ::-1], 2).tolist() == [0, 1, 2, 3, 4, 5]


def test_neighbours_of_neighbours_fill_a_bundle_and_short_ones_come_last():
    chain = np.array([[2], [-1], [4], [-1], [0], [-1]])
    assert bundle(chain, 3).tolist() == [0, 2, 4, 1, 3, 5]
    short = np.array([[-1], [2], [1], [-1], [5], [4]])
    assert bundle(short, 2).tolist() == [1, 2, 4, 5, 0, 3]
    assert bundle(np.zeros((5, 0), dtype=np.int32), 2).tolist() == [0, 1, 2, 3, 4]


def test_every_document_is_in_one_bundle():
    random = np.random.default_rng(0)
    for size in (2, 3, 7, 40):
        neighbours = random.integers(-1, 500, (500, 5))
        assert sorted(bundle(neighbours, size).tolist()) == list(range(500))


def test_passages_of_a_bundle_are_dealt_in_turn():
    """As the paper deals: documents 2 (passages 4, 5) with 0 (0, 1), and 3 (6, 7) with 1 (2, 3)."""
    document, order = documents(2, 2, 2, 2), np.array([2, 0, 3, 1])
    plan = BundlePlan(document, order, 2, 4, seed=1)
    assert plan.pools_per_epoch == 2
    expected = [[4, 0, 5, 1], [6, 2, 7, 3]]
    assert sorted(epoch(plan, 0).tolist()) == expected
    whole = BundlePlan(document, order, 2, 8, seed=1)
    orders = {tuple(whole.pool(t).tolist()) for t in range(20)}
    assert orders == {(*expected[0], *expected[1]), (*expected[1], *expected[0])}  # the bundles are shuffled whole


def test_unequal_documents_of_a_bundle_are_mixed_to_the_end():
    """Of 30 and 10 passages every pool of 8 has 6 and 2; in plain turns the last two would be of one document."""
    document = documents(30, 10)
    pools = epoch(BundlePlan(document, np.array([1, 0]), 2, 8, seed=0), 0)
    assert [np.bincount(document[pool]).tolist() for pool in pools] == [[6, 2]] * 5
    assert sorted(pools.ravel().tolist()) == list(range(40))


def test_an_epoch_deals_each_passage_at_most_once_and_drops_less_than_a_pool():
    document = documents(*[1, 9, 2, 30, 5, 4, 11, 3, 8, 6])
    order = np.random.default_rng(3).permutation(10)
    for pool, size in ((4, 2), (5, 3), (16, 10), (79, 4)):
        plan = BundlePlan(document, order, size, pool, seed=2)
        for number in (0, 1):
            rows = epoch(plan, number).ravel()
            assert len(set(rows.tolist())) == len(rows) and set(rows.tolist()) <= set(range(len(document)))
            assert len(document) - len(rows) < pool


def test_pool_t_is_a_pure_function_of_seed_and_t():
    document, order = documents(*range(1, 60)), np.random.default_rng(0).permutation(59)
    one, other = (BundlePlan(document, order, 3, 8, seed=4) for _ in range(2))
    last = 3 * one.pools_per_epoch + 1
    forwards = [one.pool(t).tolist() for t in range(last)]
    assert forwards == [other.pool(t).tolist() for t in reversed(range(last))][::-1]
    n = one.pools_per_epoch
    assert forwards[:n] != forwards[n : 2 * n]  # every epoch has its own order
    assert BundlePlan(document, order, 3, 8, seed=5).pool(0).tolist() != forwards[0]


def topic_pairs(plan: BundlePlan | PoolPlan, topic: np.ndarray) -> float:
    """Share of a pool's pairs of passages that have one topic."""
    of_rows = topic[epoch(plan, 0)]
    return float((of_rows[:, :, None] == of_rows[:, None]).mean())


def test_neighbours_meet_in_a_pool_and_documents_in_random_order_do_not():
    """40 topics of 5 documents, scattered; a pool of 20 passages is a bundle."""
    topic = np.random.default_rng(1).permutation(np.repeat(np.arange(40), 5))
    neighbours = np.stack([np.flatnonzero(topic == each) for each in topic])
    document = documents(*[4] * 200)
    plan = BundlePlan(document, bundle(neighbours, 5), 5, 20, seed=0)
    assert topic_pairs(plan, topic[document]) == 1
    assert topic_pairs(PoolPlan(document, None, 20, 5, seed=0), topic[document]) < 0.35  # a fifth is the document


@pytest.mark.parametrize(
    ("pool", "size", "problem"),
    [
        (9, 2, "batch.pool: 9 passages are more than the data's 8; lower it or add data"),
        (4, 5, "data.interleave: 5 documents are more than the data's 4; lower it or add data"),
    ],
)
def test_too_little_data_is_refused(pool: int, size: int, problem: str):
    with pytest.raises(RecipeError) as caught:
        BundlePlan(documents(1, 2, 3, 2), np.arange(4), size, pool, seed=0)
    assert str(caught.value) == problem
