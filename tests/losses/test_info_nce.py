"""info_nce against its definition, pair by pair in fp64, in value and gradient."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pairwise import pairwise
from torch import Tensor

from toolkit.losses.contrastive import info_nce

DIM = 6
DIRECTIONS = ("query_to_document", "document_to_query", "query_to_query", "document_to_document")


def gap(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference, relative to the tensor's largest entry (to 1e-3 if all are below it); inf if one is NaN."""
    gaps = [(x - y).abs().max() / y.abs().max().clamp(min=1e-3) for x, y in zip(a, b, strict=True)]
    return max(float(g) if g.isfinite() else float("inf") for g in gaps)


def pool(positives: int) -> dict[str, Any]:
    """Own rows 1 to 5 of a pool of 8 queries with padding, a document twice, and a query that shares a document."""
    torch.manual_seed(0)
    queries, documents = (F.normalize(torch.randn(n, DIM, dtype=torch.float64), dim=1) for n in (8, 8 * positives + 3))
    documents[-1] = documents[positives]  # of query 1
    document_keys = torch.arange(len(documents))[:, None] + 100
    document_keys[-1] = document_keys[positives]
    positive_keys = document_keys[: 8 * positives].view(8, positives, 1)
    query_keys = torch.cat([torch.arange(8)[:, None], positive_keys[..., 0]], 1)
    query_keys[7, 1] = query_keys[2, 1]
    present = torch.ones(5, positives, dtype=torch.bool)
    present[3], present[1, 1:] = False, False
    own = slice(1, 6)
    floats = {
        "query": queries[own],
        "positive": documents[: 8 * positives].view(8, positives, DIM)[own].clone(),
        "queries_all": queries,
        "documents_all": documents,
        "scale": torch.tensor(3.0, dtype=torch.float64),
    }
    floats["positive"][1, 1:] = -queries[2]  # padding with the lowest of scores
    return {name: x.clone().requires_grad_() for name, x in floats.items()} | {
        "present": present,
        "query_keys": query_keys[own],
        "all_query_keys": query_keys,
        "positive_keys": positive_keys[own],
        "document_keys": document_keys,
        "absent": torch.arange(len(documents)) % 5 == 4,
    }


def plain_info_nce(x: dict[str, Any], directions, partition, margin, threshold) -> tuple[Tensor, list[bool]]:
    """Pair by pair from the definition: a list of negatives per row, positive and direction."""
    losses, correct = [], []
    for i, query in enumerate(x["query"]):
        pairs = [p for p in range(x["present"].shape[1]) if x["present"][i, p]]
        positives = {p: query @ x["positive"][i, p] for p in pairs}
        terms, beaten = [], []
        for p in pairs:
            sums = []
            for direction in directions:
                from_query, to_query = direction.startswith("query"), direction.endswith("query")
                row = query if from_query else x["positive"][i, p]
                keys = set(x["query_keys"][i].tolist())
                keys |= set() if from_query else set(x["positive_keys"][i, p].tolist())
                reference = min(positives.values()) if from_query else positives[p]
                columns = x["queries_all"] if to_query else x["documents_all"]
                column_keys = x["all_query_keys"] if to_query else x["document_keys"]
                scores = []
                for j, column in enumerate(columns):
                    score = row @ column
                    allowed = to_query or not x["absent"][j]
                    allowed &= not keys & set(column_keys[j].tolist())
                    allowed &= margin is None or bool(score <= reference + margin)
                    allowed &= threshold is None or bool(score <= threshold)
                    scores += [score] if allowed else []
                sums.append(sum((x["scale"] * s).exp() for s in scores) + 0 * row.sum())
                if direction == "query_to_document":
                    beaten.append(all(bool(max(positives.values()) > s) for s in scores))
            top = (x["scale"] * positives[p]).exp()
            joined = [sum(sums)] if partition == "joint" else sums
            terms.append(sum(((top + s) / top).log() for s in joined) / len(joined))
        losses.append(sum(terms) / len(terms) if terms else 0 * query.sum())
        correct.append(bool(beaten) and all(beaten))
    return torch.stack(losses), correct


def flat(loss: Tensor, correct: Any, x: dict[str, Any]) -> list[Tensor]:
    weight = torch.linspace(1, 2, len(loss), dtype=loss.dtype)
    wanted = [v for v in x.values() if v.requires_grad]
    gradients = torch.autograd.grad((weight * loss).sum(), wanted, allow_unused=True, materialize_grads=True)
    return [loss.detach(), torch.as_tensor(correct).double(), *gradients]


METHOD = {
    "directions": [DIRECTIONS[:1], DIRECTIONS[:2], (DIRECTIONS[0], DIRECTIONS[2]), DIRECTIONS],
    "partition": ["separate", "joint"],
    "margin": [None, 0.1, -3.0],
    "threshold": [None, 0.3],
    "positives": [1, 3],
    "tile": [(3, 5), (2048, 2048)],
}


@pytest.mark.parametrize("case", pairwise(METHOD), ids=str)
def test_info_nce_equals_the_definition(case: dict[str, Any]) -> None:
    method = {name: case[name] for name in ("directions", "partition", "margin", "threshold")}
    x = pool(case["positives"])
    expected = flat(*plain_info_nce(x, **method), x)
    assert gap(flat(*info_nce(**x, **method, tile=case["tile"])[:2], x), expected) < 1e-12
    colder = x | {"scale": (2 * x["scale"]).detach().requires_grad_()}
    if expected[0].any():  # not where the margin leaves no negatives
        assert gap(flat(*info_nce(**colder, **method)[:2], colder), expected) > 1e-2


@pytest.mark.parametrize("dropped", ["query_keys", "document_keys", "absent", "present", "margin", "threshold"])
def test_info_nce_comparison_sees_what_is_missing(dropped: str) -> None:
    method = {"directions": DIRECTIONS, "partition": "joint", "margin": 0.1, "threshold": 0.3}
    x = pool(3)
    expected = flat(*plain_info_nce(x, **method), x)
    without = {"absent": None, "margin": None, "threshold": None, "present": torch.ones_like(x["present"])}
    without |= {name: x[name] + 10**6 for name in ("query_keys", "document_keys")}
    assert gap(flat(*info_nce(**(x | method))[:2], x), expected) < 1e-12
    assert gap(flat(*info_nce(**(x | method | {dropped: without[dropped]}))[:2], x), expected) > 1e-3


def test_info_nce_in_bf16() -> None:
    x = pool(3)
    narrow = {k: v.detach().bfloat16().requires_grad_() if v.is_floating_point() else v for k, v in x.items()}
    wide = {k: v.detach().double().requires_grad_() if v.is_floating_point() else v for k, v in narrow.items()}
    method = {"directions": DIRECTIONS, "partition": "joint", "margin": 0.1, "threshold": None}
    expected = flat(*plain_info_nce(wide, **method), wide)
    found = [t.double() for t in flat(*info_nce(**narrow, **method, tile=(3, 5))[:2], narrow)]
    assert gap(found[:2], expected[:2]) < 1e-6
    assert gap(found[2:], expected[2:]) < 2**-7  # sums of up to five gradients, each rounded to bf16
    assert gap(found[2:], expected[2:]) > 1e-4


@pytest.mark.parametrize(
    "wrong",
    [
        {"directions": ("document_to_query",)},
        {"directions": ("query_to_document", "query_to_document")},
        {"directions": ("query_to_document", "sideways")},
        {"partition": "both"},
    ],
)
def test_info_nce_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="; found"):
        info_nce(**pool(1), **wrong)
