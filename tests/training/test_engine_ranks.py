"""Collectives and the first optimizer step on two ranks, in one launch."""

from pathlib import Path
from typing import Any

import pytest
from distributed import run_on_ranks
from tiny import save_model


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root: Path = tmp_path_factory.mktemp("engine")
    folders = {name: str(save_model(root / name, "llama", seed)) for seed, name in enumerate(["llama", "llama_lm"])}
    return run_on_ranks("engine_ranks.py", 2, folders, root)


def test_gathers_that_share_a_gradient(answer: dict[str, Any]) -> None:
    # d/dx of sum over ranks of sum_j w_j (rank + 1) (x_j + y_j): w_own * (1 + 2)
    assert answer["first"]["two_gathers"] == [3.0, 3.0] and answer["last"]["two_gathers"] == [6.0, 6.0]


def test_a_mistake_of_one_rank_is_told_by_all(answer: dict[str, Any]) -> None:
    for side in ("first", "last"):
        said = answer[side]["errors"]
        assert said["of_last"] == "rank 1 has no disk" and said["of_none"] == "fine"
        assert said["first"] == "from 1, with ümlaut" and said["result"] == {"rank": 0}
    assert [answer[side]["errors"]["of_zero"] for side in ("first", "last")] == ["RecipeError", "RankZeroFailed"]


def test_rows_come_in_order_though_they_travel_in_blocks(answer: dict[str, Any]) -> None:
    assert answer["first"]["blocks"] == answer["last"]["blocks"] == [0, 10, 11, 12, 13]


def test_a_pool_mean_counts_tokens_not_ranks(answer: dict[str, Any]) -> None:
    assert answer["first"]["uneven_mean"] == [(5 + 10) / (1 + 4), (5 / 1 + 10 / 4) / 2]  # world: one pool; rank: two


def test_nothing_stays_in_shared_memory(answer: dict[str, Any]) -> None:
    assert answer["first"]["shared_memory"] == answer["last"]["shared_memory"] == []


def test_at_its_floor_a_temperature_follows_the_pool_not_the_rank(answer: dict[str, Any]) -> None:
    for side, alone in (("first", [50, 70]), ("last", [0, 0])):
        assert answer[side]["floor"]["world"] == [0, pytest.approx(10)]
        assert answer[side]["floor"]["rank"] == pytest.approx(alone)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", ["0", "1", "2", "3", "2 offloaded", "3 offloaded"])
def test_the_first_step_is_adams_at_every_stage(answer: dict[str, Any], zero: str, precision: str) -> None:
    assert answer["first"]["updates"][f"{precision} {zero}"] == pytest.approx(1e-3, rel=0.01)
