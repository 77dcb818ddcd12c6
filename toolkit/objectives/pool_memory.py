"""Keys and values of a pool, taken to the ranks that read them: only those that are needed, layer by layer.

Called by the Revela objective. Gradients go back the same way and are summed at the owner.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.collectives import exchange_rows, gather, is_distributed, max_over_ranks, rank, world_size
from toolkit.models.inbatch_attention import PoolMemory
from toolkit.models.read_pairs import PoolLayer


class Route(NamedTuple):
    """Which of this rank's rows go to each rank, and how many come from each; one's own rows among both."""

    rows: Tensor  # int64 [sum(sent)], by the rank that gets them
    sent: list[int]
    received: list[int]


class Traffic(NamedTuple):
    """Bytes that this rank sends to others for a pool's keys and values, and gets its gradients back for.

    least: the same of real tokens alone, each passage once to each rank that reads it.
    """

    sent: float
    least: float


def share_pool(keys_values: Tensor, length: Tensor, needed: Tensor, span: str) -> tuple[PoolMemory, Traffic]:
    """The memory of pass 2 from what every rank's pass 1 found; all ranks call it.

    Forward, every layer's transfer is under way before the first is waited for.

    Args:
        keys_values: [rows, 2, layers, G, L, d], this rank's; without graph no gradients go back.
        length: int64 [rows], real tokens.
        needed: bool [pool], the passages that this rank's rows read; the pool is as long as all ranks' rows if `span`
            is "world", else as this rank's.
    """
    if span == "rank" or not is_distributed():
        layers = [_send(own, None) for own in keys_values.unbind(2)]
        return PoolMemory(layers, torch.arange(len(length), device=length.device), length), Traffic(0.0, 0.0)
    longest = max_over_ranks(keys_values.shape[-2], keys_values.device)
    keys_values = F.pad(keys_values, (0, 0, 0, longest - keys_values.shape[-2]))
    route = _route(needed, len(length))
    layers = [_send(own, route) for own in keys_values.unbind(2)]
    memory = PoolMemory(layers, needed.cumsum(0) - 1, gather(length)[needed])
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
    bytes_per_token = ways * keys_values[0, ..., 0, :].numel() * keys_values.element_size()
    sent = route.rows[others]
    return Traffic(
        float(len(sent) * keys_values.shape[-2] * bytes_per_token), float(length[sent].sum()) * bytes_per_token
    )


def _send(own: Tensor, route: Route | None) -> tuple[Tensor, PoolLayer]:
    """A layer [rows, 2, G, L, d] on its way, and the ticket that stands for it in the graph."""
    values = own.detach()
    if route is None:
        layer = PoolLayer(values)
    else:
        received, wait = exchange_rows(values.index_select(0, route.rows), route.sent, route.received)
        layer = PoolLayer(received, wait)
    return _Ticket.apply(own, layer, route), layer  # pyright: ignore[reportReturnType]


class _Ticket(torch.autograd.Function):
    """Backward, once every reader of the layer is through: its gradient, sent back to the owners and summed there."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, layer: PoolLayer, route: Route | None) -> Tensor:  # pyright: ignore
        ctx.layer, ctx.route, ctx.rows = layer, route, len(own)
        return own.new_zeros(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient = ctx.layer.take_gradient()
        if ctx.route is not None:
            back, wait = exchange_rows(gradient, ctx.route.received, ctx.route.sent)
            wait()
            gradient = back.new_zeros(ctx.rows, *back.shape[1:]).index_add_(0, ctx.route.rows, back)
        return gradient, None, None
