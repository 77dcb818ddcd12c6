"""in_slices: gradient caching is exact, also with dropout, an uneven last slice and nested use."""

import functools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import toolkit.slicing
from toolkit.slicing import in_slices


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 4)).double()


def gradients(net: nn.Module, rows: int | None, x: Tensor) -> list[Tensor]:
    """Gradients of a loss in which every row meets every other, so that slices are not independent."""
    net.zero_grad()
    torch.manual_seed(1)
    y = in_slices(net, rows, x)
    (y @ y.T).logsumexp(1).sum().backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def gap(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_equals_plain_forward(rows: int) -> None:
    net, x = model().eval(), torch.randn(7, 4, dtype=torch.float64)
    assert gap(gradients(net, rows, x), gradients(net, None, x)) < 1e-13
    assert gap(gradients(net, rows, x), gradients(net, None, x.flip(1))) > 1e-3  # the measure sees a difference


def kept(fn, *part, **_):
    """In place of checkpoint: keeps the activations of the slice."""
    return fn(*part)


def test_dropout_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = model().train(), torch.randn(7, 4, dtype=torch.float64)
    recomputed = gradients(net, 3, x)
    monkeypatch.setattr(toolkit.slicing, "checkpoint", kept)
    expected = gradients(net, 3, x)
    assert gap(recomputed, expected) == 0
    forgetful = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    monkeypatch.setattr(toolkit.slicing, "checkpoint", lambda fn, *part, **_: forgetful(fn, *part))
    assert gap(gradients(net, 3, x), expected) > 0.1


def test_named_tuples_and_nesting() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def inner(rows: Tensor) -> Tensor:
        return rows.tanh()

    def outer(pair: Pair) -> Pair:
        return Pair(in_slices(inner, 1, pair.left) * 2, pair.right.sum(1))

    found = in_slices(outer, 2, Pair(x, x))
    assert isinstance(found, Pair) and found.left.shape == (5, 3) and found.right.shape == (5,)
    found.left.sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, 2 * (1 - x.tanh() ** 2))


def test_only_one_slice_is_alive() -> None:
    """Saved bytes do not grow with the number of rows, as they do without slices."""

    def saved(rows: int | None, total: int) -> int:
        sizes: list[int] = []
        net, x = model().eval(), torch.randn(total, 4, dtype=torch.float64)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            in_slices(net, rows, x)
        return sum(sizes)

    assert saved(None, 64) > 1.5 * saved(None, 32)
    assert saved(8, 64) <= 64 * 4 * 8  # nothing but the inputs of the slices


@pytest.mark.parametrize("inputs", [(torch.ones(2, 1), torch.ones(3, 1)), (torch.ones(0, 1),)])
def test_refuses_rows_that_do_not_match(inputs: tuple[Tensor, ...]) -> None:
    with pytest.raises(ValueError, match="one common, positive number of rows"):
        in_slices(lambda *x: x[0], 2, *inputs)
