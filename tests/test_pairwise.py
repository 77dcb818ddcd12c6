"""The covers of the equality tests: every pair of values, far fewer cases than the product."""

from itertools import combinations

from pairwise import each_value, pairwise


def test_every_pair_of_values_occurs() -> None:
    factors = {"a": [0, 1, 2, 3], "b": [True, False], "c": [{}, {"x": 1}, {"x": 2}], "d": [None, "d"], "e": [[1], [2]]}
    cover = pairwise(factors)
    for one, other in combinations(factors, 2):
        found = [(case[one], case[other]) for case in cover]
        assert all((p, q) in found for p in factors[one] for q in factors[other])
    assert len(cover) <= 16 < 4 * 2 * 3 * 2 * 2
    assert pairwise(factors) == cover


def test_every_value_occurs() -> None:
    factors = {"a": [0, 1, 2, 3], "b": [True, False], "c": [{}, {"x": 1}, {"x": 2}]}
    cover = pairwise(factors)
    few = each_value(cover)
    assert all(value in [case[name] for case in few] for name, values in factors.items() for value in values)
    assert len(few) == 4 < len(cover) and all(case in cover for case in few)
