"""in_slices: gradient caching is exact, also with dropout, an uneven last slice and nested use."""

import functools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import toolkit.slicing
from toolkit.data.tokens import Tokens
from toolkit.slicing import Slices, in_slices, most_tokens, padding, plan_slices


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


def plan(rows: int | None, total: int) -> Slices:
    return plan_slices(torch.ones(total, 1), rows, None)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 4)).double()


def gradients(net: nn.Module, rows: int | None, x: Tensor) -> list[Tensor]:
    """Gradients of a loss in which every row meets every other, so that slices are not independent."""
    net.zero_grad()
    torch.manual_seed(1)
    y = in_slices(net, plan(rows, len(x)), x)
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
        return Pair(in_slices(inner, plan(1, len(pair.left)), pair.left) * 2, pair.right.sum(1))

    found = in_slices(outer, plan(2, 5), Pair(x, x))
    assert isinstance(found, Pair) and found.left.shape == (5, 3) and found.right.shape == (5,)
    found.left.sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, 2 * (1 - x.tanh() ** 2))


def test_only_one_slice_is_alive() -> None:
    """Saved bytes do not grow with the number of rows, as they do without slices."""

    def saved(rows: int | None, total: int) -> int:
        sizes: list[int] = []
        net, x = model().eval(), torch.randn(total, 4, dtype=torch.float64)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            in_slices(net, plan(rows, total), x)
        return sum(sizes)

    assert saved(None, 64) > 1.5 * saved(None, 32)
    assert saved(8, 64) <= 64 * 4 * 8 + 2 * 64 * 8  # nothing but the slices' inputs, their row numbers and the way back


@pytest.mark.parametrize("inputs", [(torch.ones(2, 1), torch.ones(3, 1)), (torch.ones(0, 1),)])
def test_refuses_rows_that_do_not_match(inputs: tuple[Tensor, ...]) -> None:
    with pytest.raises(ValueError, match="one common, positive number of rows"):
        in_slices(lambda *x: x[0], plan(2, 4), *inputs)


# --------------------------------------------------------------------------- slices by tokens


def ragged(lengths: list[int]) -> Tokens:
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    return Tokens(torch.arange(1, mask.numel() + 1).view_as(mask) * mask, mask)


LENGTHS = [3, 17, 1, 8, 8, 2, 30, 5, 5, 4]


@pytest.mark.parametrize("budget", [1, 8, 20, 40, 1000])
def test_slices_by_tokens_hold_every_row_once_and_keep_the_budget(budget: int) -> None:
    slices = plan_slices(ragged(LENGTHS).attention_mask, None, budget)
    assert slices.rows is not None
    assert sorted(torch.cat(slices.rows).tolist()) == list(range(len(LENGTHS)))
    assert slices.num_tokens == sum(LENGTHS)
    assert slices.num_padded == sum(len(r) * n for r, n in zip(slices.rows, slices.lengths, strict=True))
    for rows, length in zip(slices.rows, slices.lengths, strict=True):
        assert length == max(LENGTHS[row] for row in rows)
        assert len(rows) == 1 or len(rows) * length <= budget


def test_sorted_slices_waste_less_than_slices_in_order() -> None:
    mask = ragged(LENGTHS).attention_mask
    in_order, by_length = plan_slices(mask, 2, None), plan_slices(mask, None, 34)
    assert by_length.num_padded < in_order.num_padded == mask.numel() == plan_slices(mask, None, None).num_padded
    wasted, ran = padding([in_order, by_length], torch.device("cpu"))
    assert float(ran) == in_order.num_padded + by_length.num_padded
    assert float(ran - wasted) == 2 * sum(LENGTHS)


@pytest.mark.parametrize(("rows", "tokens"), [(3, None), (None, 9), (None, 34), (None, 1000)])
def test_padding_is_cut_and_order_is_kept(rows: int | None, tokens: int | None) -> None:
    text, widths = ragged(LENGTHS), []
    table = torch.randn(text.input_ids.numel() + 1, 4, dtype=torch.float64, requires_grad=True)

    def embed(part: Tokens) -> Tensor:
        widths.append(part.input_ids.shape[1])
        return (table[part.input_ids] * part.attention_mask[..., None]).sum(1)

    found = in_slices(embed, plan_slices(text.attention_mask, rows, tokens), text)
    expected = embed(text)
    weight = torch.arange(len(LENGTHS), dtype=torch.float64)[:, None]  # tells the rows apart
    gradients = [torch.autograd.grad((y * weight).tanh().sum(), table)[0] for y in (found, expected)]
    assert torch.equal(found, expected) and torch.equal(*gradients)
    assert not torch.equal(found.flip(0), expected)
    assert (min(widths) < max(LENGTHS)) == (tokens is not None)


def test_every_rank_gets_as_many_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = ragged(LENGTHS).attention_mask
    alone = plan_slices(mask, None, 40).rows
    monkeypatch.setattr(toolkit.slicing, "max_over_ranks", lambda value, device: max(value, 9))
    agreed = plan_slices(mask, None, 40).rows
    assert alone is not None and agreed is not None and len(alone) < len(agreed) == 9
    assert sorted(torch.cat(agreed).tolist()) == list(range(len(LENGTHS)))


def test_a_full_slice_ends_before_much_shorter_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = ragged([100] * 5 + [10] * 50).attention_mask
    slices = plan_slices(mask, None, 1000)
    assert slices.rows is not None
    assert (slices.lengths, [len(rows) for rows in slices.rows]) == ([100, 10], [5, 50])
    assert slices.num_padded == slices.num_tokens
    monkeypatch.setattr(toolkit.slicing, "ENOUGH_OF_BUDGET", 2)  # only a budget that is used up ends a slice
    assert plan_slices(mask, None, 1000).num_padded > slices.num_padded


@pytest.mark.parametrize(
    ("forward_rows", "forward_tokens"), [(None, None), (3, None), (99, None), (None, 5), (None, 64)]
)
def test_no_slice_has_more_tokens_than_most_tokens(forward_rows: int | None, forward_tokens: int | None) -> None:
    """And rows of full length reach it."""
    rows, longest, widest = 11, 16, []
    generator = torch.Generator().manual_seed(0)
    bound = most_tokens(rows, longest, forward_rows, forward_tokens)
    for least in (1, 8, longest):
        lengths = torch.randint(least, longest + 1, (rows, 1), generator=generator)
        mask = (torch.arange(longest) < lengths).long()
        slices = plan_slices(mask, forward_rows, forward_tokens)
        counts = [rows] if slices.rows is None else [len(part) for part in slices.rows]
        widest.append(max(count * length for count, length in zip(counts, slices.lengths, strict=True)))
    assert max(widest) == widest[-1] == bound
