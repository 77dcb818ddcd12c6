"""Paired statistics against a plain enumeration, and what must not count as a difference."""

import itertools

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from eval.significance import compare, holm, mean_interval, smallest_difference


def test_p_value_of_few_queries_is_the_exact_one():
    before = np.array([0.1, 0.4, 0.2, 0.9, 0.3, 0.5, 0.0, 0.8])
    after = np.array([0.5, 0.6, 0.2, 0.8, 0.9, 0.7, 0.3, 1.0])
    change = after - before
    means = np.array([np.mean(change * signs) for signs in itertools.product((1, -1), repeat=8)])
    exact = (np.abs(means) >= abs(change.mean()) - 1e-12).mean()
    result = compare(before, after, seed=0)
    assert result.p_value == pytest.approx(exact, abs=1e-12)
    assert result.difference == pytest.approx(change.mean(), abs=1e-12)
    assert (result.wins, result.ties, result.losses) == (6, 1, 1)


def test_interval_is_that_of_the_mean():
    rng = np.random.default_rng(3)
    before = rng.random(400)
    after = before + rng.normal(0.02, 0.2, 400)
    result = compare(before, after, seed=1)
    error = (after - before).std() / 20
    assert result.low == pytest.approx(result.difference - 1.96 * error, abs=0.15 * error)
    assert result.high == pytest.approx(result.difference + 1.96 * error, abs=0.15 * error)


def test_noise_is_not_significant_and_a_gain_is():
    rng = np.random.default_rng(4)
    before = rng.random(300)
    noise = compare(before, before + rng.normal(0, 0.1, 300), seed=0)
    gain = compare(before, before + rng.normal(0.05, 0.1, 300), seed=0)
    assert noise.p_value > 0.05 and noise.low < 0 < noise.high
    assert gain.p_value < 0.001 and gain.low > 0


def test_pairing_matters():
    """The same scores in another order: a small gain on every query is then lost among the queries' differences."""
    before = np.random.default_rng(5).random(200)
    after = before + 0.01
    assert compare(before, after, seed=0).p_value < 0.001
    assert compare(before, after[::-1].copy(), seed=0).p_value > 0.05


def test_deterministic_and_mirrored():
    rng = np.random.default_rng(6)
    before, after = rng.random(100), rng.random(100)
    result = compare(before, after, seed=9)
    assert result == compare(before, after, seed=9)
    assert result != compare(before, after, seed=10)
    back = compare(after, before, seed=9)
    assert (back.difference, back.wins) == (pytest.approx(-result.difference), result.losses)


def test_equal_systems():
    same = compare(np.array([0.5, 0.0, 1.0]), np.array([0.5, 0.0, 1.0]), seed=0)
    assert same == (0.0, 0.0, 0.0, 1.0, 0, 3, 0, None)


@pytest.mark.parametrize("queries", [3, 20, 200])
def test_the_smallest_difference_is_found_in_four_of_five_samples(queries: int):
    """Simulated: samples of the same spread around that difference; around 0.8 of it far fewer are found."""
    rng = np.random.default_rng(7)
    change = rng.standard_normal(queries)
    change = 0.3 * (change - change.mean()) / change.std(ddof=1)
    smallest = smallest_difference(change)
    assert smallest is not None and smallest_difference(change + 5) == pytest.approx(smallest)
    found = [
        np.mean(ttest_1samp(rng.normal(share * smallest, 0.3, (20_000, queries)), 0, axis=1).pvalue < 0.05)
        for share in (1.0, 0.8)
    ]
    assert found[0] == pytest.approx(0.8, abs=0.01)
    assert found[1] < 0.7


def test_the_randomisation_test_finds_about_as_much():
    rng = np.random.default_rng(8)
    smallest = smallest_difference(np.concatenate([np.full(20, 0.1), np.full(20, -0.1)]))
    assert smallest is not None
    spread = 0.1 * (40 / 39) ** 0.5
    found = [compare(np.zeros(40), rng.normal(smallest, spread, 40), seed=0).p_value < 0.05 for _ in range(150)]
    assert 0.7 < np.mean(found) < 0.9  # three standard errors


def test_holm_is_the_step_down_procedure():
    """Rejecting what is below alpha / (m - rank) until the first that is not, at any alpha, is p_holm < alpha."""
    rng = np.random.default_rng(9)
    for p_values in ([0.04, 0.01, 0.03, 0.02], [0.5], [0.01, 0.01, 0.9], rng.random(12) ** 3, []):
        adjusted = holm(p_values)
        for alpha in (0.011, 0.05, 0.0799, 0.3):
            rejected = set()
            for rank, place in enumerate(np.argsort(p_values, kind="stable")):
                if p_values[place] * (len(p_values) - rank) >= alpha:
                    break
                rejected.add(int(place))
            assert {place for place, p in enumerate(adjusted) if p < alpha} == rejected
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.03, 0.04]) != pytest.approx([0.06, 0.08])  # Bonferroni's


def test_interval_of_a_score():
    scores = np.random.default_rng(10).random(500)
    low, high = mean_interval(scores, seed=0)
    error = scores.std() / 500**0.5
    assert (low, high) == pytest.approx((scores.mean() - 1.96 * error, scores.mean() + 1.96 * error), abs=0.15 * error)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [([1.0], [1.0], "equally long"), ([1.0, 2.0], [1.0], "equally long"), ([1.0, np.nan], [1.0, 2.0], "not finite")],
)
def test_wrong_input(before: list[float], after: list[float], message: str):
    with pytest.raises(ValueError, match=message):
        compare(np.array(before), np.array(after), seed=0)
