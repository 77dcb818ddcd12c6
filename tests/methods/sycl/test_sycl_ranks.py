"""SyCL training on 1, 2 and 4 ranks equals its dense one-process form.

`make test` runs every ZeRO stage with both spans on two ranks, and what holds every value on one and on four;
`make test-all` runs the full product of placements on all.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from distributed import run_on_ranks
from pairwise import BOUNDS, PLACEMENT, each_value, lora_of, pairwise
from tiny import save_model, without_dropout

METHOD = {
    "arch": ["llama", "bert"],
    "losses": [
        {"wasserstein": 1.0},
        {"wasserstein": 1.0, "kl": 0.1},
        {"kl": 1.0},
        {"infonce": 0.5, "wasserstein_per_query": 1.0},
    ],
    "settings": [{}, {"label_scale": 2.0, "in_batch_grade": -0.5}],
    "size": [4, 3],
}
FP32_BOUND = 2e-5  # of a whole gradient beyond the dense form's own rounding: covariances magnify that of scores


def as_case(number: int, factors: dict[str, Any], fp64: bool = True) -> dict[str, Any]:
    arch, by = factors["arch"], "positive_first" if "infonce" in factors["losses"] else "random"
    changes = {
        "zero__stage": factors["zero"],
        "lora": lora_of(arch) if factors["lora"] else None,
        "batch__span": factors["span"],
        "encoder__pooling": {"llama": "eos", "bert": "mean"}[arch],
        "objective__losses": factors["losses"],
        "data__group": {"size": factors["size"], "by": by},
    }
    changes |= {f"batch__{key}": value for key, value in factors["forward"].items()}
    changes |= {f"objective__{key}": value for key, value in factors["settings"].items()}
    return {"arch": arch, "fp64": fp64, "seed": number, "changes": changes}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    made = {kind: str(save_model(root / kind, kind, seed)) for seed, kind in enumerate(["llama", "bert"])}
    without_dropout(root / "bert")
    return made


FIRST = {key: values[0] for key, values in (PLACEMENT | METHOD).items()} | {"span": "world"}
# Known mistakes, each with losses in which it shows: it must miss the bounds, or the measure sees nothing.
CONTROLS = [
    ("own_slice_backward", {"wasserstein": 1.0}),
    ("times_world_size", {"wasserstein": 1.0}),
    ("no_world_size", {"kl": 1.0}),
    ("first_row_is_own", {"kl": 1.0}),
]


def check(world_size: int, cases: list[dict[str, Any]], folders: dict[str, str], folder: Path) -> None:
    narrow = [as_case(0, FIRST | {"losses": losses}, fp64=False) for losses in METHOD["losses"][::2]]
    mistakes = [as_case(0, FIRST | {"losses": losses}) | {"control": name} for name, losses in CONTROLS]
    more = [*narrow, *mistakes] if world_size == 2 else []
    request = {"folders": folders, "cases": [*cases, *more]}
    answers = run_on_ranks("sycl_matrix.py", world_size, request, folder, timeout=3500)
    assert all(answer["smallest_array"] > 0 for answer in answers)  # every trainable weight has a gradient to compare

    def exact(answer: dict[str, float]) -> bool:
        return all(answer[figure] <= bound for figure, bound in BOUNDS.items())

    results = list(zip(request["cases"], answers, strict=True))
    wrong = [(case, answer) for case, answer in results[: len(cases)] if not exact(answer)]
    assert not wrong, f"{len(wrong)} of {len(cases)} cases are off: {wrong[:3]}"
    for case, answer in results[len(cases) :]:
        if "control" in case:
            assert not exact(answer), f"{case} went unnoticed: {answer}"
        else:
            assert max(answer["loss"], answer["gradient"]) < FP32_BOUND, (case, answer)


def in_turn(combinations: list[dict[str, Any]], others: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Cases of the combinations, with a pairwise cover of the other factors taken in turn."""
    covered = pairwise(others)
    return [as_case(i, each | covered[i % len(covered)]) for i, each in enumerate(combinations)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_dense_form(world_size: int, folders: dict[str, str], tmp_path: Path) -> None:
    shared = ("zero", "span")
    every = PLACEMENT | METHOD
    if world_size == 2:
        some = pairwise({key: every[key] for key in shared})
        cases = in_turn(some, {key: values for key, values in every.items() if key not in shared})
    else:
        cases = [as_case(i, case) for i, case in enumerate(each_value(pairwise(every)))]
    assert {case["changes"]["zero__stage"] for case in cases} == {0, 1, 2, 3}
    assert {tuple(case["changes"]["objective__losses"]) for case in cases} == {tuple(x) for x in METHOD["losses"]}
    check(world_size, cases, folders, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_dense_form_full_product(world_size: int, folders: dict[str, str], tmp_path: Path) -> None:
    """Every placement, with the method's settings taken in turn."""
    placements = [dict(zip(PLACEMENT, values, strict=True)) for values in product(*PLACEMENT.values())]
    check(world_size, in_turn(placements, METHOD), folders, tmp_path)
