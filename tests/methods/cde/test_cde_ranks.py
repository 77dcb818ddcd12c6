"""The cde method on 1, 2 and 4 ranks equals its plain one-process form: loss and all gradients of both stages.

`make test` runs cases that hold every value of every setting, out of a pairwise cover of them; `make test-all` runs the
whole cover, and the full product of placements.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from contextual import CAUSAL, TARGETS, context_keys, save_backbone
from distributed import run_on_ranks
from pairwise import each_value, pairwise

# Relative errors in fp64, and in fp32 what passes the rounding of the plain form: see test_revela_ranks.py. DeepSpeed
# keeps gradients in fp32 whatever the weights; without it they are compared in fp64.
BOUNDS = {"loss": 1e-6, "gradient": 1e-6, "worst_array": 5e-6}
BOUNDS_FP64 = {"loss": 1e-9, "gradient": 1e-9, "worst_array": 1e-9}
ARCHES = ("nomic_bert", "bert", "modernbert", "llama", "qwen3")
PLACEMENT = {
    "zero": [0, 1, 2, 3],
    "trained": ["full", "lora", "two adapters"],
    "forward": [{"forward_rows": 1}, {}, {"forward_rows": 3}, {"forward_tokens": 30}],
    "span": ["world", "rank"],
}
MODEL = {
    "arch": list(ARCHES),
    "causal": ["shared", "apart", "flattened"],  # how a causal model reads the context
    "fp64": [True, False],
    "activation_checkpointing": [False, True],
    "context": [
        {},
        {"null_probability": 0.3, "head": "plain"},
        {"vectors_per_document": 2, "head": "none"},
        {"position_weights": True, "soft_prompts": 3},
    ],
    "objective": [
        {},
        {"directions": ["query_to_document", "document_to_query"], "learn_temperature": True},
        {"false_negative_margin": 0.05, "matryoshka": [32, 12]},
    ],
}


def as_case(number: int, factors: dict[str, Any]) -> dict[str, Any]:
    arch, context = factors["arch"], dict(factors["context"])
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": TARGETS[arch]}
    changes: dict[str, Any] = {
        "zero__stage": factors["zero"],
        "lora": None if factors["trained"] == "full" else lora,
        "activation_checkpointing": factors["activation_checkpointing"],
        "batch__span": factors["span"],
    }
    changes |= {f"batch__{key}": value for key, value in factors["forward"].items()}
    changes |= {f"objective__{key}": value for key, value in factors["objective"].items()}
    if factors["trained"] == "two adapters":
        changes["objective__first_stage"] = {"adapter": lora}
    if arch in CAUSAL and factors["causal"] == "flattened":
        context |= {"form": "flattened", "positions": "consecutive", "width": 24}
    if arch in CAUSAL and factors["causal"] == "apart":
        changes["objective__share_prefix"] = False
    if "position_weights" in context:
        changes["encoder__pooling"] = "mean"
    case = {"arch": arch, "context": context_keys(arch, **context), "changes": changes}
    # The gradient of a learned temperature is a sum that cancels: of 0.6 % of the gradient's norm, and with a BERT in
    # fp32 right to 9e-6 only, whatever the engine does.
    learned = "objective__learn_temperature" in changes
    return case | {"fp64": factors["fp64"] or learned, "seed": number}


def full_product() -> list[dict[str, Any]]:
    """Every placement, with the model and the settings of the method taken in turn."""
    placements = [dict(zip(PLACEMENT, values, strict=True)) for values in product(*PLACEMENT.values())]
    settings = pairwise(MODEL)
    return [as_case(i, placement | settings[i % len(settings)]) for i, placement in enumerate(placements)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {kind: str(save_backbone(root / kind, kind, seed)) for seed, kind in enumerate(ARCHES)}


def controls() -> list[dict[str, Any]]:
    """Known mistakes, the reference's truncated cache first: each must miss the bounds, or the measure sees nothing."""
    factors = {key: values[0] for key, values in (PLACEMENT | MODEL).items()}
    return [
        as_case(0, factors) | {"control": "truncated"},
        as_case(0, factors | {"arch": "llama"}) | {"control": "truncated"},
        as_case(0, factors) | {"control": "own_slice_backward"},
        as_case(0, factors | {"arch": "llama"}) | {"control": "prefix_without_gradient"},
    ]


def causal_cases() -> list[dict[str, Any]]:
    """Adapted causal models: one prefix for all texts, with two adapters and with a small encoder as first stage."""
    factors = {key: values[0] for key, values in (PLACEMENT | MODEL).items()}
    again = {"activation_checkpointing": True, "forward": {"forward_rows": 3}}
    return [
        as_case(5, factors | {"arch": "qwen3", "trained": "lora", "zero": 1}) | {"first": "nomic_bert"},
        as_case(6, factors | again | {"arch": "llama", "trained": "two adapters", "zero": 3}),
        as_case(7, factors | {"arch": "qwen3", "trained": "two adapters", "zero": 2, "causal": "flattened"}),
    ]


def without_engine() -> list[dict[str, Any]]:
    """An encoder with all its parameters, and an adapted causal model with its prefix shared and not."""
    factors = {key: values[0] for key, values in (PLACEMENT | MODEL).items()}
    causal = factors | {"arch": "llama", "trained": "two adapters"}
    cases = [factors, factors | {"forward": {"forward_tokens": 30}}, causal, causal | {"causal": "apart"}]
    return [as_case(20 + i, case) | {"no_engine": True} for i, case in enumerate(cases)]


def exact(case: dict[str, Any], answer: dict[str, float]) -> bool:
    assert answer["smallest_array"] > 0  # every trainable weight has a gradient to compare
    bounds = BOUNDS_FP64 if case.get("no_engine") else BOUNDS
    return all(answer[figure] <= bound for figure, bound in bounds.items())


def check(
    world_size: int, cases: list[dict[str, Any]], folders: dict[str, str], folder: Path, mistakes: list[dict[str, Any]]
) -> None:
    request = {"folders": folders, "cases": cases + mistakes}
    answers = run_on_ranks("cde_matrix.py", world_size, request, folder, timeout=3500)
    assert len(answers) == len(cases) + len(mistakes)
    for mistake, answer in zip(mistakes, answers[len(cases) :], strict=True):
        assert not exact(mistake, answer), f"{mistake} went unnoticed: {answer}"
    results = zip(cases, answers[: len(cases)], strict=True)
    wrong = [(case, answer) for case, answer in results if not exact(case, answer)]
    assert not wrong, f"{len(wrong)} of {len(cases)} cases are off: {wrong[:3]}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_plain_form(world_size: int, folders: dict[str, str], tmp_path: Path) -> None:
    cover = pairwise(PLACEMENT | MODEL)
    cases = [as_case(cover.index(case), case) for case in each_value(cover)]
    assert {case["changes"]["zero__stage"] for case in cases} == {0, 1, 2, 3}
    cases += causal_cases() + without_engine()
    check(world_size, cases, folders, tmp_path, controls() if world_size == 2 else [])


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_plain_form_pair_by_pair(world_size: int, folders: dict[str, str], tmp_path: Path) -> None:
    check(world_size, [as_case(i, case) for i, case in enumerate(pairwise(PLACEMENT | MODEL))], folders, tmp_path, [])


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_plain_form_full_product(world_size: int, folders: dict[str, str], tmp_path: Path) -> None:
    check(world_size, full_product(), folders, tmp_path, [])
