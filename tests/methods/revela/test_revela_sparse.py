"""Revela with pairs left out: what is logged of it, where it stops, and that a bound of 0 leaves out nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build_objective, random_pools, revela_stage, save_model
from torch import Tensor

from toolkit.methods.objective import Loss
from toolkit.methods.revela.objective import Revela


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama")


def objective(folder: Path, **changes: Any) -> Revela:
    settings = {f"objective__{key}": value for key, value in changes.items()}
    stage = revela_stage(lora=None, objective__language_model__lora=None, **settings)
    return build_objective(stage, 0, "cpu", folder, None, folder)  # pyright: ignore


def logged(loss: Loss) -> dict[str, float]:
    return {name: float(total / count) for name, (total, count) in loss.parts.items()}


def test_what_is_read_and_lost_is_logged(folder: Path) -> None:
    batch = random_pools(1, 8)[0]
    model = objective(folder, min_weight=0.1, max_sources=3, max_dropped_mass=1)
    with torch.no_grad():
        w = model.weights(model.encoder(batch.query), model.encoder(batch.passage))
    largest = w.sort(1).values[:, -3:]
    above = largest[largest > 0.1]
    values = logged(model(batch))
    assert 0 < len(above) < w.numel() - len(w) and values["kept_sources"] == len(above) / len(w)
    assert abs(values["dropped_mass"] - float(w.sum() - above.sum()) / len(w)) < 1e-6
    everything = logged(objective(folder)(batch))
    assert everything["kept_sources"] == 7 and everything["dropped_mass"] == 0
    assert everything["in_batch_nll"] != values["in_batch_nll"]


@pytest.mark.parametrize("least", [{"min_weight": 0.1}, {"max_sources": 2}])
def test_a_run_that_loses_too_much_weight_stops(folder: Path, least: dict[str, float]) -> None:
    batch = random_pools(1, 8)[0]
    lost = logged(objective(folder, **least, max_dropped_mass=1)(batch))["dropped_mass"]
    objective(folder, **least, max_dropped_mass=lost * 1.001)(batch)
    with pytest.raises(ValueError, match=rf"^objective.max_dropped_mass: the rows lost {lost:.3g} of their weight"):
        objective(folder, **least, max_dropped_mass=lost * 0.999)(batch)


def test_weights_that_underflow_are_left_out_without_a_trace(folder: Path) -> None:
    """At temperature 1e-4 most weights are 0 in fp32: loss and gradients (in fp64) are those of reading every pair."""
    batch = random_pools(1, 8)[0]

    def outcome(keep: Callable[[Tensor], Tensor] | None) -> tuple[Loss, dict[str, Tensor]]:
        model = objective(folder, temperature=1e-4).double()
        model._keep = keep or model._keep
        loss = model(batch)
        loss.total.backward()
        return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    (dense, of_dense), (sparse, of_sparse) = outcome(lambda weights: torch.ones_like(weights).bool()), outcome(None)
    assert logged(sparse)["kept_sources"] < 3 < logged(dense)["kept_sources"] == 8
    assert abs(sparse.total.item() / dense.total.item() - 1) < 1e-12
    lossy, _ = outcome(lambda weights: (weights > 0) & (weights < 0.999))
    assert abs(lossy.total.item() / dense.total.item() - 1) > 1e-4
    for name, gradient in of_dense.items():
        assert float((of_sparse[name] - gradient).abs().max() / gradient.abs().max()) < 1e-12, name
