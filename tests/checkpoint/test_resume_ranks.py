"""A resumed engine against one that never stopped: on as many ranks bit for bit, on others to rounding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder
from distributed import run_on_ranks
from tiny import TARGETS, save_model

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": TARGETS}
NO_DROPOUT = LORA | {"dropout": 0.0}
MODELS = {
    "lora": {"lora": LORA, "objective__language_model__lora": LORA},
    "lora without dropout": {"lora": NO_DROPOUT, "objective__language_model__lora": NO_DROPOUT},
    "full": {"lora": None, "objective__language_model__lora": None},
}
# As the recipes of the paper: bf16 at ZeRO 1, for which DeepSpeed has an optimizer of its own.
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
CHANGES = {f"{zero} {model}": ZERO[zero] | MODELS[model] for zero in ZERO for model in ("lora", "full")} | OFFLOADED
CHANGES |= {"fp32 0 lora, temperature decays": ZERO["fp32 0"] | MODELS["lora"] | DECAY}
CHANGES |= {
    f"{zero} lora without dropout": ZERO[zero] | MODELS["lora without dropout"] for zero in ("fp32 0", "fp32 3")
}


def case_of(changes: dict[str, Any], of: str, control: str | None = None, method: str = "revela") -> dict[str, Any]:
    return {"changes": changes, "of": of, "control": control, "method": method}


CASES = {name: case_of(changes, name) for name, changes in CHANGES.items()}
QUEUE = "recontriever, queue and momentum"
CASES[QUEUE] = case_of({"lora": None, "zero__stage": 2}, QUEUE, method="recontriever")
CASES |= {
    f"{zero} full, saved before any step": case_of(ZERO[zero] | MODELS["full"], f"{zero} none", "before any step")
    for zero in ("bf16 0", "bf16 1", "fp32 0", "fp32 3")
}
# In make test-all only: each of their ZeRO stages, precisions, adapters and places of states is in others, too.
REST = ["bf16 0 lora", "bf16 2 lora", "fp32 0 lora", "fp32 2 lora", "fp32 0 full", "fp32 3 lora without dropout"]
REST += ["fp32 2 lora, optimizer offloaded"]
REST += [f"{zero} full, saved before any step" for zero in ("bf16 0", "bf16 1", "fp32 0")]
COVER = [name for name in CASES if name not in REST]
CONTROLS = {
    "forget_optimizer": case_of(OF_THE_PAPER | MODELS["lora"], "a", "forget_optimizer"),
    "forget_masters": case_of(OF_THE_PAPER | MODELS["full"], "b", "forget_masters"),
    "forget_extra": case_of(ZERO["fp32 0"] | MODELS["lora"] | DECAY, "c", "forget_extra"),
}
# Taken up on other numbers of ranks; without dropout, which each rank draws for itself. Full: more elements than ranks
# divide, so that every parameter is cut anew.
ELSEWHERE = {
    1: ["bf16 0 full", "bf16 2 full", "fp32 0 full", "fp32 3 lora without dropout", "bf16 3 full, all offloaded"],
    4: ["bf16 1 full", "fp32 0 lora without dropout", "fp32 2 full", "fp32 3 full", QUEUE],
}
MISTAKES = {
    "forget_optimizer": CASES["fp32 2 full"] | {"control": "forget_optimizer"},
    "forget_extra": CASES[QUEUE] | {"control": "forget_extra"},
}
OTHER_STAGE = "fp32 3 full, by ZeRO 2"


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root: Path = tmp_path_factory.mktemp("resume")
    folders = {name: str(save_model(root / name, "llama", seed)) for seed, name in enumerate(["llama", "llama_lm"])}
    return root, {"folders": folders, "checkpoints": str(root / "checkpoints")}


@pytest.fixture(scope="module")
def answer(asked: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    root, request = asked
    cases = {name: CASES[name] for name in COVER} | CONTROLS
    return run_on_ranks("resume_ranks.py", 2, request | {"cases": cases, "save": True}, root)


@pytest.fixture(scope="module")
def rest(asked: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    root, request = asked
    cases = {name: CASES[name] for name in REST}
    return run_on_ranks("resume_ranks.py", 2, request | {"cases": cases, "save": True}, root)


@pytest.mark.parametrize("case", COVER)
def test_a_resumed_engine_takes_the_same_steps(answer: dict[str, Any], case: str) -> None:
    assert_same_steps(answer[case])


@pytest.mark.full
@pytest.mark.parametrize("case", REST)
def test_further_resumed_engines_take_the_same_steps(rest: dict[str, Any], case: str) -> None:
    assert_same_steps(rest[case])


def assert_same_steps(got: dict[str, Any]) -> None:
    assert got["state"] and got["moved"] == got["arrays"] > 0 == got["not_as_saved"]
    assert got["resumed"] == got["whole"] and got["different"] == 0


@pytest.mark.parametrize("control", CONTROLS)
def test_a_checkpoint_read_in_part_would_be_seen(answer: dict[str, Any], control: str) -> None:
    got = answer[control]
    assert got["resumed"] != got["whole"] and got["different"] > 0


def furthest(a: list[list[float]], b: list[list[float]]) -> float:
    """Largest difference between losses and gradient norms, as a share of the larger."""
    x, y = np.array(a), np.array(b)
    return float((np.abs(x - y) / np.maximum(np.abs(x), np.abs(y))).max())


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.full), 4])
def test_other_ranks_take_up_a_checkpoint(
    ranks: int, asked: tuple[Path, dict[str, Any]], answer: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """The weights are those that were saved, bit for bit; losses and gradient norms go on to 1e-5 in fp32."""
    root, common = asked
    if any(name in REST for name in ELSEWHERE[ranks]):
        answer = answer | request.getfixturevalue("rest")
    cases = {name: CASES[name] for name in ELSEWHERE[ranks]} | MISTAKES
    cases[OTHER_STAGE] = CASES["fp32 2 full"] | {"changes": ZERO["fp32 3"] | MODELS["full"]}
    elsewhere = run_on_ranks("resume_ranks.py", ranks, common | {"cases": cases, "save": False}, root)
    for case in ELSEWHERE[ranks]:
        got = elsewhere[case]
        assert got["state"] and got["not_as_saved"] == 0 < got["arrays"], case
        bound = 1e-5 if "bf16" not in case else 0.02  # bf16 gradients are summed in another order
        assert furthest(got["resumed"], answer[case]["whole"]) < bound, (case, got["resumed"], answer[case]["whole"])
    of_stage_2 = answer["fp32 2 full"]["whole"]
    assert furthest(elsewhere[OTHER_STAGE]["resumed"], of_stage_2) < 1e-5  # so does another ZeRO stage
    assert furthest(elsewhere["forget_optimizer"]["resumed"], of_stage_2) > 1e-3
    assert furthest(elsewhere["forget_extra"]["resumed"], answer[QUEUE]["whole"]) > 1e-3


def test_bf16_at_stage_1_is_deepspeeds_own_optimizer(answer: dict[str, Any]) -> None:
    assert answer["bf16 1 lora"]["optimizer"] == answer["bf16 1 full"]["optimizer"] == "BF16_Optimizer"


@pytest.mark.full
def test_states_on_nvme_are_taken_up(tmp_path: Path) -> None:
    """Weights and moments come back bit for bit; DeepSpeed's kernel then rounds its bias correction otherwise.

    Its operation is compiled in five minutes, once.
    """
    if not AsyncIOBuilder().is_compatible():
        pytest.skip("this machine lacks libaio (libaio-dev)")
    names = ("llama", "llama_lm")  # wide enough that a rank's part passes 1 MiB: less DeepSpeed keeps in memory
    folders = {name: str(save_model(tmp_path / name, "llama", seed, width=256)) for seed, name in enumerate(names)}
    disk = {"nvme": str(tmp_path / "disk")}
    (tmp_path / "disk").mkdir()
    on_disk = {
        "fp32": {"precision": "fp32", "zero": {"stage": 3, "offload_optimizer": disk}},
        "bf16": {"precision": "bf16", "zero": {"stage": 3, "offload_optimizer": disk, "offload_param": disk}},
    }
    cases = {name: case_of(zero | MODELS["full"], name) for name, zero in on_disk.items()}
    cases["forgotten"] = case_of(on_disk["fp32"] | MODELS["full"], "forgotten", "forget_optimizer")
    request = {"folders": folders, "checkpoints": str(tmp_path / "checkpoints")}
    got = run_on_ranks("resume_ranks.py", 2, request | {"cases": cases, "save": True}, tmp_path)
    assert {path.parent.name for path in (tmp_path / "disk").rglob("exp_avg_sq-*")} == {"rank0", "rank1"}
    alone = run_on_ranks("resume_ranks.py", 1, request | {"cases": {"fp32": cases["fp32"]}, "save": False}, tmp_path)
    for name, bound in (("fp32", 1e-4), ("bf16", 0.02)):
        assert got[name]["state"] and got[name]["not_as_saved"] == 0 < got[name]["arrays"]
        assert furthest(got[name]["resumed"], got[name]["whole"]) < bound
    assert alone["fp32"]["not_as_saved"] == 0 < alone["fp32"]["arrays"]
    assert furthest(alone["fp32"]["resumed"], got["fp32"]["whole"]) < 1e-4
    assert furthest(got["forgotten"]["resumed"], got["forgotten"]["whole"]) > 1e-3
