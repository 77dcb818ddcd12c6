"""The list-wise losses against the authors' own numbers: losses and gradients, scores in fp64 and in fp32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from toolkit.losses.listwise import infonce, kl, wasserstein

FIXTURE = Path(__file__).parent.parent / "fixtures" / "sycl" / "losses.npz"
BOUNDS = {"f64": 1e-9, "f32": 2e-5}
DTYPES = {"f64": torch.float64, "f32": torch.float32}
CASES = ("A_synth4", "B_temp005", "G_binary3")
# Names of the losses in the authors' numbers -> ours, as a mean over queries.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "ws2": wasserstein,
    "kl": lambda scores, grades, temperature: kl(scores, grades, temperature).mean(),
    "infonce": lambda scores, grades, temperature: infonce(scores, grades.shape[1], temperature).mean(),
}


def load(case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    with np.load(FIXTURE, allow_pickle=False) as data:
        given, expected = (
            {key.removeprefix(f"{kind}/{case}/"): data[key] for key in data if key.startswith(f"{kind}/{case}/")}
            for kind in ("given", "expected")
        )
    assert expected
    return given, expected


def error(found: Any, expected: Any) -> float:
    """max |a - b| / max |b|"""
    found, expected = (np.asarray(x, dtype=np.float64) for x in (found, expected))
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def value_and_gradient(name: str, scores: Tensor, grades: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    scores = scores.detach().requires_grad_()
    loss = LOSSES[name](scores, grades, temperature)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient.dtype == scores.dtype
    return loss.detach(), gradient


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_and_gradients(case: str, name: str, dtype: str) -> None:
    given, expected = load(case)
    scores, grades = torch.tensor(given["logits"]).to(DTYPES[dtype]), torch.tensor(given["label"])
    temperature, bound = float(given["T"]), BOUNDS[dtype]
    true = expected[f"{dtype}/{name}/loss"], expected[f"{dtype}/{name}/grad_logits"]
    found = value_and_gradient(name, scores, grades, temperature)
    assert error(found[0], true[0]) < bound
    assert error(found[1], true[1]) < bound
    # Mistakes that must be seen: another temperature, grades in another order, each in loss and gradient.
    for mistaken in ((scores, grades, temperature * 1.01), (scores.flip(1), grades, temperature)):
        wrong = value_and_gradient(name, *mistaken)
        assert error(wrong[0], true[0]) > 10 * bound and error(wrong[1], true[1]) > 10 * bound


@pytest.mark.parametrize("case", CASES)
def test_grades_as_wide_as_the_scores(case: str) -> None:
    given, expected = load(case)
    scores, grades = torch.tensor(given["logits"]), torch.tensor(given["label"])
    rows, size = grades.shape
    wide = torch.zeros(scores.shape).scatter(1, torch.arange(rows * size).view(rows, size), grades.float())
    for name in ("ws2", "kl"):
        loss, gradient = value_and_gradient(name, scores, wide, float(given["T"]))
        assert error(loss, expected[f"f64/{name}/loss"]) < BOUNDS["f64"]
        assert error(gradient, expected[f"f64/{name}/grad_logits"]) < BOUNDS["f64"]


@pytest.mark.parametrize("case", CASES)
def test_rows_rolled_a_uniform_prediction_and_the_target(case: str) -> None:
    given, expected = load(case)
    scores, grades = torch.tensor(given["logits"]), torch.tensor(given["label"])
    temperature = float(given["T"])
    rolled, uniform, least = (
        expected[f"f64/ws2/loss_{name}"] for name in ("rows_rolled", "uniform_pred", "pred_equals_target")
    )
    assert error(wasserstein(scores.roll(1, 0), grades, temperature), rolled) < BOUNDS["f64"]
    assert error(wasserstein(torch.zeros_like(scores), grades, temperature), uniform) < BOUNDS["f64"]
    rows, size = grades.shape
    target = torch.zeros_like(scores).scatter(1, torch.arange(rows * size).view(rows, size), grades.double())
    found = wasserstein(target * temperature, grades, temperature)
    # The authors' own least value has the rounding of eigenvalues of a square, 1e-17 beside 1e-15 below a root.
    assert abs(float(found) - least) < 1e-10
    assert abs(float(found) - least) < 0.002 * abs(least)
    assert abs(float(kl(scores.roll(1, 0), grades, temperature).mean()) - expected["f64/kl/loss"]) > 0.01
    assert abs(float(wasserstein(target, grades, 2 * temperature)) - least) > 1e-4
