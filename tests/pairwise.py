"""A small set of combinations in which every pair of values of two factors occurs together (greedy)."""

from itertools import combinations, product
from typing import Any


def pairwise(factors: dict[str, list[Any]]) -> list[dict[str, Any]]:
    names = list(factors)
    everything = [dict(zip(names, values, strict=True)) for values in product(*factors.values())]
    missing = set().union(*(_pairs(case) for case in everything))
    chosen = []
    while missing:
        best = max(everything, key=lambda case: len(_pairs(case) & missing))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _pairs(case: dict[str, Any]) -> set[tuple[Any, ...]]:
    return {(a, str(case[a]), b, str(case[b])) for a, b in combinations(case, 2)}
