"""Small sets of combinations: in which every pair of values of two factors occurs together, or every value (greedy).

And the factors that several tests of methods on ranks have in common.
"""

from itertools import combinations, product
from typing import Any

Pair = tuple[str, int, str, int]  # two factors, in order, and which of its values each has

# Largest relative errors of a loss and its gradients on ranks, against the dense form on one.
BOUNDS = {"loss": 1e-6, "gradient": 1e-6, "worst_array": 5e-6}


# Where a step runs: what every method on rows must not depend on.
PLACEMENT = {
    "zero": [0, 1, 2, 3],
    "lora": [True, False],
    "forward": [{}, {"forward_rows": 3}, {"forward_tokens": 30}],
    "span": ["rank", "world"],
}
_TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "bert": ["query", "value", "dense"]}


def lora_of(arch: str) -> dict[str, Any]:
    """The lora section of a stage that starts from a "llama" or a "bert"."""
    return {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": _TARGETS[arch]}


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


def each_value(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the cases, in their order, that hold every value of every factor which is in any of them."""
    values = [{f"{name}={value}" for name, value in case.items()} for case in cases]
    missing, chosen = set().union(*values), set()
    while missing:
        best = max(range(len(cases)), key=lambda place: len(missing & values[place]))
        chosen.add(best)
        missing -= values[best]
    return [cases[place] for place in sorted(chosen)]


def _pairs(names: list[str], case: dict[str, int], name: str, value: int) -> set[Pair]:
    """What the case covers with one factor at a value."""
    order = {other: place for place, other in enumerate(names)}
    ends = [((name, value), (other, i)) for other, i in case.items() if other != name]
    return {(*one, *two) if order[one[0]] < order[two[0]] else (*two, *one) for one, two in ends}
