"""The contrastive loss with masks, soft targets and without in-batch negatives, against the numbers of CDE's authors.

Cases of which no numbers are at hand are compared with a dense form of their semantics, which has to give the others'.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import toolkit.losses.contrastive
import toolkit.losses.masks
from toolkit.data.pairs import PairBatch
from toolkit.data.tokens import Tokens
from toolkit.methods.contrastive.keys import ContrastiveObjective
from toolkit.methods.contrastive.objective import Contrastive
from toolkit.recipe.training import Batch

FIXTURE = Path(__file__).parent.parent / "fixtures" / "cde" / "loss.npz"
BOUND = 1e-9
GIVEN = ("a_plain", "b_threshold", "f_hard_neg_vs_positive", "g_hard_neg_no_in_batch")
# name -> (hard negatives of a row, threshold, in-batch negatives, scale, whether an id occurs twice)
DESCRIBED = {
    "c_vs_positive": (0, 1.0, True, 8.0, False),
    "d_hard_neg": (2, -1.0, True, 8.0, False),
    "e_hard_neg_threshold": (2, 0.45, True, 8.0, False),
    "h_same_id_twice": (2, -1.0, True, 8.0, True),
    "i_scale": (0, -1.0, True, 20.0, False),
    "twice_threshold": (2, 0.3, True, 8.0, True),
    "twice_vs_positive": (1, 1.0, True, 8.0, True),
    "twice_no_in_batch": (2, -1.0, False, 8.0, True),
}


class Case(NamedTuple):
    query: Tensor  # [B, dim], not of unit length
    document: Tensor  # [B * (1 + H), dim]: the documents, then the hard negatives of row 0, of row 1, ...
    id: Tensor  # int64 [B]
    num_hard: int
    threshold: float  # 1: relative; -1: none
    in_batch: bool
    scale: float
    surrogate_query: Tensor | None = None
    surrogate_document: Tensor | None = None


class Found(NamedTuple):
    loss: Tensor
    grad_query: Tensor
    grad_document: Tensor
    target: Tensor  # [B, B * (1 + H)], what each row's softmax is trained towards
    used: Tensor  # bool, the same: columns that are in a row's softmax


def given(name: str) -> tuple[Case, dict[str, Tensor]]:
    with np.load(FIXTURE, allow_pickle=False) as data:
        x, y = (
            {key.removeprefix(f"{kind}/{name}/"): torch.tensor(data[key]) for key in data if f"{kind}/{name}/" in key}
            for kind in ("given", "expected")
        )
    numbers = int(x["n_hard"]), float(x["threshold"]), bool(x["in_batch"]), float(x["scale"])
    return Case(x["eq"], x["ed"], x["idx"], *numbers, x.get("filter_q"), x.get("filter_d")), y


def described(name: str) -> Case:
    num_hard, threshold, in_batch, scale, twice = DESCRIBED[name]
    generator = torch.Generator().manual_seed(sorted(DESCRIBED).index(name))

    def random(rows: int, dim: int) -> Tensor:
        return torch.randn(rows, dim, generator=generator, dtype=torch.float64)

    ids = torch.arange(6) + 10
    if twice:
        ids[4] = ids[1]
    near = F.normalize(random(6, 5), dim=1)
    others = F.normalize(torch.cat([near + 0.4 * random(6, 5), random(6 * num_hard, 5)]), dim=1)
    filtered = (near, others) if threshold >= 0 else (None, None)
    return Case(random(6, 8), random(6 + 6 * num_hard, 8), ids, num_hard, threshold, in_batch, scale, *filtered)


def dense(case: Case) -> Found:
    """The semantics in one matrix: cosines, own documents by their id, fill of -1e10, mean over rows."""
    query, document = case.query.clone().requires_grad_(), case.document.clone().requires_grad_()
    rows, ids = len(query), torch.cat([case.id, case.id.repeat_interleave(case.num_hard)])
    own = case.id[:, None] == ids
    target = torch.eye(rows, len(document), dtype=torch.float64)
    if case.num_hard:
        target = own.double()
        target[:, rows:] = 0
    masked = torch.zeros_like(own)
    if case.surrogate_query is not None and case.surrogate_document is not None:
        similar = case.surrogate_query @ case.surrogate_document.T
        masked = similar >= (similar.diagonal()[:, None] if case.threshold == 1 else case.threshold)
    if not case.in_batch:
        masked |= ~own
    masked &= ~(target > 0)
    if case.num_hard:
        masked &= ~own
    logits = (F.normalize(query, dim=1) @ F.normalize(document, dim=1).T * case.scale).masked_fill(masked, -1e10)
    target = target / target.sum(1, keepdim=True)
    loss = -(target * logits.log_softmax(1)).sum(1).mean()
    return Found(loss.detach(), *torch.autograd.grad(loss, (query, document)), target, ~masked)


def ours(case: Case, **changes: Any) -> tuple[Found, dict[str, tuple[Tensor, Tensor]]]:
    """What the objective makes of a case, and its parts for the log; the columns in the order of the case."""
    rows, slots = len(case.id), 1 + case.num_hard
    order = torch.cat([torch.arange(rows)[:, None], rows + torch.arange(rows * case.num_hard).view(rows, -1)], 1)
    order = order.flatten()  # ours: row by row, the document and then its hard negatives
    settings: dict[str, Any] = {"name": "contrastive", "temperature": 1 / case.scale, "equal_queries": "joint"}
    settings["in_batch_negatives"] = case.in_batch
    if case.surrogate_query is not None:
        rule = {"rule": "relative", "eps": 0} if case.threshold == 1 else {"rule": "absolute", "cut": case.threshold}
        settings["false_negatives"] = {"surrogate": {"by": "previous"}} | rule
    objective = Contrastive(
        torch.nn.Identity(),  # pyright: ignore[reportArgumentType]
        ContrastiveObjective.model_validate(settings | changes),
        Batch(pool=rows, span="rank", pools_per_step=1, forward_rows=None),  # pyright: ignore[reportCallIssue]
    )
    query, document = case.query.clone().requires_grad_(), case.document.clone().requires_grad_()
    key = 100 + torch.arange(rows * slots).view(rows, slots)
    nothing = torch.zeros(rows, 1, dtype=torch.int64)
    batch = PairBatch(
        *(Tokens(nothing, nothing),) * 2,
        query_key=case.id,
        positive_key=key[:, :1],
        negative_key=key[:, 1:],
        known_key=key[:, :1],
        weight=torch.ones(rows, dtype=torch.float64),
        surrogate_query=case.surrogate_query,
        surrogate_document=None if case.surrogate_document is None else case.surrogate_document[order],
    )
    unit = F.normalize(query, dim=1), F.normalize(document, dim=1)[order]
    whole = objective.loss(*unit, batch, [])
    pool = objective.pool(*unit, batch)
    sides = unit[0], unit[1].view(rows, slots, -1), pool, batch, objective.scale(), objective.surrogate(batch, pool)
    of_rows = objective.info_nce(8, *sides).loss
    # d loss_i / d document_j = scale * (p_ij - t_ij) * query_i
    slopes = torch.stack([torch.autograd.grad(row, unit[1], retain_graph=True)[0] for row in of_rows])
    slopes = (slopes * unit[0][:, None]).sum(-1)[:, order.argsort()].detach() / case.scale
    used = slopes != 0
    logits = (unit[0] @ unit[1].T)[:, order.argsort()].detach() * case.scale
    target = logits.masked_fill(~used, float("-inf")).softmax(1) - slopes
    return Found(whole.total.detach(), *torch.autograd.grad(whole.total, (query, document)), target, used), whole.parts


def error(found: Any, expected: Any) -> float:
    """max |a - b| / max |b|"""
    return float((found - expected).abs().max() / expected.abs().max())


def errors(found: Found, expected: Found) -> float:
    return max(error(a.double(), b.double()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", GIVEN)
def test_the_authors_loss_and_gradients(name: str) -> None:
    case, expected = given(name)
    found, parts = ours(case)
    assert error(found.loss, expected["loss"]) < BOUND
    assert error(found.grad_query, expected["grad_q"]) < BOUND
    assert error(found.grad_document, expected["grad_d"]) < BOUND
    assert torch.equal(found.used, expected["masked"] == 0)
    assert torch.equal(found.target.round(decimals=6).double(), expected["positive"].double())
    if case.surrogate_query is not None:
        assert float(parts["masked"][0]) == float(expected["masked"].sum())
        assert float(parts["masked"][1]) == float((expected["positive"] == 0).sum())  # all negatives


@pytest.mark.parametrize("name", GIVEN)
def test_the_dense_form_gives_the_authors_numbers(name: str) -> None:
    case, expected = given(name)
    found = dense(case)
    assert error(found.loss, expected["loss"]) < BOUND
    assert error(found.grad_query, expected["grad_q"]) < BOUND
    assert error(found.grad_document, expected["grad_d"]) < BOUND
    assert torch.equal(found.used, expected["masked"] == 0)


@pytest.mark.parametrize("name", DESCRIBED)
@pytest.mark.parametrize("tile", [(2, 3), (2048, 2048)], ids=str)
def test_cases_that_are_described(name: str, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = toolkit.losses.contrastive.info_nce.__kwdefaults__ | {"tile": tile}
    monkeypatch.setattr(toolkit.losses.contrastive.info_nce, "__kwdefaults__", defaults)
    case = described(name)
    expected = dense(case)
    found, parts = ours(case)
    assert errors(found, expected) < BOUND
    if case.surrogate_query is not None:
        assert float(parts["masked"][0]) == float((~expected.used).sum()) > 0


MISTAKES: dict[str, dict[str, Any]] = {  # settings that are another case's
    "a_plain": {"temperature": 0.021},
    "b_threshold": {"false_negatives": None},
    "c_vs_positive": {"false_negatives": {"surrogate": {"by": "previous"}, "rule": "relative", "eps": 0.5}},
    "d_hard_neg": {"in_batch_negatives": False},
    "e_hard_neg_threshold": {"false_negatives": {"surrogate": {"by": "previous"}, "rule": "absolute", "cut": 0.9}},
    "f_hard_neg_vs_positive": {"false_negatives": {"surrogate": {"by": "previous"}, "rule": "absolute", "cut": 0.45}},
    "g_hard_neg_no_in_batch": {"in_batch_negatives": True},
    "h_same_id_twice": {"equal_queries": "apart"},
    "i_scale": {"temperature": 1 / 8},
    "twice_threshold": {"equal_queries": "apart"},
    "twice_vs_positive": {"false_negatives": None},
    "twice_no_in_batch": {"in_batch_negatives": True},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_comparison_sees_another_setting(name: str) -> None:
    case = given(name)[0] if name in GIVEN else described(name)
    expected = dense(case)
    assert errors(ours(case)[0], expected) < BOUND
    wrong = ours(case, **MISTAKES[name])[0]
    assert error(wrong.loss, expected.loss) > 1e-3
    assert error(wrong.grad_query, expected.grad_query) > 1e-3


def test_own_hard_negatives_would_be_masked_without_their_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """A surrogate masks whatever is near; that a row's own hard negatives stay is by their owner alone."""
    case = described("e_hard_neg_threshold")
    assert case.surrogate_query is not None
    own = case.surrogate_query.repeat_interleave(case.num_hard, 0)
    near = case._replace(surrogate_document=torch.cat([case.surrogate_query, own]))
    expected = dense(near)
    assert errors(ours(near)[0], expected) < BOUND
    plain = toolkit.losses.masks.leave_out_similar

    def forgetful(scores: Tensor, r: slice, c: slice, masks: Any, buffer: Tensor) -> Tensor:
        return plain(scores, r, c, masks._replace(column_owner=masks.column_owner - 1000), buffer)

    monkeypatch.setattr(toolkit.losses.contrastive, "leave_out_similar", forgetful)
    assert error(ours(near)[0].loss, expected.loss) > 1e-3
