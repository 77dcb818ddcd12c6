"""A resumed engine on two ranks gives the losses and weights of one that never stopped, bit for bit; in one launch."""

from pathlib import Path
from typing import Any

import pytest
from distributed import run_on_ranks
from tiny import TARGETS, save_model

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": TARGETS}
MODELS = {
    "lora": {"lora": LORA, "objective__language_model__lora": LORA},
    "full": {"lora": None, "objective__language_model__lora": None},
}
# As the recipes of the paper: bf16 at ZeRO 1, which DeepSpeed gives an optimizer and a checkpoint format of its own.
OF_THE_PAPER = {"precision": "bf16", "zero__stage": 1, "objective__similarity_dtype": "bf16"}
ZERO = {
    "bf16 0": {"precision": "bf16", "zero__stage": 0},
    "bf16 1": OF_THE_PAPER,
    "bf16 2": {"precision": "bf16", "zero__stage": 2},
    **{f"fp32 {stage}": {"precision": "fp32", "zero__stage": stage} for stage in (0, 2, 3)},
}
OFFLOADED: dict[str, dict[str, Any]] = {
    "fp32 2 lora, optimizer offloaded": {"zero": {"stage": 2, "offload_optimizer": "cpu"}} | MODELS["lora"],
    "bf16 3 full, all offloaded": {
        "precision": "bf16",
        "zero": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
        **MODELS["full"],
    },
}
DECAY = {"objective__temperature": {"start": 0.5, "end": 0.01}}
CHANGES = {f"{zero} {model}": ZERO[zero] | MODELS[model] for zero in ZERO for model in MODELS} | OFFLOADED
CHANGES |= {"fp32 0 lora, temperature decays": ZERO["fp32 0"] | MODELS["lora"] | DECAY}
CASES = {name: {"changes": changes, "control": None} for name, changes in CHANGES.items()}
CONTROLS = {
    "forget_optimizer": {"changes": OF_THE_PAPER | MODELS["lora"], "control": "forget_optimizer"},
    "forget_masters": {"changes": OF_THE_PAPER | MODELS["full"], "control": "forget_masters"},
    "forget_step": {"changes": ZERO["fp32 0"] | MODELS["lora"] | DECAY, "control": "forget_step"},
}


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root: Path = tmp_path_factory.mktemp("resume")
    folders = {name: str(save_model(root / name, "llama", seed)) for seed, name in enumerate(["llama", "llama_lm"])}
    request = {"folders": folders, "checkpoints": str(root / "checkpoints"), "cases": CASES | CONTROLS}
    return run_on_ranks("resume_ranks.py", 2, request, root)


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_engine_takes_the_same_steps(answer: dict[str, Any], case: str) -> None:
    got = answer[case]
    assert got["state"] and got["moved"] == got["arrays"] > 0
    assert got["resumed"] == got["whole"] and got["different"] == 0


@pytest.mark.parametrize("control", CONTROLS)
def test_a_checkpoint_read_in_part_would_be_seen(answer: dict[str, Any], control: str) -> None:
    got = answer[control]
    assert got["resumed"] != got["whole"] and got["different"] > 0


def test_bf16_at_stage_1_is_deepspeeds_own_optimizer(answer: dict[str, Any]) -> None:
    assert answer["bf16 1 lora"]["optimizer"] == answer["bf16 1 full"]["optimizer"] == "BF16_Optimizer"
