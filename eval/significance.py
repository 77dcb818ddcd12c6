"""Is the difference between two systems more than chance? Paired statistics over queries, by scipy."""

from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap, permutation_test

RESAMPLES = 9999


class Comparison(NamedTuple):
    """Mean difference after - before, its 95 % interval, two-sided p-value, and queries that rose, stayed or fell."""

    difference: float
    low: float
    high: float
    p_value: float
    wins: int
    ties: int
    losses: int


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
    batch = max(1, 4_000_000 // len(change))  # resamples at a time: 32 MB
    interval = bootstrap(
        (change,), np.mean, n_resamples=RESAMPLES, batch=batch, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    test = permutation_test(
        (after, before),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=batch,
        rng=np.random.default_rng(seed),
    )
    wins, losses = int((change > 0).sum()), int((change < 0).sum())
    return Comparison(
        float(change.mean()),
        float(interval.low),
        float(interval.high),
        float(test.pvalue),
        wins,
        len(change) - wins - losses,
        losses,
    )
