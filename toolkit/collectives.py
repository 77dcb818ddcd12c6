"""The few collective operations the toolkit needs; every one is the identity on a single process.

Called by objectives, embedding and evaluation. `pool_mean` is the only place where a loss meets the world size.
"""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# How long ranks wait for one of them: preparing data, exporting and scoring happen on one rank.
PATIENCE = timedelta(hours=3)


class RankZeroFailed(Exception):
    """Raised on the other ranks when the work of rank 0 failed; rank 0 itself raises the cause."""


def is_distributed() -> bool:
    """True when a process group with more than one rank exists."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def on_rank_zero(work: Callable[[], Any]) -> Any:
    """Run `work` on rank 0 while the others wait; every rank gets its result (anything JSON can hold).

    Raises:
        RankZeroFailed: on the other ranks, when `work` raised on rank 0 (where its own exception goes on).
    """
    if not is_distributed():
        return work()
    if rank() == 0:
        try:
            result = work()
        except BaseException:
            _broadcast_text("")
            raise
        _broadcast_text(json.dumps([result]))
        return result
    text = _broadcast_text(None)
    if not text:
        raise RankZeroFailed
    return json.loads(text)[0]


def first_of_any_rank(text: str) -> str:
    """The first text, by rank, that is not empty; the same on every rank. Every rank gives one, empty or not."""
    if not is_distributed():
        return text
    speakers = gather(torch.tensor([len(text)], device=group_device())).nonzero()
    return _broadcast_text(text if int(speakers[0]) == rank() else None, int(speakers[0])) if len(speakers) else ""


def gather_texts(text: str) -> list[str]:
    """A text of every rank, in rank order, on every rank."""
    if not is_distributed():
        return [text]
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=group_device())
    sizes = gather(torch.tensor([len(data)], device=group_device())).tolist()
    rows = gather(torch.nn.functional.pad(data, (0, max(sizes) - len(data)))[None])
    return [bytes(row[:size].tolist()).decode() for row, size in zip(rows, sizes, strict=True)]


def group_device() -> torch.device:
    """Where tensors must live to travel between ranks."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _broadcast_text(text: str | None, source: int = 0) -> str:
    """The text of rank `source` on every rank, as bytes (no pickle)."""
    device = group_device()
    data = torch.tensor(list((text or "").encode()), dtype=torch.uint8, device=device)
    size = torch.tensor(len(data), device=device)
    dist.broadcast(size, source)
    if text is None:
        data = torch.empty(int(size), dtype=torch.uint8, device=device)
    if len(data):
        dist.broadcast(data, source)
    return bytes(data.tolist()).decode()


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order, without gradient: [rows, ...] -> [ranks * rows, ...] of equal shapes."""
    if not is_distributed():
        return x.detach()
    x = x.detach().contiguous()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


class _GatherWithGrad(torch.autograd.Function):
    """Forward: gather. Backward: the *sum* over ranks of the gradient of the own rows."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.rows = len(x)
        return gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may hand the same tensor to others
        dist.all_reduce(grad)
        return grad[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather_with_grad(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order, with exact gradients: [rows, ...] -> [ranks * rows, ...].

    Every rank must use the result in its loss, or the backward collectives of the ranks no longer match.
    """
    return _GatherWithGrad.apply(x) if is_distributed() else x  # pyright: ignore[reportReturnType]


def exchange_rows(x: Tensor, sent: list[int], received: list[int]) -> tuple[Tensor, Callable[[], None]]:
    """Rows for other ranks against theirs, without gradient; under way when it returns.

    Args:
        x: [sum(sent), ...], `sent[r]` rows for rank r, in rank order.
        received: rows that come from each rank.

    Returns:
        [sum(received), ...] in rank order, and a function that waits until it is there.
    """
    x = x.contiguous()
    result = x.new_empty(sum(received), *x.shape[1:])
    work: Any = dist.all_to_all_single(result, x, received, sent, async_op=True)
    pending = [(work, x)]  # what is sent must live as long

    def wait() -> None:
        if pending:
            pending.pop()[0].wait()

    return result, wait


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of a tensor over ranks, without gradient."""
    total = x.detach().clone()
    if is_distributed():
        dist.all_reduce(total)
    return total


def max_over_ranks(value: int, device: torch.device) -> int:
    """Largest of an integer over ranks."""
    if not is_distributed():
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def pool_mean(own_sum: Tensor, own_count: Tensor, span: str) -> Tensor:
    """Mean over a whole pool, scaled so that an engine which *averages* gradients over ranks gets the exact gradient.

    Args:
        own_sum: scalar with graph, summed over the own rows.
        own_count: scalar, number of tokens or rows in `own_sum`.
        span: "rank": the pool is this rank's; "world": it is spread over all ranks. With gathers whose backward sums
            over ranks, the sum over ranks of every rank's gradient is the pool's; the engine's mean divides it by the
            number of ranks, which the factor here undoes. So the mean over ranks of the result is the pool's mean.
    """
    if span == "rank":
        return own_sum / own_count
    return own_sum * world_size() / sum_over_ranks(own_count)
