"""The next-token loss in chunks against the plain form: value, gradient, and how many logits live at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import toolkit.losses.language
from toolkit.data.tokens import Tokens, pad
from toolkit.losses.language import num_chunks, num_predicted, row_nll
from toolkit.slicing import in_slices, plan_slices

WIDTH, VOCABULARY = 12, 37
LENGTHS = (9, 1, 4, 13, 2, 7)  # 30 predicted tokens; the second row has none


def batch(lengths: tuple[int, ...] = LENGTHS) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    return pad([torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths], 0)


class Model(nn.Module):
    """States of an embedding and a mixing layer, and a head: of its own, frozen, or the embedding's weights."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=dtype)
        self.mixing = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=dtype)
        if kind == "tied":
            self.head.weight = self.embedding.weight
        self.head.weight.requires_grad_(kind != "frozen")

    def states(self, ids: Tensor) -> Tensor:
        return self.mixing(self.embedding(ids)).tanh()


def plain(head: Callable[[Tensor], Tensor], states: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Of the logits of every position, padding included."""
    logp = head(states)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return -(logp * mask[:, 1:]).sum(1)


def gradients(nll: Tensor, model: nn.Module) -> list[Tensor]:
    mixing = torch.linspace(1, 2, len(nll), dtype=nll.dtype)  # every row counts differently
    return list(torch.autograd.grad((nll * mixing).sum(), [p for p in model.parameters() if p.requires_grad]))


def gap(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", ["own", "tied", "frozen"])
@pytest.mark.parametrize("chunks", [1, 2, 7, 30, 50])
@pytest.mark.parametrize("rows", [None, 1, 4])
def test_equals_the_plain_form(kind: str, chunks: int, rows: int | None) -> None:
    """Alone and inside slices; 50 chunks leave some empty, and the slice of the second row alone has no other."""
    model, text = Model(kind), batch()
    expected = plain(model.head, model.states(text.input_ids), *text)
    slices = plan_slices(text.attention_mask, rows, None)
    found = in_slices(lambda t: row_nll(model.head, model.states(t.input_ids), *t, chunks), slices, text)
    assert gap([found.detach()[[0, 2, 3, 4, 5]]], [expected.detach()[[0, 2, 3, 4, 5]]]) < 1e-13
    assert float(found.detach()[1]) == 0 and int(num_predicted(text.attention_mask)) == 30
    true = gradients(expected, model)
    assert len(true) == {"own": 4, "tied": 3, "frozen": 3}[kind]
    assert gap(gradients(found, model), true) < 1e-12


def test_a_row_that_predicts_padding_or_the_next_row_would_be_seen() -> None:
    model, text = Model("own"), batch()
    states = [model.states(text.input_ids) for _ in range(3)]
    expected = plain(model.head, states[0], *text)
    true = gradients(expected, model)
    padded = row_nll(model.head, states[1], text.input_ids, torch.ones_like(text.attention_mask), 3)
    unshifted = row_nll(model.head, states[2].roll(1, 1), *text, 3)
    for wrong in (padded, unshifted):
        assert gap([wrong.detach()[2:]], [expected.detach()[2:]]) > 0.01
        assert gap(gradients(wrong, model), true) > 0.01


def test_loss_of_bf16_logits_is_fp32() -> None:
    model, text = Model("own", torch.bfloat16), batch()
    states = model.states(text.input_ids)
    found = row_nll(model.head, states, *text, 3)
    expected = plain(lambda x: model.head(x).float(), states, *text)
    assert found.dtype == torch.float32 and gap([found.detach()[2:]], [expected.detach()[2:]]) < 1e-6
    rounded = plain(model.head, states, *text).float()
    assert gap([rounded.detach()[2:]], [expected.detach()[2:]]) > 1e-4


def test_one_chunk_is_not_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = Model("own"), batch()
    calls: list[int] = []

    def counted(states: Tensor) -> Tensor:
        calls.append(len(states))
        return model.head(states)

    for chunks, expected in ((1, [30]), (4, [8, 8, 7, 7] * 2), (32, ([1] * 30 + [0] * 2) * 2)):
        calls.clear()
        gradients(row_nll(counted, model.states(text.input_ids), *text, chunks), model)
        assert sorted(calls) == sorted(expected)
    monkeypatch.setattr(toolkit.losses.language, "checkpoint", None)
    row_nll(model.head, model.states(text.input_ids), *text, 1)
    with pytest.raises(TypeError):
        row_nll(model.head, model.states(text.input_ids), *text, 2)


def test_dropout_in_the_head_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters may sit on the head: a recomputed chunk gives the gradient of the same chunk with its logits kept."""
    model, text = Model("own"), batch()
    head = nn.Sequential(nn.Dropout(0.5), model.head)
    slices = plan_slices(text.attention_mask, 4, None)

    def found() -> list[Tensor]:
        torch.manual_seed(3)
        return gradients(in_slices(lambda t: row_nll(head, model.states(t.input_ids), *t, 5), slices, text), model)

    recomputed, checkpoint = found(), toolkit.losses.language.checkpoint
    stand_in: Any = lambda fn, *x, **_: fn(*x)  # noqa: E731
    monkeypatch.setattr(toolkit.losses.language, "checkpoint", stand_in)
    kept = found()
    assert gap(recomputed, kept) < 1e-12
    stand_in = lambda fn, *x, **how: checkpoint(fn, *x, **how, preserve_rng_state=False)  # noqa: E731
    monkeypatch.setattr(toolkit.losses.language, "checkpoint", stand_in)
    assert gap(found(), kept) > 0.1


class LiveLogits(TorchDispatchMode):
    """Numbers held in tensors as wide as the vocabulary, at most and now, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}
        self.most = 0

    def now(self) -> int:
        self.sizes = {ref: size for ref, size in self.sizes.items() if not ref.expired()}
        return sum(self.sizes.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            logits = isinstance(x, Tensor) and x.dim() > 1 and x.shape[-1] == VOCABULARY and len(x)
            if logits and x.shape != (WIDTH, VOCABULARY):  # which is the head's weight or its gradient
                self.sizes[StorageWeakRef(x.untyped_storage())] = x.numel()
        self.most = max(self.most, self.now())
        return out


@pytest.mark.parametrize("rows", [None, 4])
def test_logits_of_one_chunk_live_at_a_time(rows: int | None) -> None:
    """A chunk makes logits, their log-softmax and its gradient; the plain form keeps those of all tokens."""
    lengths = (41, 29, 17, 41, 33, 45, 38, 4)  # 240 predicted tokens
    model, text = Model("own", torch.float32), batch(lengths)
    tokens = int(num_predicted(text.attention_mask))
    slices = plan_slices(text.attention_mask, rows, None)

    def measured(loss: Callable[[Tokens], Tensor]) -> tuple[int, int]:
        with LiveLogits() as live:
            nll = in_slices(loss, slices, text)
            kept = live.now()
            gradients(nll, model)
        return kept, live.most

    kept, most = measured(lambda t: row_nll(model.head, model.states(t.input_ids), *t, 24))
    assert kept == 0 and most <= 4 * (tokens // 24) * VOCABULARY
    kept, most = measured(lambda t: plain(model.head, model.states(t.input_ids), *t))
    assert most > 2 * (tokens // 2) * VOCABULARY
    assert kept >= tokens * VOCABULARY if rows is None else kept == 0


def test_number_of_chunks() -> None:
    assert num_chunks(2**10, 2**17) == 1 and num_chunks(2**10 + 1, 2**17) == 2
    assert num_chunks(8192, 128_256) == 8 and num_chunks(1, 2) == 1
