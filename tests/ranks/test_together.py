"""Work of rank 0 that may outlast the ranks' patience: they hear of it meanwhile, and what it came to is everyone's."""

from pathlib import Path

import pytest
from distributed import run_on_ranks

from toolkit.ranks.together import together_for_long
from toolkit.recipe.errors import RecipeError


def test_two_ranks_hear_that_it_goes_on_and_how_it_ends(tmp_path: Path):
    first, second = run_on_ranks("long_ranks.py", 2, {"signs": 5}, tmp_path)
    assert first == [[0, 1, 2, 3, 4], "no", "KeyError", ["after", 0, 5]]
    assert second == [[0, 1, 2, 3, 4], "no", "RankZeroFailed", ["after", 1, 0]]  # it did nothing itself


def test_one_process_does_it_itself():
    def work(still):
        still()
        return {"a": [1]}

    assert together_for_long(work) == {"a": [1]}

    def refused(still):
        raise ValueError("no")

    with pytest.raises(RecipeError, match=r"^no$"):
        together_for_long(refused)
    with pytest.raises(KeyError):
        together_for_long(lambda still: {}["a"])
