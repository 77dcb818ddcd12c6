"""What rows read of their sources against the dense form: both ways to attend, any lengths, any pairs; its memory."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import read_others as helper
import torch
from read_others import read_others
from reference import in_batch_term
from torch import Tensor

from toolkit.methods.revela import read_pairs as module
from toolkit.methods.revela.read_pairs import Pairs, keep, pair_up

LENGTHS = (3, 9, 5, 9, 1)
KEPT = {
    "all": lambda w: torch.ones_like(w).bool(),
    "others": lambda w: ~torch.eye(len(w)).bool(),
    "one source": lambda w: torch.nn.functional.one_hot(torch.tensor([1, 2, 1, 0, 1]), len(w)).bool(),
    "a row without": lambda w: (torch.arange(len(w)) != 2)[:, None] & (w > 0.4),
    "none": lambda w: torch.zeros_like(w).bool(),
}


@pytest.fixture(params=["matmul", "flash"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to attend, several steps each; flash is what a GPU takes."""
    monkeypatch.setattr(module, "_by_flash", lambda query: request.param == "flash")
    monkeypatch.setitem(module.MATMUL_SCORES, "cpu", 700)
    monkeypatch.setattr(module, "FLASH_ELEMENTS", 4 * 4 * max(LENGTHS) * 8)
    return request.param


def layer(rows: int, length: int, dtype: torch.dtype, heads: int = 4, width: int = 8) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "q": torch.randn(rows, heads, length, width, dtype=dtype, requires_grad=True),
        "k": torch.randn(rows, 2, length, width, dtype=dtype, requires_grad=True),
        "v": torch.randn(rows, 2, length, width, dtype=dtype, requires_grad=True),
        "w": torch.rand(rows, rows, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True),
    }


