"""A small set of combinations in which every pair of values of two factors occurs together (greedy)."""

from itertools import combinations, product
from typing import Any

Pair = tuple[str, int, str, int]  # two factors, in order, and which of its values each has


def pairwise(factors: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Each combination begins with a pair that is still missing; factor by factor it takes what covers most others."""
    names = list(factors)
    missing = dict.fromkeys(
        (a, i, b, j)
        for a, b in combinations(names, 2)
        for i, j in product(range(len(factors[a])), range(len(factors[b])))
    )
    chosen = []
    while missing:
        a, i, b, j = next(iter(missing))
        case = {a: i, b: j}
        for name in names:
            if name not in case:
                values = range(len(factors[name]))
                case[name] = max(values, key=lambda value: len(missing.keys() & _pairs(names, case, name, value)))
        for name in names:
            for pair in _pairs(names, case, name, case[name]):
                missing.pop(pair, None)
        chosen.append({name: factors[name][case[name]] for name in names})
    return chosen


def _pairs(names: list[str], case: dict[str, int], name: str, value: int) -> set[Pair]:
    """What the case covers with one factor at a value."""
    order = {other: place for place, other in enumerate(names)}
    ends = [((name, value), (other, i)) for other, i in case.items() if other != name]
    return {(*one, *two) if order[one[0]] < order[two[0]] else (*two, *one) for one, two in ends}
