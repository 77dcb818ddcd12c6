"""ReContriever and MoCo against the authors' own numbers (fp64): weights, losses, gradient, queue, learning rate."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import revela_stage, stage_of
from torch import Tensor, nn

from toolkit.data.tokens import Tokens
from toolkit.losses.contrastive import relevance_weights
from toolkit.methods.objective import Loss
from toolkit.methods.recontriever.crops import CropBatch
from toolkit.methods.recontriever.keys import ReContrieverObjective
from toolkit.methods.recontriever.objective import Queue, ReContriever
from toolkit.training.schedule import learning_rate

FIXTURE = Path(__file__).parent.parent / "fixtures" / "recontriever" / "embed.npz"
DOCUMENTS, VIEWS = 3, 4
BOUND = 1e-9


def load(case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    with np.load(FIXTURE, allow_pickle=False) as data:
        given, expected = (
            {key.removeprefix(f"{kind}/{case}/"): data[key] for key in data if key.startswith(f"{kind}/{case}/")}
            for kind in ("given", "expected")
        )
    assert expected
    return given, expected


class Table(nn.Module):
    """An encoder whose vectors are given: row i of the table for the text [i]."""

    normalize = False

    def __init__(self, rows: np.ndarray) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(rows))

    def forward(self, tokens: Tokens) -> Tensor:
        return self.rows[tokens.input_ids[:, 0]]


def texts(rows: Tensor) -> Tokens:
    return Tokens(rows[:, None], torch.ones_like(rows[:, None]))


def objective(given: dict[str, Any], views: int, **changes: Any) -> ReContriever:
    """The objective with the authors' tables and queue, its momentum copy updated as they do before each forward."""
    keys = len(given["queue_before"].T)
    queue_settings = {"size": keys, "momentum": float(given["momentum"])}
    changes = {"temperature": float(given["temperature"]), "views": views, "queue": queue_settings} | changes
    stage = stage_of(
        "recontriever",
        batch__pool=DOCUMENTS,
        batch__pools_per_step=1,
        **{f"objective__{k}": v for k, v in changes.items()},
    )
    assert isinstance(stage.objective, ReContrieverObjective)
    queue = Queue(keys, given["queue_before"].shape[0], torch.float64, 0, "cpu")
    queue.keys = torch.tensor(given["queue_before"].T.copy())
    made = ReContriever(Table(given["q_table"]), stage.objective, stage.batch, queue)  # pyright: ignore
    assert made.momentum is not None
    made.momentum.average["rows"] = torch.tensor(given["k_table_before"])
    made.momentum.update()
    return made


def step(made: ReContriever, views: int) -> tuple[Loss, Tensor]:
    """Loss and gradient of the table."""
    keys = DOCUMENTS + torch.arange(views * DOCUMENTS)
    batch = CropBatch(texts(torch.arange(DOCUMENTS)), texts(keys), torch.arange(DOCUMENTS))
    loss = made(batch)
    loss.total.backward()
    gradient = made.encoder.rows.grad
    assert isinstance(gradient, Tensor)
    return loss, gradient


def gap(found: Any, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(found) - expected).max())


@pytest.mark.parametrize("case", ["pos", "neg"])
def test_relevance_aware_step(case: str) -> None:
    given, expected = load(case)
    expected = {key.removeprefix("step0/"): value for key, value in expected.items()}
    made = objective(given, VIEWS)
    loss, gradient = step(made, VIEWS)
    assert gap(loss.total.detach(), expected["loss"]) < BOUND
    assert gap(gradient, expected["grad_q_table"]) < BOUND
    keys = made._new_keys[0]
    assert gap(keys, expected["k"]) < BOUND
    scores = torch.einsum("bd,kbd->bk", made.encoder.rows[:DOCUMENTS], keys)  # pyright: ignore
    weights = relevance_weights(scores, "linear", None, False)
    assert gap(weights.T, expected["weights"]) < BOUND
    total, count = loss.parts["pair_nll"]
    assert gap(total / count, expected["pair_ce"].mean()) < BOUND
    correct, pairs = loss.parts["accuracy"]
    assert float(correct / pairs) * 100 == float(expected["accuracy_percent"])
    negative, pairs = loss.parts["negative_weights"]
    assert (int(negative), int(pairs)) == ((expected["weights"] < 0).sum(), DOCUMENTS * VIEWS)
    assert gap(loss.parts["std_key"][0], expected["stdk"]) < BOUND
    made.after_step(True)
    assert made.queue is not None
    assert gap(made.queue.keys.T, expected["queue_after"]) < BOUND
    assert made.queue.pointer == int(expected["queue_ptr_after"][0])


@pytest.mark.parametrize(
    ("views", "changes"),
    [(VIEWS, {"relevance": "none"}), (VIEWS, {"relevance": "softmax", "relevance_temperature": 1.0}),
     (VIEWS, {"temperature": 0.051})],
)  # fmt: skip
def test_other_settings_are_seen(views: int, changes: dict[str, Any]) -> None:
    given, expected = load("pos")
    loss, gradient = step(objective(given, views, **changes), views)
    assert gap(loss.total.detach(), expected["step0/loss"]) > 1e-3
    assert gap(gradient, expected["step0/grad_q_table"]) > 1e-3


def test_clamped_weights_are_seen_where_one_is_negative() -> None:
    given, expected = load("neg")
    loss, _ = step(objective(given, VIEWS, clamp_negative=True), VIEWS)
    assert gap(loss.total.detach(), expected["step0/loss"]) > 1e-3


def test_moco_is_a_setting() -> None:
    given, _ = load("pos")
    _, expected = load("moco")
    made = objective(given, 1, relevance="none")
    loss, gradient = step(made, 1)
    assert gap(loss.total.detach(), expected["loss"]) < BOUND
    assert gap(gradient, expected["grad_q_table"]) < BOUND
    made.after_step(True)
    assert made.queue is not None and gap(made.queue.keys.T, expected["queue_after"]) < BOUND


def test_the_queue_wraps_around() -> None:
    given, _ = load("pos")
    made = objective(given, VIEWS)
    assert made.queue is not None
    pointers = []
    for _ in range(3):
        step(made, VIEWS)
        pointers.append(made.queue.pointer)
        made.after_step(True)
    assert pointers == [0, 12, 0] and made.queue.pointer == 12


def test_learning_rate() -> None:
    given, expected = load("lr")
    warmup, total, _ = given["warmup_total_ratio"].astype(int).tolist()
    rates = {}
    for shape in ("linear_from_zero", "linear"):
        keys = {"lr": 1.0, "warmup_steps": warmup, "warmup": shape, "schedule": "linear", "steps": total}
        optim = revela_stage(optim=keys).optim
        rates[shape] = [learning_rate(optim, s) for s in range(total)]
    assert gap(rates["linear_from_zero"], expected["lr_used_at_step"][:total]) < 1e-12
    assert gap(rates["linear"], expected["lr_used_at_step"][:total]) > 0.1
