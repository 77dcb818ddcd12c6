"""The contrastive objectives in one process: dropout under gradient caching, and the options of the loss."""

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_contrastive import ReContrieverReference, contrastive_loss
from tiny import build_objective, random_crops, random_pairs, save_model, stage_of, without_dropout
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import toolkit.slicing
from toolkit.data.pairs import PairBatch
from toolkit.methods.contrastive.keys import ContrastiveObjective
from toolkit.methods.contrastive.objective import Contrastive
from toolkit.methods.objective import Objective
from toolkit.methods.recontriever.keys import ReContrieverObjective
from toolkit.methods.recontriever.objective import ReContriever
from toolkit.models.backbone import read_config
from toolkit.recipe.errors import RecipeError
from toolkit.training.numbers import parameter_counts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with its usual dropout of 0.1."""
    return save_model(tmp_path_factory.mktemp("bert"), "bert")


def build(folder: Path, method: str, **changes: Any) -> Objective:
    return build_objective(stage_of(method, **{"lora": None} | changes), 3, "cpu", folder, None, None)


def gradients(objective: Objective, batch: Any) -> list[Tensor]:
    objective.zero_grad()
    torch.manual_seed(1)
    objective(batch).total.backward()
    found = [p.grad.clone() for p in objective.parameters() if p.grad is not None]
    assert found
    return found


def gap(a: list[Tensor], b: list[Tensor]) -> float:
    norm = torch.nn.utils.get_total_norm
    return float(norm([x - y for x, y in zip(a, b, strict=True)]) / norm(b))


LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.3, "targets": ["query", "value"]}


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("layers", [False, True], ids=["layers kept", "layers recomputed"])
@pytest.mark.parametrize("forward", [{"forward_rows": 3}, {"forward_tokens": 40}], ids=str)
def test_dropout_is_replayed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, lora: Any, layers: bool, forward: dict[str, int]
) -> None:
    changes = {f"batch__{key}": value for key, value in forward.items()}
    objective = build(folder, "contrastive", lora=lora, activation_checkpointing=layers, **changes)
    for name, parameter in objective.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    batch = random_pairs(1, 8, 1, 1)[0]
    recomputed = gradients(objective, batch)
    monkeypatch.setattr(toolkit.slicing, "checkpoint", lambda fn, *part, **_: fn(*part))
    kept = gradients(objective, batch)
    assert gap(recomputed, kept) < 1e-6
    forgetful = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    monkeypatch.setattr(toolkit.slicing, "checkpoint", lambda fn, *part, **_: forgetful(fn, *part))
    assert gap(gradients(objective, batch), kept) > 0.01


def test_recontriever_scores_with_dropout_on_both_sides(folder: Path) -> None:
    """As the authors do: the momentum encoder stays in training mode too."""
    objective = build(folder, "recontriever")
    assert isinstance(objective, ReContriever)
    batch = random_crops(1, 8, 3)[0]
    for _ in range(2):
        objective(batch)
    assert not torch.equal(*objective._new_keys)
    objective.eval()
    for _ in range(2):
        objective(batch)
    assert torch.equal(*objective._new_keys[2:])


# --------------------------------------------------------------------------- options of the loss


def test_a_rows_weight_counts(folder: Path) -> None:
    objective = build(folder, "contrastive").eval()
    assert isinstance(objective, Contrastive) and isinstance(objective.settings, ContrastiveObjective)
    batch = random_pairs(1, 8, 2, 1)[0]
    for weight in (torch.ones(8), batch.weight, torch.tensor([1.0] + [1e-9] * 7)):
        weighted = batch._replace(weight=weight)
        expected = contrastive_loss(objective.encoder, [weighted], objective.settings, objective.scale())
        assert float(objective(weighted).total) == pytest.approx(float(expected), rel=1e-5)
    assert float(objective(batch).total) != pytest.approx(float(objective(batch._replace(weight=torch.ones(8))).total))


def test_a_learned_temperature_moves_and_stays_above_its_floor(folder: Path) -> None:
    objective = build(folder, "contrastive", objective__learn_temperature=True)
    assert isinstance(objective, Contrastive) and objective.log_factor is not None
    before = float(objective.scale())
    assert before == pytest.approx(1 / 0.5)
    gradients(objective, random_pairs(1, 8, 1, 0)[0])
    assert objective.log_factor.grad is not None and float(objective.log_factor.grad.abs()) > 0
    objective.log_factor.data.fill_(89.0)
    assert float(objective.scale()) == 100
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(objective, random_pairs(1, 8, 1, 0)[0]))


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_at_its_floor_the_temperature_has_a_gradient_upwards_and_none_downwards(
    folder: Path, temperature: float
) -> None:
    """A positive gradient asks for a smaller scale, which is a higher temperature."""
    objective = build(folder, "contrastive", objective__learn_temperature=True, objective__temperature=temperature)
    assert isinstance(objective, Contrastive) and objective.log_factor is not None

    def found(log_factor: float, asked: float) -> tuple[float, float]:
        assert objective.log_factor is not None
        objective.log_factor.data.fill_(log_factor)
        objective.log_factor.grad = None
        scale = objective.scale()
        assert isinstance(scale, Tensor)
        scale.backward(torch.tensor(asked))
        assert objective.log_factor.grad is not None
        return float(scale), float(objective.log_factor.grad)

    for log_factor in (5.6, 20.0, 89.0, 200.0, 3e38):
        assert found(log_factor, 0.5) == (100, 50)
        assert found(log_factor, -0.5) == (100, 0)
        assert found(log_factor, 0.0) == (100, 0)
    for log_factor in (-3e38, -200.0, -1.0, 0.0, 1.5, math.log(100 * temperature) - 1e-3):
        for asked in (0.5, -0.5):
            free = math.exp(log_factor) / temperature
            assert found(log_factor, asked) == (pytest.approx(free, rel=1e-6), pytest.approx(asked * free, rel=1e-6))


def test_the_floor_is_left_at_once_however_long_it_was_leaned_on(folder: Path) -> None:
    """However long the loss asked for a still lower temperature, the first that asks for a higher one gets it."""
    objective = build(folder, "contrastive", objective__learn_temperature=True, objective__temperature=0.05)
    assert isinstance(objective, Contrastive) and objective.log_factor is not None
    optimizer = torch.optim.SGD([objective.log_factor], lr=1e-3)
    reached = []
    for asked in [-1.0] * 300 + [1.0] * 3:
        optimizer.zero_grad()
        scale = objective.scale()
        assert isinstance(scale, Tensor)
        scale.backward(torch.tensor(asked))
        optimizer.step()
        reached.append(float(objective.scale()))
    assert reached[0] < 100 and reached[299] == 100
    assert reached[302] < 90


def test_more_dimensions_than_the_model_has_are_refused(folder: Path) -> None:
    stage = stage_of("contrastive", lora=None, objective__matryoshka=[64, 8])
    with pytest.raises(RecipeError, match=r"objective\.matryoshka: 64 is more than the model's 32 dimensions"):
        parameter_counts(stage, {"retriever": read_config(folder)})


def test_a_surrogate_that_is_not_there_is_said_ahead(folder: Path, tmp_path: Path) -> None:
    def ahead(place: Path) -> None:
        surrogate = {"by": "retriever", "from": str(place)}
        rule = {"surrogate": surrogate, "rule": "absolute", "cut": 0.5}
        stage = stage_of("contrastive", lora=None, objective__false_negatives=rule)
        parameter_counts(stage, {"retriever": read_config(folder)})

    with pytest.raises(RecipeError, match=r"false_negatives\.surrogate\.from: .*/none: no such folder; name"):
        ahead(tmp_path / "none")
    ahead(tmp_path)


def test_accuracy_and_padding_are_logged(folder: Path) -> None:
    objective = build(folder, "contrastive", batch__forward_tokens=30).eval()
    batch: PairBatch = random_pairs(1, 8, 1, 1)[0]
    parts = objective(batch).parts
    correct, rows = (float(x) for x in parts["accuracy"])
    wasted, ran = (float(x) for x in parts["padding"])
    assert rows == 8 and 0 <= correct <= 8
    real = float(batch.query.attention_mask.sum() + batch.document.attention_mask.sum())
    assert (
        ran - wasted == real
        and wasted < batch.query.attention_mask.numel() + batch.document.attention_mask.numel() - real
    )


# --------------------------------------------------------------------------- the momentum encoder


def test_momentum_follows_in_fp32_where_bf16_would_stand_still(folder: Path) -> None:
    objective = build(folder, "recontriever", precision="bf16", objective__queue={"size": 192, "momentum": 0.9995})
    assert isinstance(objective, ReContriever) and isinstance(objective.settings, ReContrieverObjective)
    momentum = objective.momentum
    assert momentum is not None
    name, parameter = next((n, p) for n, p in objective.encoder.named_parameters() if p.dtype == torch.bfloat16)
    start = momentum.average[name].clone()
    assert start.dtype == torch.float32
    parameter.data += 1.0
    target = parameter.detach().float()
    for _ in range(10):
        momentum.update()
    expected = target + (start - target) * 0.9995**10
    assert float((momentum.average[name] - expected).abs().max()) < 1e-5
    still = start.bfloat16()
    for _ in range(10):
        still = 0.9995 * still + 0.0005 * parameter.detach()
    assert float((still.float() - expected).abs().max()) > 1e-4


def test_with_lora_the_momentum_copy_is_the_adapters_alone(folder: Path) -> None:
    objective = build(folder, "recontriever", lora=LORA)
    assert isinstance(objective, ReContriever) and objective.momentum is not None
    assert all("lora_" in name for name in objective.momentum.average)
    base = sum(p.numel() for p in objective.encoder.parameters() if not p.requires_grad)
    assert sum(t.numel() for t in objective.momentum.average.values()) < base / 4


def test_the_weights_are_back_after_the_key_pass(folder: Path) -> None:
    objective = build(folder, "recontriever").eval()
    assert isinstance(objective, ReContriever) and objective.momentum is not None
    batch = random_crops(1, 8, 3)[0]
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    for tensor in objective.momentum.average.values():
        tensor += 0.05
    objective(batch)
    assert all(torch.equal(p, before[name]) for name, p in objective.named_parameters())
    with torch.no_grad():
        other = objective.encoder(batch.key)
    assert not torch.allclose(objective._new_keys[0].flatten(0, 1), other)


def test_extra_state_comes_back(folder: Path) -> None:
    objective, fresh = (build(folder, "recontriever", batch__pools_per_step=1) for _ in range(2))
    objective(random_crops(1, 8, 3)[0])
    next(objective.encoder.parameters()).data += 0.1
    objective.after_step(True)
    state = objective.extra_state()
    assert int(state["queue.pointer"]) == 24
    assert any(not torch.equal(tensor, state[name]) for name, tensor in fresh.extra_state().items())
    fresh.load_extra_state({name: tensor.clone() for name, tensor in state.items()})
    assert all(torch.equal(tensor, state[name]) for name, tensor in fresh.extra_state().items())


def test_a_sharded_parameter_is_told_apart(folder: Path) -> None:
    objective = build(folder, "recontriever")
    assert isinstance(objective, ReContriever) and objective.momentum is not None
    next(objective.encoder.parameters()).data = torch.empty(0)
    with pytest.raises(ValueError, match="is not whole at ZeRO stage 3"):
        objective.momentum.update()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_five_optimizer_steps_equal_the_plain_loop(tmp_path: Path, smoothing: float) -> None:
    """Momentum, queue and AdamW together against a second encoder and a list of keys, as the method is written."""
    folder = without_dropout(save_model(tmp_path, "bert"))
    queue = {"size": 48, "momentum": 0.9, "dtype": "fp32"}
    changes = {"encoder__normalize": False, "batch__pools_per_step": 1, "objective__queue": queue}
    changes["objective__label_smoothing"] = smoothing
    objective = build(folder, "recontriever", batch__forward_tokens=40, **changes)
    assert isinstance(objective, ReContriever) and objective.queue is not None
    reference = ReContrieverReference(objective.settings, objective.queue.keys.clone())
    query_encoder = copy.deepcopy(objective.encoder)
    key_encoder = copy.deepcopy(objective.encoder)
    adam = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-3, "weight_decay": 0.01}
    ours = torch.optim.AdamW(objective.parameters(), **adam)
    theirs = torch.optim.AdamW(query_encoder.parameters(), **adam)
    for pool in random_crops(5, 8, 3):
        losses = [objective(pool).total, reference.loss(query_encoder, key_encoder, [pool])]
        assert float(losses[0]) == pytest.approx(float(losses[1]), rel=2e-6)
        for loss, optimizer in zip(losses, (ours, theirs), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        objective.after_step(True)
        with torch.no_grad():
            for k, q in zip(key_encoder.parameters(), query_encoder.parameters(), strict=True):
                k.mul_(0.9).add_(q, alpha=0.1)
    for (name, a), b in zip(objective.encoder.named_parameters(), query_encoder.parameters(), strict=True):
        assert float((a - b).abs().max()) < 1e-4 * max(1e-2, float(b.abs().max())), name
    assert objective.momentum is not None
    averages = objective.momentum.average
    moved = 0.0
    for (name, k), q in zip(key_encoder.named_parameters(), query_encoder.parameters(), strict=True):
        assert float((averages[name] - k).abs().max()) < 1e-4 * max(1e-2, float(k.abs().max())), name
        moved = max(moved, float((k - q).abs().max()))
    assert moved > 1e-3  # the two encoders are not one