def dense(x: dict[str, Tensor], kept: Tensor, v_norm: bool) -> Tensor:
    real = torch.arange(x["q"].shape[2])[None] < torch.tensor(LENGTHS)[:, None]
    k, v = (x[name].repeat_interleave(x["q"].shape[1] // 2, 1) for name in "kv")
    return in_batch_term(x["q"], k, v, real=real, w=x["w"] * kept, scaling=0.3, v_norm=v_norm)


def errors(x: dict[str, Tensor], found: Tensor, true: dict[str, Tensor], expected: Tensor) -> dict[str, float]:
    """Largest differences over largest values: of the result on real tokens and of all gradients."""
    real = (torch.arange(found.shape[2])[None] < torch.tensor(LENGTHS)[:, None])[:, None, :, None]
    mixing = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * real
    of_found = torch.autograd.grad((found.double() * mixing).sum(), list(x.values()))
    of_true = torch.autograd.grad((expected * mixing).sum(), list(true.values()))
    pairs = {"value": (found.detach() * real, expected.detach() * real)}
    pairs |= {name: (a, b) for name, a, b in zip(x, of_found, of_true, strict=True)}
    return {n: float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for n, (a, b) in pairs.items()}


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("v_norm", [True, False])
@pytest.mark.parametrize("pairs", KEPT)
def test_equals_the_dense_form(way: str, pairs: str, v_norm: bool, heads: int) -> None:
    x = layer(len(LENGTHS), max(LENGTHS), torch.float64, heads)
    kept = KEPT[pairs](x["w"].detach())
    found = read_others(x["q"], x["k"], x["v"], LENGTHS, x["w"], 0.3, v_norm, kept)
    assert max(errors(x, found, x, dense(x, kept, v_norm)).values()) < 1e-12
    if kept.any():
        found = read_others(x["q"], x["k"], x["v"], LENGTHS, x["w"], 0.3, v_norm, kept)
        assert min(errors(x, found, x, dense(x, kept, not v_norm)).values()) > 1e-2
        found = read_others(x["q"], x["k"], x["v"], (9, 9, 9, 9, 9), x["w"], 0.3, v_norm, kept)
        assert max(errors(x, found, x, dense(x, kept, v_norm)).values()) > 1e-2  # padding would be seen


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("v_norm", [True, False])
def test_rounds_no_more_than_its_format(way: str, v_norm: bool, dtype: torch.dtype, bound: float) -> None:
    """bf16 keeps 8 bits: products of it, summed in fp32, are within a few of its 2^-8."""
    x = layer(len(LENGTHS), max(LENGTHS), dtype)
    true = {name: tensor.detach().double().requires_grad_() for name, tensor in x.items()}
    kept = KEPT["others"](x["w"])
    found = read_others(x["q"], x["k"], x["v"], LENGTHS, x["w"], 0.3, v_norm, kept)
    off = errors(x, found, true, dense(true, kept, v_norm))
    assert max(off.values()) < bound and max(off.values()) > bound / 1000


def test_leaving_out_zeros_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that underflow to 0, as at temperature 1e-4: read or left out, value and gradients have equal bits.

    Of sizes at which the BLAS rounds a product alike whatever else is in its batch; at others the last bit may differ.
    """
    lengths = (30, 9, 17, 30, 5)
    monkeypatch.setitem(module.MATMUL_SCORES, "cpu", 10 * 4 * 30 * 30)

    def outcome(kept: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x = layer(len(lengths), max(lengths), torch.float32, width=64)
        similarity = (x["w"].detach() / 4).requires_grad_()
        w = (similarity / 1e-3).masked_fill(torch.eye(len(lengths)).bool(), float("-inf")).softmax(-1)
        assert 0 < int((w == 0).sum()) - len(w) < w.numel() - 2 * len(w)
        out = read_others(x["q"], x["k"], x["v"], lengths, w, 0.3, True, kept(w.detach()))
        mixing = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        return [out, *torch.autograd.grad((out * mixing).sum(), [x["q"], x["k"], x["v"], similarity])]

    everything = outcome(KEPT["all"])
    assert all(map(torch.equal, everything, outcome(lambda w: keep(w, 0.0, None))))
    assert not all(map(torch.equal, everything, outcome(lambda w: keep(w, 1e-3, None))))


def test_keeps_what_is_above_the_least_weight_and_the_largest_of_a_row() -> None:
    w = torch.tensor([[0.0, 0.6, 0.3, 0.1], [0.25, 0.0, 0.25, 0.5]])
    assert keep(w, 0.0, None).tolist() == [[False, True, True, True], [True, False, True, True]]
    assert keep(w, 0.25, None).tolist() == [[False, True, True, False], [False, False, False, True]]
    assert keep(w, 0.0, 2).tolist()[1] == [True, False, False, True]  # of equals the first
    assert keep(w, 0.0, 1).tolist() == [[False, True, False, False], [False, False, False, True]]
    assert keep(w, 0.0, 9).equal(keep(w, 0.0, None))
    assert keep(torch.tensor([[0.0, 1.0, 0.0]]), 0.0, 2).tolist() == [[False, True, False]]


def test_a_memory_that_holds_nothing_is_read_by_nobody() -> None:
    """As on a rank whose rows are all near-duplicates of the others."""
    w, none = torch.zeros(2, 4, requires_grad=True), torch.zeros(4, dtype=torch.int64)
    pairs = pair_up(w, torch.zeros(2, 4).bool(), none - 1, torch.tensor([3, 5]), none[:0])
    query = torch.randn(2, 4, 5, 8, requires_grad=True)
    read = module.read_pairs(query, torch.zeros(1), module.PoolLayer(torch.zeros(0, 2, 2, 5, 8)), pairs, 0.3, True)
    assert read.shape == query.shape and not read.any()
    of_query, of_weights = torch.autograd.grad(read.sum(), [query, w])
    assert not of_query.any() and not of_weights.any()


def saved_bytes(rows: int, length: int, plain: bool) -> int:
    x = layer(rows, length, torch.float32)
    sizes: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    made: list[Pairs] = []

    def noted(*args: Any) -> Pairs:
        made.append(pair_up(*args))
        return made[-1]

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), mock.patch.object(helper, "pair_up", noted):
        if plain:
            k, v = (x[name].repeat_interleave(2, 1) for name in "kv")
            out = in_batch_term(x["q"], k, v, real=torch.ones(rows, length), w=x["w"], scaling=0.3, v_norm=True)
        else:
            out = read_others(x["q"], x["k"], x["v"], (length,) * rows, x["w"], 0.3, True)
    assert out.requires_grad
    return sum(sizes.values()) + sum(part.nbytes for pairs in made for part in pairs)


def test_saved_memory_is_linear_in_the_pool_and_in_the_length() -> None:
    """Inputs and pairs, 20 bytes each, counted."""
    base = saved_bytes(8, 32, plain=False)
    assert saved_bytes(16, 32, plain=False) < 2.2 * base
    assert saved_bytes(8, 64, plain=False) < 2.2 * base
    assert saved_bytes(16, 32, plain=True) > 3.5 * saved_bytes(8, 32, plain=True)  # the measure sees a square
    assert saved_bytes(16, 64, plain=True) > 50 * saved_bytes(16, 64, plain=False)
