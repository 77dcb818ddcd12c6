"""Tiled contrastive losses against plain fp64 forms with every score at once, in value and gradient."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pairwise import pairwise
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.losses.contrastive import Negatives, cross_entropy, negatives, relevance_weights, smoothed
from toolkit.losses.masks import Surrogate

ROWS, COLUMNS, DIM = 23, 17, 6


def gap(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference, relative to the tensor's largest entry (to 1e-3 if all are below it); inf if one is NaN."""
    gaps = [(x - y).abs().max() / y.abs().max().clamp(min=1e-3) for x, y in zip(a, b, strict=True)]
    return max(float(g) if g.isfinite() else float("inf") for g in gaps)


def plain(
    rows, columns, scale, row_keys=None, column_keys=None, limit=None, absent=None, only=None, surrogate=None, **_
) -> Negatives:
    raw = rows @ columns.T
    left_out = torch.zeros(raw.shape, dtype=torch.bool)
    if row_keys is not None and column_keys is not None:
        left_out |= (row_keys[:, None, :, None] == column_keys[None, :, None, :]).flatten(2).any(2)
    if limit is not None:
        left_out |= raw > limit[:, None]
    if absent is not None:
        left_out |= absent
    if only is not None:
        left_out |= only[0][:, None] != only[1]
    masked = None
    if surrogate is not None:
        near = surrogate.rows @ surrogate.columns.T >= surrogate.limit[:, None] - 1e-12
        near &= surrogate.row_owner[:, None] != surrogate.column_owner
        masked = (near & ~left_out).sum(1)
        left_out |= near
    count = (~left_out).sum(1)
    mean = (scale * raw).masked_fill(left_out, 0).sum(1) / count.clamp(min=1)
    none = count == 0  # torch.logsumexp's gradient would be NaN there
    scores = (scale * raw).masked_fill(left_out, -math.inf).masked_fill(none[:, None], 0)
    lse = scores.logsumexp(1).masked_fill(none, -math.inf)
    return Negatives(lse, raw.detach().masked_fill(left_out, -math.inf).amax(1), mean, count, masked)


def masks(keys: bool, limit: bool, absent: bool, only: bool = False, surrogate: bool = False) -> dict[str, Any]:
    """Masks of some columns; row 4 has no column left as soon as there are keys or limits."""
    torch.manual_seed(1)
    chosen: dict[str, Any] = {}
    if keys:
        chosen = {"row_keys": torch.randint(0, 40, (ROWS, 3)), "column_keys": torch.randint(0, 40, (COLUMNS, 2))}
        chosen["column_keys"][:, 1] = 50
        chosen["row_keys"][4] = 50
    if limit:
        chosen["limit"] = torch.randn(ROWS, dtype=torch.float64) + 1
        chosen["limit"][4] = -1e6
    if absent:
        chosen["absent"] = torch.rand(COLUMNS) < 0.3
    if only:
        chosen["only"] = torch.randint(0, 2, (ROWS,)), torch.randint(0, 2, (COLUMNS,))
    if surrogate:
        sides = [F.normalize(torch.randn(n, 3, dtype=torch.float64), dim=1) for n in (ROWS, COLUMNS)]
        sides[1][5] = sides[0][6]  # the same vector is masked at its own cosine, whatever rounds in the products
        limit_of_rows = torch.rand(ROWS, dtype=torch.float64).where(torch.arange(ROWS) != 4, -2)
        limit_of_rows[6] = 1
        owners = torch.arange(ROWS), torch.arange(COLUMNS)
        chosen["surrogate"] = Surrogate(*sides, limit_of_rows, *owners)
    return chosen


def leaves(dtype: torch.dtype = torch.float64, norm: float = 1.0) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((ROWS, DIM), (COLUMNS, DIM), ())
    rows, columns, scale = (torch.randn(shape, dtype=torch.float64) * norm for shape in shapes)
    return [x.to(dtype).requires_grad_() for x in (rows, columns, scale.abs() + 2)]


