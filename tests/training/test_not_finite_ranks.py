"""A loss or gradient of one rank that is not finite changes no weight and no moment on any, at every ZeRO stage."""

import math
from pathlib import Path
from typing import Any

import pytest
from distributed import run_on_ranks
from tiny import save_model

KINDS = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 0), ("bf16", 1), ("bf16", 2), ("bf16", 3)]
OFFLOADED = {"bf16 2": {"stage": 2, "offload_optimizer": "cpu"}, "bf16 3": {"stage": 3, "offload_optimizer": "cpu"}}
CASES = {
    f"{precision} {zero} {what}": {
        "changes": {"precision": precision, "zero__stage": zero},
        "what": what,
        "method": "revela",
    }
    for what, kinds in (("gradient", KINDS), ("loss", [KINDS[0], KINDS[2], KINDS[5]]), ("nothing", KINDS[:1]))
    for precision, zero in kinds
}
CASES |= {
    f"{name} gradient, optimizer offloaded": {
        "changes": {"precision": "bf16", "zero": zero},
        "what": "gradient",
        "method": "revela",
    }
    for name, zero in OFFLOADED.items()
}
CASES |= {
    f"queue and momentum {what}": {
        "changes": {"lora": None, "zero__stage": 2},
        "what": what,
        "method": "recontriever",
    }
    for what in ("gradient", "loss", "nothing")
}
CONTROLS = ["fp32 0 nothing", "queue and momentum nothing"]


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root: Path = tmp_path_factory.mktemp("not_finite")
    folders = {name: str(save_model(root / name, "llama", seed)) for seed, name in enumerate(["llama", "llama_lm"])}
    return run_on_ranks("not_finite_ranks.py", 2, {"folders": folders, "cases": CASES}, root)


@pytest.mark.parametrize("case", [case for case in CASES if case not in CONTROLS])
def test_the_step_is_as_if_it_had_not_been(case: str, answer: dict[str, Any]) -> None:
    got = answer[case]
    assert got["changed"] == got["different"] == 0 < got["moved"] == got["arrays"]
    assert not math.isfinite(float(got["grad_norm"]))
    assert math.isfinite(float(got["loss"])) == ("gradient" in case)


@pytest.mark.parametrize("control", CONTROLS)
def test_a_step_more_would_be_seen(control: str, answer: dict[str, Any]) -> None:
    got = answer[control]
    assert got["changed"] == got["arrays"] and got["different"] > 0
