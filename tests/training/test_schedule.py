"""Learning rates at the steps where they are known exactly."""

import math
from typing import Any

import pytest
from deepspeed.runtime.lr_schedules import WarmupDecayLR
from tiny import revela_stage
from torch import nn, optim

from toolkit.recipe.training import Optim
from toolkit.training.schedule import learning_rate


def settings(**changes: Any) -> Optim:
    keys = {"lr": 2.0, "warmup_steps": 4, "warmup": "linear", "schedule": "linear", "steps": 12, **changes}
    return revela_stage(optim=keys).optim


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [("linear", 0, 0.5), ("linear", 3, 2.0), ("linear", 4, 2.0), ("linear", 8, 1.0), ("linear", 11, 0.25),
     ("cosine", 4, 2.0), ("cosine", 8, 1.0), ("cosine", 11, 1 + math.cos(math.pi * 7 / 8)), ("constant", 11, 2.0)],
)  # fmt: skip
def test_values(schedule: str, step: int, expected: float) -> None:
    assert learning_rate(settings(schedule=schedule), step) == pytest.approx(expected, rel=1e-12)


def test_no_warmup_starts_at_the_peak() -> None:
    assert learning_rate(settings(warmup_steps=0), 0) == 2.0


def test_log_warmup_is_deepspeeds() -> None:
    """The authors train with DeepSpeed's WarmupDecayLR, log-shaped by default."""
    optimizer = optim.SGD(nn.Linear(1, 1).parameters(), lr=2.0)
    theirs = WarmupDecayLR(optimizer, total_num_steps=12, warmup_max_lr=2.0, warmup_num_steps=4)
    for step in range(12):
        theirs.step(step)
        assert learning_rate(settings(warmup="log"), step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12), step
    assert learning_rate(settings(), 2) != pytest.approx(learning_rate(settings(warmup="log"), 2))
