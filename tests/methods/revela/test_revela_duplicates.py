"""Revela's weights with near-duplicates masked: value and gradient against the plain form, and what is logged."""

from pathlib import Path

import pytest
import torch
from tiny import build_objective, random_pools, revela_stage, save_model
from torch import Tensor

from toolkit.methods.revela.keys import RevelaObjective
from toolkit.methods.revela.near_duplicates import signatures
from toolkit.methods.revela.objective import Revela

ROWS, TEMPERATURE = 7, 0.05
MASKED = {"ngram": 3, "threshold": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama")


def objective(folder: Path, **changes: object) -> Revela:
    stage = revela_stage(lora=None, objective__language_model__lora=None, **changes)
    assert isinstance(stage.objective, RevelaObjective)
    return build_objective(stage, 0, "cpu", folder, None, folder)


def pairs(*masked: tuple[int, int]) -> Tensor:
    found = torch.eye(ROWS, dtype=torch.bool)
    for one, other in masked:
        found[one, other] = found[other, one] = True
    return found


ALONE = [(3, other) for other in range(ROWS)]  # row 3 has nothing left to read
MASKS = {"none": pairs(), "some": pairs((0, 1), (2, 5), (2, 6)), "a row alone": pairs((0, 1), *ALONE)}
MASKS["all"] = torch.ones(ROWS, ROWS, dtype=torch.bool)


def plain(query: Tensor, passage: Tensor, masked: Tensor) -> Tensor:
    """The softmax written out, pair by pair."""
    rows = []
    for i in range(ROWS):
        similarity = [query[i] @ passage[j] / TEMPERATURE for j in range(ROWS)]
        largest = max((float(s.detach()) for j, s in enumerate(similarity) if not masked[i, j]), default=0.0)
        share = [0 * s if masked[i, j] else (s - largest).exp() for j, s in enumerate(similarity)]
        total = torch.stack(share).sum()
        rows.append(torch.stack(share) / (total if total.detach() > 0 else 1))
    return torch.stack(rows)


@pytest.mark.parametrize("masked", MASKS.values(), ids=MASKS.keys())
def test_weights_are_those_of_the_plain_form_in_value_and_gradient(folder: Path, masked: Tensor):
    model = objective(folder, objective__similarity_dtype="fp64", objective__temperature=TEMPERATURE)
    generator = torch.Generator().manual_seed(1)
    query, passage, upstream = (torch.randn(ROWS, n, generator=generator).double() for n in (8, 8, ROWS))
    query, passage = ((x / x.norm(dim=1, keepdim=True)).requires_grad_() for x in (query, passage))

    def outcome(weights: Tensor) -> list[Tensor]:
        return [weights.detach(), *torch.autograd.grad((weights * upstream).sum(), (query, passage))]

    found, expected = (
        outcome(weights) for weights in (model.weights(query, passage, masked), plain(query, passage, masked))
    )
    another = outcome(plain(query, passage, pairs((4, 5))))
    for one, other, control in zip(found, expected, another, strict=True):
        assert float((one - other).abs().max()) < 1e-12
        assert float((one - control).abs().max()) > 1e-3
    weights, *gradients = found
    alone = masked.all(1)
    assert not weights[masked].any() and torch.allclose(weights.sum(1), (~alone).double())
    assert all(torch.isfinite(gradient).all() for gradient in gradients) and not gradients[0][alone].any()
    if not (masked ^ pairs()).any():
        assert weights.equal(model.weights(query, passage))


def test_copies_are_counted(folder: Path):
    """Rows 0 and 1 are copies: the log has 2 pairs of 56."""
    batch = random_pools(1, 8)[0]
    ids = [text[: int(mask.sum())].tolist() for text, mask in zip(*batch.text, strict=True)]
    batch = batch._replace(signature=signatures([ids[0], ids[0], *ids[2:]], 3))
    parts = objective(folder, data__near_duplicates=MASKED)(batch).parts
    total, count = parts["near_duplicates"]
    assert (float(total), float(count)) == (2, 56)
    assert "near_duplicates" not in objective(folder)(batch).parts


def test_a_pool_of_copies_is_read_as_plain_text(folder: Path):
    """All rows are copies: no weight, no gain, no row learns, and every gradient is finite."""
    batch = random_pools(1, 8)[0]
    copies = batch._replace(signature=signatures([[5, 6, 7, 8]] * 8, 3))
    model = objective(folder, data__near_duplicates=MASKED, objective__dual_loss=True)
    loss = model(copies)
    loss.total.backward()
    value = {name: float(total / count) for name, (total, count) in loss.parts.items()}
    assert value["near_duplicates"] == 1
    assert value["row_entropy"] == value["rows_with_gradient"] == value["weight_same_document"] == 0
    assert abs(value["gain"]) < 1e-6 < abs(float(objective(folder, objective__dual_loss=True)(batch).parts["gain"][0]))
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)
