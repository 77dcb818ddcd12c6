"""Revela's weights in the recipe's number format, whose ties decide which rows learn; and their temperature's decay."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build_objective, random_pools, revela_stage, save_model
from torch import Tensor, nn
from torch.distributions import Normal

from toolkit.data.tokens import Tokens
from toolkit.methods.revela.objective import LEARNING_ROW, Revela

TAU, ROWS = 1e-4, 16  # the paper's; 15 candidates a row
DRAWS = 1000  # pools of a simulation, so 16,000 rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama", "llama")


def build(folder: Path, **changes: Any) -> Revela:
    stage = revela_stage(**{"lora": None, "objective__language_model__lora": None, "batch__pool": ROWS} | changes)
    return build_objective(stage, 3, "cpu", folder, None, folder)  # pyright: ignore


def of_dtype(folder: Path, dtype: str) -> Revela:
    return build(folder, objective__temperature=TAU, objective__similarity_dtype=dtype)


def weights_of(objective: Revela, similarity: Tensor) -> Tensor:
    """Unit queries pick one number of each passage, so that these are the similarities."""
    return objective.weights(torch.eye(len(similarity)), similarity.T)


def cosines(mean: float, spread: float, seed: int) -> Tensor:
    return mean + spread * torch.randn(ROWS, ROWS, generator=torch.Generator().manual_seed(seed))


def plain_weights(similarity: Tensor) -> Tensor:
    """Row by row over the others: bf16 similarities, divided in bf16; what is equal then has equal weight."""
    w = torch.zeros(ROWS, ROWS, dtype=torch.float64)
    for i in range(ROWS):
        others = [j for j in range(ROWS) if j != i]
        scaled = [float((s.bfloat16() / TAU).bfloat16()) for s in similarity[i, others]]
        powers = [math.exp(x - max(scaled)) for x in scaled]
        w[i, others] = torch.tensor([power / sum(powers) for power in powers], dtype=torch.float64)
    return w


def test_bf16_weights_and_their_gradient_are_those_of_the_plain_form(folder: Path) -> None:
    """bf16 keeps 8 bits: rounding of a weight is at most 2^-9 of it, of its gradient a few of those."""
    objective = of_dtype(folder, "bf16")
    similarity = cosines(0.9, 0.02, 0).requires_grad_()
    w, expected = weights_of(objective, similarity), plain_weights(similarity.detach())
    assert w.dtype == torch.bfloat16
    assert torch.allclose(w.double(), expected, rtol=2**-8, atol=1e-30)
    towards = torch.linspace(-1, 1, ROWS * ROWS, dtype=torch.float64).view(ROWS, ROWS).bfloat16()
    (gradient,) = torch.autograd.grad((w * towards).sum(), [similarity])
    inside = expected * (towards.double() - (expected * towards.double()).sum(1, keepdim=True)) / TAU
    assert float((gradient.double() - inside).norm() / inside.norm()) < 2**-6
    for other in ("fp32", "fp64"):  # the same similarities give other weights
        assert float((weights_of(of_dtype(folder, other), similarity.detach()) - expected).abs().max()) > 0.4


def test_exact_ties_share_the_weight_and_only_their_rows_get_a_gradient(folder: Path) -> None:
    similarity = torch.full((ROWS, ROWS), 0.5)
    similarity[:, 3], similarity[3, 4] = 0.9020, 0.9020  # of every row one stands out
    similarity[0, 5] = similarity[0, 7] = 0.9025  # within 2^-9 of the first: equal in bf16
    similarity[1, 5] = 0.8950  # two steps of bf16 below
    similarity.requires_grad_()
    w = weights_of(of_dtype(folder, "bf16"), similarity)
    assert torch.equal(w[0, [3, 5, 7]], torch.full((3,), 1 / 3, dtype=torch.bfloat16))
    assert float(w.detach()[1, 3]) == 1 and float(w.detach()[1, 5]) < 1e-12
    (gradient,) = torch.autograd.grad((w * torch.arange(ROWS)).sum(), [similarity])
    sizes = gradient.abs()
    assert float(sizes[0, [3, 7]].min()) > 0.1 / TAU
    sizes[0, [3, 5, 7]] = 0
    assert float(sizes.max()) < 1e-6
    exact = weights_of(of_dtype(folder, "fp32"), similarity.detach())
    assert float(exact[0, 3]) < 0.01 and torch.allclose(exact[0, [5, 7]], torch.tensor(0.5), atol=0.01)


def tie_chance(mean: float, spread: float) -> float:
    """Of two or more of 15 normal cosines that share the highest bf16 value of cosine / tau: exact, cell by cell."""
    grid = torch.arange(0x3E80, 0x3FC0, dtype=torch.int16).view(torch.bfloat16)  # all numbers from 0.25 to 1.5
    scaled = grid / TAU
    middles = (grid[1:].double() + grid[:-1].double()) / 2
    edges = middles[scaled[1:] != scaled[:-1]]  # numbers whose quotients are equal are one cell
    below = Normal(mean, spread, validate_args=False).cdf(edges).tolist()
    n = ROWS - 1
    return sum(high**n - low**n - n * (high - low) * low ** (n - 1) for low, high in pairwise(below))


class Vectors(nn.Module):
    """In place of the encoder: unit queries first, then passages with these similarities."""

    def __init__(self, similarity: Tensor) -> None:
        super().__init__()
        self.sides = iter([torch.eye(len(similarity)), similarity.T])

    def forward(self, tokens: Tokens) -> Tensor:
        return next(self.sides)


def logged(objective: Revela, similarity: Tensor, name: str) -> float:
    objective.encoder = Vectors(similarity)  # pyright: ignore[reportAttributeAccessIssue]
    total, count = objective(random_pools(1, ROWS)[0]).parts[name]
    return float(total / count)


def test_the_logged_share_counts_the_tied_rows(folder: Path) -> None:
    for seed in range(3):
        similarity = cosines(0.95, 0.005, seed)
        w = plain_weights(similarity)
        tied = sum(int((row == row.max()).sum()) > 1 for row in w)
        assert 0 < tied < ROWS
        assert logged(of_dtype(folder, "bf16"), similarity, "rows_with_gradient") == tied / ROWS
        assert logged(of_dtype(folder, "fp32"), similarity, "rows_with_gradient") < tied / ROWS


@pytest.mark.parametrize(
    ("mean", "spread", "published"),
    [
        (0.9, 0.02, {"bf16": 0.25, "fp32": 0.04}),
        (0.8, 0.05, {"bf16": 0.11, "fp32": 0.017}),
        (0.95, 0.005, {"bf16": 0.72, "fp32": 0.18}),
    ],
)
def test_shares_of_rows_that_learn(folder: Path, mean: float, spread: float, published: dict[str, float]) -> None:
    """Five standard errors of 16,000 rows, and half of the last digit of the specification's own simulation.

    A row learns there if 1 - sum w^2 is above 0.01; in fp32 more do by the logged 0.001. bf16 knows nothing between.
    """
    chance = tie_chance(mean, spread)
    error = 5 * math.sqrt(chance * (1 - chance) / (DRAWS * ROWS))
    for dtype, share in published.items():
        objective = of_dtype(folder, dtype)
        w = torch.cat([weights_of(objective, cosines(mean, spread, seed)).float() for seed in range(DRAWS)])
        learns = 1 - w.square().sum(1)
        found, of_log = (float((learns > least).float().mean()) for least in (0.01, LEARNING_ROW))
        assert abs(found - share) < error + 0.005
        if dtype == "bf16":
            assert found == of_log and abs(found - chance) < error
        else:
            assert of_log > 1.2 * found and chance - of_log > 5 * error


# --------------------------------------------------------------------------- a temperature that decays


def decaying(folder: Path, steps: int) -> Revela:
    return build(folder, objective__temperature={"start": 0.5, "end": 0.005}, optim__steps=steps)


def test_a_decay_starts_at_start_and_ends_at_end(folder: Path) -> None:
    objective, similarity = decaying(folder, 5), cosines(0.5, 0.1, 0)
    for tau in (0.5, 0.5 / 10**0.5, 0.05, 0.05 / 10**0.5, 0.005):
        assert math.isclose(objective.temperature, tau, rel_tol=1e-12)
        assert math.isclose(logged(objective, similarity, "temperature"), tau, rel_tol=1e-6)
        w, constant = (weights_of(o, similarity) for o in (objective, build(folder, objective__temperature=tau)))
        assert torch.equal(w, constant)
        objective.after_step(True)
    assert not torch.allclose(weights_of(decaying(folder, 5), similarity), w)


def test_the_step_of_a_decay_is_kept_and_a_constant_keeps_nothing(folder: Path) -> None:
    trained, again = decaying(folder, 7), decaying(folder, 7)
    for _ in range(3):
        trained.after_step(True)
    again.load_extra_state(trained.extra_state())
    assert again.temperature == trained.temperature != decaying(folder, 7).temperature
    constant = build(folder)
    for _ in range(3):
        constant.after_step(True)
    assert constant.extra_state() == {} and constant.temperature == 0.05