def value_and_gradients(fn, inputs: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Every row's loss, mean, largest and count with the gradients of a weighted sum."""
    found = fn(*inputs, **options)
    torch.manual_seed(2)
    weight = torch.randn(2, len(found.lse), dtype=torch.float64).to(found.lse)
    losses = cross_entropy(torch.full_like(found.lse, 3.0), found.lse)
    total = (weight[0] * losses).sum()
    if found.mean is not None:
        total = total + (weight[1] * found.mean).sum()
    gradients = torch.autograd.grad(total, [x for x in inputs if x.requires_grad])
    left = found.largest > -math.inf
    values = [losses, left.double(), found.largest.masked_fill(~left, 0)]
    if found.num_masked is not None:
        values += [found.num_masked.double()]
    if options.get("with_mean"):
        values += [found.mean, found.num_negatives.double()]
    return [x.detach().double() for x in (*values, *gradients)]


def widened(inputs: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]


SWITCH = [False, True]
FACTORS = {
    **dict.fromkeys(("keys", "limit", "absent", "only", "surrogate", "with_mean"), SWITCH),
    "tile": [(5, 4), (23, 3), (99, 99)],
}


@pytest.mark.parametrize("case", pairwise(FACTORS), ids=str)
def test_negatives_equal_the_plain_form(case: dict[str, Any]) -> None:
    chosen = masks(*(case[name] for name in ("keys", "limit", "absent", "only", "surrogate")))
    options = chosen | {"with_mean": case["with_mean"]}
    expected = value_and_gradients(plain_with(case["with_mean"]), leaves(), options)
    found = value_and_gradients(negatives, leaves(), options | {"tile": case["tile"]})
    assert gap(found, expected) < 1e-12
    narrow = {name: x.float() if name == "limit" else x for name, x in chosen.items()}
    options = narrow | {"with_mean": case["with_mean"]}
    inputs = leaves(torch.float32)
    expected = value_and_gradients(plain_with(case["with_mean"]), widened(inputs), options)
    assert gap(value_and_gradients(negatives, inputs, options | {"tile": case["tile"]}), expected) < 3e-6


def plain_with(mean: bool):
    return lambda *inputs, **options: plain(*inputs, **options)._replace(**{} if mean else {"mean": None})


def test_the_comparison_sees_what_is_missing() -> None:
    chosen = masks(keys=True, limit=True, absent=True, only=True, surrogate=True)
    expected = value_and_gradients(plain_with(False), leaves(), chosen)
    assert gap(value_and_gradients(negatives, leaves(), chosen), expected) < 1e-12
    for dropped in ("keys", "limit", "absent", "only"):
        fewer = {name: x for name, x in chosen.items() if dropped not in name}
        assert gap(value_and_gradients(negatives, leaves(), fewer), expected) > 1e-3
    far = chosen | {"surrogate": chosen["surrogate"]._replace(limit=torch.full((ROWS,), 2.0))}
    assert gap(value_and_gradients(negatives, leaves(), far), expected) > 1e-3
    rows, columns, scale = leaves()
    halved = [rows, columns, (scale / 2).detach().requires_grad_()]
    assert gap(value_and_gradients(negatives, halved, chosen), expected) > 1e-3


def test_gradcheck() -> None:
    torch.manual_seed(0)
    rows, columns = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 4))
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    keys = {"row_keys": torch.arange(5)[:, None], "column_keys": torch.arange(4)[:, None]}

    def statistics(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        found = negatives(
            *inputs, **keys, absent=torch.tensor([False, True, False, False]), with_mean=True, tile=(2, 3)
        )
        assert found.mean is not None
        return found.lse, found.mean

    assert torch.autograd.gradcheck(statistics, (rows, columns, scale))


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_needs_a_gradient_gets_one(needed: tuple[bool, ...]) -> None:
    inputs = [x.detach().requires_grad_(need) for x, need in zip(leaves(), needed, strict=True)]
    expected = value_and_gradients(plain_with(False), widened(inputs), {})
    recorder = Recorder()
    with recorder:
        found = value_and_gradients(negatives, inputs, {})
    assert gap(found, expected) < 1e-12
    assert recorder.calls.count("addmm_") == 1  # one of the two products of the backward pass
    everything = Recorder()
    with everything:
        value_and_gradients(negatives, leaves(), {})
    assert everything.calls.count("addmm_") == 2


@pytest.mark.parametrize(("scale", "size"), [(100.0, 300), (1e4, 300), (100.0, 1), (1e4, 1)])
def test_no_overflow(scale: float, size: int) -> None:
    """Temperatures 0.01 and 1e-4; whole-numbered embeddings, so that fp32 scores are exact at every size."""
    torch.manual_seed(0)
    inputs = [torch.randint(-size, size + 1, (n, DIM)).float().requires_grad_() for n in (ROWS, COLUMNS)]
    inputs.append(torch.tensor(scale, requires_grad=True))
    expected = value_and_gradients(plain_with(False), widened(inputs), {})
    assert gap(value_and_gradients(negatives, inputs, {"tile": (5, 4)}), expected) < 1e-6
    unguarded = (scale * inputs[0] @ inputs[1].T).exp().sum(1).log()
    assert bool(unguarded.isinf().any())


def test_a_row_without_negatives_has_loss_and_gradient_zero() -> None:
    rows, columns, scale = leaves()
    positive = torch.zeros(ROWS, 2, dtype=torch.float64, requires_grad=True)
    everything = torch.zeros(ROWS, 1, dtype=torch.int64), torch.zeros(COLUMNS, 1, dtype=torch.int64)
    found = negatives(rows, columns, scale, row_keys=everything[0], column_keys=everything[1], with_mean=True)
    assert bool((found.lse == -math.inf).all()) and bool((found.largest == -math.inf).all())
    assert found.num_negatives is not None and not found.num_negatives.any()
    ce = cross_entropy(positive, found.lse)
    loss = ce + smoothed(ce, positive, found, 0.1)
    assert not loss.any()
    for gradient in torch.autograd.grad(loss.sum(), (rows, columns, scale, positive)):
        assert not gradient.any()
    none = negatives(rows, columns[:0], scale)
    assert bool((none.lse == -math.inf).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_widened_tile_by_tile(dtype: torch.dtype) -> None:
    """Values as in fp32; gradients are rounded once, to the input's format."""
    options = masks(keys=True, limit=False, absent=False)
    inputs = leaves(dtype)
    wide = widened(inputs)
    expected = value_and_gradients(plain_with(False), wide, options)
    found = value_and_gradients(negatives, inputs, options | {"tile": (5, 4)})
    assert gap(found[:3], expected[:3]) < 1e-6
    assert gap(found[3:], expected[3:]) < torch.finfo(dtype).eps / 2 + 3e-6
    narrow_scores = plain(*inputs, **options).lse.detach().double()
    left = narrow_scores > -math.inf
    assert gap([narrow_scores[left]], [plain(*wide, **options).lse.detach()[left]]) > 1e-4
    gradients = torch.autograd.grad(negatives(*inputs).lse.sum(), inputs)
    assert [g.dtype for g in gradients] == [dtype] * 3


def test_autocast_leaves_the_scores_wide() -> None:
    inputs = leaves(torch.float32)
    expected = negatives(*inputs).lse
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(negatives(*inputs).lse, expected)
        assert not torch.equal(plain(*inputs).lse, expected)


class Recorder(TorchDispatchMode):
    """The operations called, and the number of elements of the largest tensor that any of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.calls.append(func.overloadpacket.__name__)
        for x in made if isinstance(made, (tuple, list)) else (made,):
            self.largest = max(self.largest, x.numel() if isinstance(x, Tensor) else 0)
        return made


def test_no_tensor_has_a_score_for_every_pair() -> None:
    rows = torch.randn(128, 4, requires_grad=True)
    keys = torch.arange(256).view(128, 2)
    limits = torch.full((128,), 2.0)
    options: list[dict[str, Any]] = [
        {},
        {"row_keys": keys, "column_keys": keys},
        {"row_keys": keys * 0, "column_keys": keys * 0},
        {"limit": limits, "absent": limits < 0},
        {"with_mean": True},
    ]
    for option in options:
        recorder = Recorder()
        with recorder:
            negatives(rows, rows, 1.0, **option, tile=(16, 32)).lse.sum().backward()
        assert recorder.largest == 128 * 4  # rows, columns and their gradients; a tile has as many
        masked = bool({"isin", "masked_fill_", "logical_not_"} & set(recorder.calls))
        assert masked == bool(option)  # an option that is off costs nothing
    everything = Recorder()
    with everything:
        plain(rows, rows, 1.0).lse.sum().backward()
    assert everything.largest == 128 * 128


def test_other_refusals() -> None:
    rows, columns, scale = leaves()
    with pytest.raises(ValueError, match="both row_keys and column_keys"):
        negatives(rows, columns, scale, row_keys=torch.zeros(ROWS, 1, dtype=torch.int64))
    found = negatives(rows, columns, scale)
    with pytest.raises(ValueError, match="with_mean"):
        smoothed(found.lse, found.lse, found, 0.1)
    for how, temperature in (("softmax", None), ("cubic", 1.0)):
        with pytest.raises(ValueError, match=f"found {how}"):
            relevance_weights(torch.ones(1, 2), how, temperature, False)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_and_smoothing_equal_torchs(smoothing: float) -> None:
    """F.cross_entropy over a row's positive and its negatives, one positive at a time."""
    inputs = leaves()
    positive = torch.randn(ROWS, 2, dtype=torch.float64, requires_grad=True)
    keys = masks(keys=True, limit=False, absent=False)
    found = negatives(*inputs, **keys, with_mean=True, tile=(5, 4))
    assert found.num_negatives is not None
    ce = cross_entropy(positive, found.lse)
    assert torch.equal(ce, cross_entropy(positive, found.lse[:, None]))
    scores = inputs[2] * inputs[0] @ inputs[1].T
    same = (keys["row_keys"][:, None, :, None] == keys["column_keys"][None, :, None, :]).flatten(2).any(2)
    expected = torch.stack(
        [
            F.cross_entropy(torch.cat([p[None], row[~out]]), torch.tensor(0), label_smoothing=smoothing)
            for row, out, both in zip(scores, same, positive, strict=True)
            for p in both
        ]
    ).view(ROWS, 2)
    weight = torch.randn(ROWS, 2, dtype=torch.float64)

    def everything(loss: Tensor) -> list[Tensor]:
        gradients = torch.autograd.grad((weight * loss).sum(), (*inputs, positive), retain_graph=True)
        return [loss.detach(), *gradients]

    loss = smoothed(ce, positive, found, smoothing)
    assert gap(everything(loss), everything(expected)) < 1e-12
    more = smoothed(ce, positive, found, smoothing + 0.05)
    assert gap(everything(more), everything(expected)) > 1e-3
    one = smoothed(ce[:, 0], positive[:, 0], found, smoothing)
    assert torch.equal(one, loss[:, 0])


def test_relevance_weights_by_hand() -> None:
    scores = torch.tensor([[2.0, -1.0, 3.0], [-1.0, -3.0, -4.0], [0.0, 0.0, 5.0]], requires_grad=True)

    def weights(how: Any, clamp: bool, temperature: float | None = None) -> Tensor:
        found = relevance_weights(scores, how, temperature, clamp)
        assert not found.requires_grad
        assert torch.allclose(found.sum(1), torch.ones(3))
        return found

    third = 1 / 3
    linear = torch.tensor([[0.5, -0.25, 0.75], [0.125, 0.375, 0.5], [0.0, 0.0, 1.0]])
    clamped = torch.tensor([[0.4, 0.0, 0.6], [third, third, third], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(weights("linear", False), linear)
    torch.testing.assert_close(weights("linear", True), clamped)
    torch.testing.assert_close(weights("none", False), torch.full((3, 3), third))
    e = math.exp
    total = e(1.0) + e(-0.5) + e(1.5)
    torch.testing.assert_close(
        weights("softmax", False, 2.0)[0], torch.tensor([e(1.0) / total, e(-0.5) / total, e(1.5) / total])
    )
    torch.testing.assert_close(weights("softmax", True, 2.0)[1], torch.full((3,), third))
    assert not torch.allclose(weights("softmax", False, 1.0), weights("softmax", False, 2.0))
