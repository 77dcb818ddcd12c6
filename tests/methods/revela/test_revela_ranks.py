"""The Revela engine on 1, 2 and 4 ranks equals the dense one-process form in loss and in every gradient.

`make test` runs cases that hold every value of every setting, out of a pairwise cover of them; `make test-all` runs the
whole cover, in which every pair of values meets, and the full product of placements.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from distributed import run_on_ranks
from pairwise import BOUNDS, each_value, pairwise
from tiny import VOCABULARY, save_model

# In fp64, errors against the dense form. In fp32, by how much they pass the errors of the dense form in fp32, which are
# rounding (1e-6 to 3e-6 of the gradient's norm). The smallest known mistake gives more than 1e-2.
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["q_proj", "v_proj", "down_proj"]}
PLACEMENT = {
    "zero": [0, 1, 2, 3],
    "lora": [LORA, None],
    "forward": [{}, {"forward_rows": 3}, {"forward_tokens": 30}],
    "activation_checkpointing": [False, True],
    "span": ["rank", "world"],
}
METHOD = {
    "fp64": [True, False],
    "arch": ["llama", "qwen3"],
    "temperature": [0.05, 1e-4],
    "sparse": [{}, {"min_weight": 0.08}, {"max_sources": 3}],
    "v_norm": [True, False],
    "dual_loss": [False, True],
    "detach_kv": [False, True],
    "pooling": ["eos", "mean"],
    "near_duplicates": [None, {"ngram": 3, "threshold": 0.5}],
    "max_logits": [2**27, 3 * VOCABULARY],  # one chunk, and up to 86 that are of three tokens or empty
}


def as_case(number: int, factors: dict[str, Any]) -> dict[str, Any]:
    changes = {
        "zero__stage": factors["zero"],
        "lora": factors["lora"],
        "objective__language_model__lora": factors["lora"],
        "activation_checkpointing": factors["activation_checkpointing"],
        "batch__span": factors["span"],
        "encoder__pooling": factors["pooling"],
        "data__near_duplicates": factors["near_duplicates"],
    } | {f"objective__{key}": factors[key] for key in ("temperature", "v_norm", "dual_loss", "detach_kv")}
    changes |= {f"batch__{key}": value for key, value in factors["forward"].items()}
    changes |= {f"objective__{key}": value for key, value in factors["sparse"].items()} | {
        "objective__max_dropped_mass": 1
    }
    kept = {key: factors[key] for key in ("arch", "fp64", "max_logits")}
    return kept | {"seed": number, "changes": changes}


def full_product() -> list[dict[str, Any]]:
    """Every placement, with the settings of the method taken in turn from their own pairwise cover."""
    methods = pairwise(METHOD)
    placements = [dict(zip(PLACEMENT, values, strict=True)) for values in product(*PLACEMENT.values())]
    return [placement | methods[index % len(methods)] for index, placement in enumerate(placements)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    made = {}
    for seed, (name, kind) in enumerate(
        {"llama": "llama", "llama_lm": "llama", "qwen3": "qwen3", "qwen3_lm": "qwen3"}.items()
    ):
        made[name] = str(save_model(root / name, kind, seed, tie=kind == "qwen3"))
    return made


def controls(precisions: tuple[bool, ...]) -> list[dict[str, Any]]:
    """Known mistakes: each must miss the bounds, in fp64 (True) and in fp32 (False), or the measure sees nothing."""
    factors = {key: values[0] for key, values in (PLACEMENT | METHOD).items()} | {"span": "world"}
    names = ("own_slice_backward", "keys_without_gradient", "no_world_size", "mean_of_own_tokens")
    return [as_case(0, factors) | {"control": name, "fp64": fp64} for name in names for fp64 in precisions]


def exact(answer: dict[str, float]) -> bool:
    assert answer["smallest_array"] > 0  # every trainable weight has a gradient to compare
    return all(answer[figure] <= bound for figure, bound in BOUNDS.items())


def check(
    world_size: int, cases: list[dict[str, Any]], folders: dict[str, str], folder: Path, precisions: tuple[bool, ...]
) -> None:
    mistakes = {1: [], 2: controls(precisions), 4: controls(precisions)[:1]}[world_size]
    request = {"folders": folders, "cases": cases + mistakes}
    answers = run_on_ranks("revela_matrix.py", world_size, request, folder, timeout=3500)
    assert len(answers) == len(cases) + len(mistakes)
    for mistake, answer in zip(mistakes, answers[len(cases) :], strict=True):
        assert not exact(answer), f"{mistake} went unnoticed: {answer}"
    results = zip(cases, answers[: len(cases)], strict=True)
    wrong = [(case, answer) for case, answer in results if not exact(answer)]
    assert not wrong, f"{len(wrong)} of {len(cases)} cases are off: {wrong[:3]}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_dense_form(world_size: int, folders: dict[str, str], tmp_path: Path) -> None:
    cover = pairwise(PLACEMENT | METHOD)
    cases = [as_case(cover.index(factors), factors) for factors in each_value(cover)]
    assert {case["changes"]["zero__stage"] for case in cases} == {0, 1, 2, 3}
    check(world_size, cases, folders, tmp_path, (True,))


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_dense_form_pair_by_pair(world_size: int, folders: dict[str, str], tmp_path: Path) -> None:
    cases = [as_case(i, factors) for i, factors in enumerate(pairwise(PLACEMENT | METHOD))]
    check(world_size, cases, folders, tmp_path, (True, False))


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_dense_form_full_product(world_size: int, folders: dict[str, str], tmp_path: Path) -> None:
    check(world_size, [as_case(i, factors) for i, factors in enumerate(full_product())], folders, tmp_path, ())
