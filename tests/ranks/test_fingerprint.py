"""What ranks must have in common: what is compared, what is said, and that any rank's difference is seen by all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_on_ranks
from torch import nn

from toolkit.methods.objective import Objective
from toolkit.ranks.fingerprint import difference, weights_digest

HOSTS = ["a", "a", "b", "b"]
SAME = [12, 5, 6, 40, 7, 0]  # FACTS and whether it was asked to stop


def test_who_differs_from_most_is_named() -> None:
    assert difference([SAME] * 4, HOSTS) == ""
    assert difference([SAME, SAME, [*SAME[:5], 1], SAME], HOSTS) == ""  # asked to stop: no difference
    other_rows = [12, 9, *SAME[2:]]
    said = difference([SAME, SAME, other_rows, SAME], HOSTS)
    assert said.startswith("rank 2 (b): not the other ranks' rows, before step 12; ")
    assert difference([SAME, [12, 5, 6, 41, 7, 0], SAME, SAME], HOSTS).startswith(
        "rank 1 (a): not the other ranks' slices: 41, before step 12; "
    )
    assert difference([SAME, other_rows], HOSTS[1:3]).startswith(
        "rank 0 (a), rank 1 (b): have not the same rows, before step 12; "
    )


class Small(Objective):
    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Linear(3, 2, dtype=torch.bfloat16)
        self.frozen = nn.Linear(3, 2).requires_grad_(False)
        self.kept = torch.arange(4.0)

    def extra_state(self) -> dict[str, torch.Tensor]:
        return {"kept": self.kept}


def test_weights_differ_by_a_bit() -> None:
    module = Small()

    def digests() -> list[int]:
        return [weights_digest(module, zero, frozen) for zero, frozen in ((0, False), (0, True), (3, False))]

    before = digests()
    assert digests() == before and len(set(before)) == 3
    for tensor, seen in ((module.trained.weight, [0, 1]), (module.frozen.bias, [1]), (module.kept, [0, 1, 2])):
        bits = tensor.detach().view(torch.int16)
        bits.view(-1)[0] ^= 1
        assert [place for place, (a, b) in enumerate(zip(before, digests(), strict=True)) if a != b] == seen
        bits.view(-1)[0] ^= 1
    assert digests() == before


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("fingerprint")
    return run_on_ranks("fingerprint_ranks.py", 3, {}, folder)


@pytest.mark.parametrize("fact", ["rows", "shapes of the batch", "slices", "weights"])
def test_all_ranks_end_when_one_differs(fact: str, answer: dict[str, Any]) -> None:
    assert all(said.startswith("rank 1 (") and f"not the other ranks' {fact}" in said for said in answer[fact])
    assert len(set(answer[fact])) == 1


def test_ranks_that_agree_go_on_until_one_is_asked_to_stop(answer: dict[str, Any]) -> None:
    assert answer["the same"] == [[False, False, True]] * 3
