"""Keys and values of a pool, taken to the ranks that read them: only those that are needed, layer by layer.

Called by the Revela objective. Gradients go back the same way and are summed at the owner.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.collectives import exchange_rows, gather, is_distributed, max_over_ranks, rank, world_size
from toolkit.methods.revela.inbatch_attention import PoolMemory
from toolkit.methods.revela.read_pairs import PoolLayer


class Route(NamedTuple):
    """Which of this rank's rows go to each rank, and how many come from each; one's own rows among both."""

    rows: Tensor  # int64 [sum(sent)], by the rank that gets them
    sent: list[int]
    received: list[int]


class Traffic(NamedTuple):
    """Bytes that this rank sends to others for a pool's keys and values, their gradients' way back counted as well.

    least: the same of real tokens alone, each passage once to each rank that reads it.
    """

    sent: float
    least: float


def share_pool(keys_values: Tensor, length: Tensor, needed: Tensor, span: str) -> tuple[PoolMemory, Traffic]:
    """The memory of pass 2 from what every rank's pass 1 found; all ranks call it.

    Every layer's transfer is under way before the first is waited for, forward as backward.

    Args:
        keys_values: [rows, 2, layers, G, L, d], this rank's; without graph no gradients go back.
        length: int64 [rows], real tokens.
        needed: bool [pool], the passages that this rank's rows read; the pool is as long as all ranks' rows if `span`
            is "world", else as this rank's.
    """
    if span == "rank" or not is_distributed():
        layers = [PoolLayer(own) for own in keys_values.detach().unbind(2)]
        place = torch.arange(len(length), device=length.device)
        return PoolMemory(layers, _ticket(keys_values, layers, None), place, length), Traffic(0.0, 0.0)
    missing = max_over_ranks(keys_values.shape[-2], keys_values.device) - keys_values.shape[-2]
    keys_values = F.pad(keys_values, (0, 0, 0, missing)) if missing else keys_values
    route = _route(needed, len(length))
    sent = [own.index_select(0, route.rows) for own in keys_values.detach().unbind(2)]
    layers = [PoolLayer(*exchange_rows(rows, route.sent, route.received)) for rows in sent]
    memory = PoolMemory(layers, _ticket(keys_values, layers, route), needed.cumsum(0) - 1, gather(length)[needed])
    return memory, _traffic(route, keys_values, length)


def _route(needed: Tensor, rows: int) -> Route:
    first = rank() * rows
    wanted = gather(needed[None])[:, first : first + rows]  # [ranks, rows]
    return Route(wanted.nonzero()[:, 1], wanted.sum(1).tolist(), needed.view(world_size(), rows).sum(1).tolist())


def _traffic(route: Route, keys_values: Tensor, length: Tensor) -> Traffic:
    others = torch.ones(len(route.rows), dtype=torch.bool, device=length.device)
    own = sum(route.sent[: rank()])
    others[own : own + route.sent[rank()]] = False
    ways = 2 if keys_values.requires_grad else 1  # a gradient of the same size goes back for each
    per_token = ways * keys_values[0, ..., 0, :].numel() * keys_values.element_size()
    rows = route.rows[others]
    return Traffic(float(len(rows) * keys_values.shape[-2] * per_token), float(length[rows].sum()) * per_token)


def _ticket(keys_values: Tensor, layers: list[PoolLayer], route: Route | None) -> Tensor:
    return _Ticket.apply(keys_values, layers, route)  # pyright: ignore[reportReturnType]


class _Ticket(torch.autograd.Function):
    """Backward, once all readers are through: every layer's gradient, sent back to the owners and summed there."""

    @staticmethod
    def forward(ctx: Any, keys_values: Tensor, layers: list[PoolLayer], route: Route | None) -> Tensor:  # pyright: ignore
        ctx.layers, ctx.route, ctx.rows = layers, route, len(keys_values)
        return keys_values.new_zeros(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        route: Route | None = ctx.route
        if route is None:
            return torch.stack([layer.take_gradient() for layer in ctx.layers], 2), None, None
        under_way = [exchange_rows(layer.take_gradient(), route.received, route.sent) for layer in ctx.layers]
        sums = []
        for back, wait in under_way:
            wait()
            total = torch.zeros(
                ctx.rows, *back.shape[1:], dtype=torch.promote_types(back.dtype, torch.float32), device=back.device
            )
            sums.append(total.index_add_(0, route.rows, back.to(total.dtype)).to(back.dtype))
        return torch.stack(sums, 2), None, None
