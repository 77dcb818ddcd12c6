"""Is the difference between two systems more than chance? Paired statistics over queries, by scipy.

Called by eval.compare and eval.report.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.stats import bootstrap, nct, permutation_test, t

RESAMPLES = 9999
ALPHA, POWER = 0.05, 0.8


class Comparison(NamedTuple):
    """Mean difference after - before, its 95 % interval, two-sided p-value, and queries that rose, stayed or fell."""

    difference: float
    low: float
    high: float
    p_value: float
    wins: int
    ties: int
    losses: int
    smallest: float | None  # difference that these queries would show, see `smallest_difference`


def compare(before: np.ndarray, after: np.ndarray, seed: int) -> Comparison:
    """Paired comparison of two systems' scores on the same queries; a function of its arguments alone.

    The interval is the percentile bootstrap over queries, the test swaps the two systems' scores query by query
    (randomisation test; Smucker et al. 2007, doi 10.1145/1321440.1321528), each with 9,999 resamples.

    Args:
        before, after: scores [q], query by query.
        seed: of the resampling.

    Raises:
        ValueError: if the shapes differ, there are fewer than two queries, or a score is not finite.
    """
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if before.shape != after.shape or before.ndim != 1 or len(before) < 2:
        raise ValueError(
            f"a paired comparison needs two equally long lists of scores; found {before.shape}, {after.shape}"
        )
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise ValueError("a score is not finite")
    change = after - before
    test = permutation_test(
        (after, before),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=_batch(change),
        rng=np.random.default_rng(seed),
    )
    wins, losses = int((change > 0).sum()), int((change < 0).sum())
    return Comparison(
        float(change.mean()),
        *mean_interval(change, seed),
        float(test.pvalue),
        wins,
        len(change) - wins - losses,
        losses,
        smallest_difference(change),
    )


def mean_interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of at least two values, by 9,999 resamples."""
    interval = bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=_batch(values),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _batch(values: np.ndarray) -> int:
    return max(1, 4_000_000 // len(values))  # resamples at a time: 32 MB


def smallest_difference(change: np.ndarray) -> float | None:
    """The smallest true mean difference that a paired t-test (two-sided, 0.05) finds in 80 % of samples of this size.

    From the standard deviation of the queries' differences and the noncentral t distribution (Cohen 1988, Statistical
    Power Analysis for the Behavioral Sciences, chapter 2); the randomisation test finds about as much.

    Args:
        change: differences of at least two queries [q].

    Returns:
        None if the differences do not vary: they say nothing then.
    """
    error = float(np.std(change, ddof=1)) / len(change) ** 0.5
    if error == 0:
        return None
    freedom = len(change) - 1
    bound = float(t.ppf(1 - ALPHA / 2, freedom))

    def missing_power(shift: float) -> float:
        return POWER - float(nct.sf(bound, freedom, shift))  # what is found with the wrong sign is under 1e-4 there

    return error * float(brentq(missing_power, 0.0, 3 * bound))  # pyright: ignore[reportArgumentType]


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of one family, adjusted so that the chance of any false finding stays below the level (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values, np.float64)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted.tolist()
