"""ReContriever (arXiv 2306.03166): crops of one text as pairs, each weighted by its estimated relevance.

Negatives come from a queue that a momentum encoder fills, or from the pool. MoCo and Contriever are settings of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from toolkit.collectives import gather, gather_with_grad, pool_mean, world_size
from toolkit.determinism import generator
from toolkit.losses.contrastive import Negatives, cross_entropy, negatives, relevance_weights, smoothed
from toolkit.methods.objective import Loss, Objective
from toolkit.methods.recontriever.crops import CropBatch
from toolkit.methods.recontriever.keys import ReContrieverObjective
from toolkit.methods.shared import encode
from toolkit.models.encoder import Encoder
from toolkit.recipe.training import Batch
from toolkit.slicing import padding


class Momentum:
    """theta_k <- m theta_k + (1 - m) theta_q over what is trained, in fp32 (fp64 for fp64), outside the module.

    With LoRA these are the adapters alone, over the one frozen base. At ZeRO-3 the trained parameters must be whole
    after a step, as DeepSpeed leaves those below its persistence threshold.
    """

    def __init__(self, encoder: Encoder, share: float) -> None:
        self.encoder = encoder
        self.share = share
        self.average = {name: p.detach().to(_wide(p.dtype), copy=True) for name, p in self._trained()}

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.encoder.named_parameters() if p.requires_grad)

    def update(self) -> None:
        """One step of the average; after the optimizer step."""
        for name, parameter in self._trained():
            average = self.average[name]
            if parameter.shape != average.shape:
                raise ValueError(f"{name} is not whole at ZeRO stage 3; use stage 2 or a lower lora.rank")
            average.lerp_(parameter.detach().to(average.dtype), 1 - self.share)  # leaves equal weights as they are

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The encoder with the averaged weights, for forwards without gradient.

        Each module's weights are exchanged around its own forward, between DeepSpeed's hooks: at ZeRO-3 they exist
        only there.
        """
        handles = []
        for prefix, module in self.encoder.named_modules():
            named = module.named_parameters(prefix, recurse=False)
            own = {name: parameter for name, parameter in named if parameter.requires_grad}
            if own:
                kept: dict[str, Tensor] = {}
                handles.append(module.register_forward_pre_hook(partial(self._put, own, kept)))
                handles.append(module.register_forward_hook(partial(self._put_back, own, kept), prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _put(self, own: dict[str, nn.Parameter], kept: dict[str, Tensor], *_: object) -> None:
        for name, parameter in own.items():
            kept[name] = parameter.data
            parameter.data = self.average[name].to(parameter.dtype)

    def _put_back(self, own: dict[str, nn.Parameter], kept: dict[str, Tensor], *_: object) -> None:
        for name, parameter in own.items():
            parameter.data = kept.pop(name)


class Queue:
    """Keys of earlier steps, the oldest overwritten first; the same on every rank and no part of the module."""

    def __init__(self, size: int, dim: int, dtype: torch.dtype, seed: int, device: torch.device | str) -> None:
        """Starts as random unit rows, a function of the seed."""
        rows = generator("queue", seed).standard_normal((size, dim), dtype=np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        self.keys = torch.from_numpy(rows).to(device, dtype)
        self.pointer = 0

    def put(self, keys: Tensor) -> None:
        """Write keys [n, dim] at the pointer; n divides the queue's size."""
        self.keys[self.pointer : self.pointer + len(keys)] = keys.to(self.keys.dtype)
        self.pointer = (self.pointer + len(keys)) % len(self.keys)


class ReContriever(Objective):
    """Sum over documents b and views j of w_jb * ce_jb, divided by (views x documents) of the pool."""

    def __init__(self, encoder: Encoder, settings: ReContrieverObjective, batch: Batch, queue: Queue | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.settings = settings
        self.batch = batch
        self.queue = queue
        self.momentum = None if settings.queue is None else Momentum(encoder, settings.queue.momentum)
        self._new_keys: list[Tensor] = []  # [views, rows, dim] of each forward since the last step

    def forward(self, batch: CropBatch) -> Loss:
        query, of_queries = encode(self.encoder, batch.query, self.batch)
        if self.momentum is None:
            key, of_keys = encode(self.encoder, batch.key, self.batch)
        else:
            with torch.no_grad(), self.momentum.in_place():
                key, of_keys = encode(self.encoder, batch.key, self.batch)
        views = self.settings.views
        key = key.view(views, len(query), -1)
        if self.momentum is not None:
            self._new_keys.append(key)
        scores = torch.einsum("bd,kbd->bk", query, key)  # s_jb, raw dot products
        weights = relevance_weights(
            scores, self.settings.relevance, self.settings.relevance_temperature, self.settings.clamp_negative
        )
        found = self.negatives(query, key, batch.document)
        positive = scores / self.settings.temperature
        ce = cross_entropy(positive, found.lse)  # [rows, views]: all views of a row share its negatives
        if self.settings.label_smoothing:
            ce = smoothed(ce, positive, found, self.settings.label_smoothing)
        pairs = torch.tensor(float(ce.numel()), device=query.device)
        beaten = scores.detach() > found.largest[:, None]
        parts = {
            "pair_nll": (ce.detach().sum(), pairs),
            "accuracy": (beaten.float().sum(), pairs),
            "negative_weights": ((weights < 0).float().sum(), pairs),
            "std_weights": (weights.std(1, correction=0).mean(), torch.ones_like(pairs)),
            "std_query": (_spread(query.detach()), torch.ones_like(pairs)),
            "std_key": (_spread(key.detach().flatten(0, 1)), torch.ones_like(pairs)),
            "padding": padding([of_queries, of_keys], query.device),
        }
        return Loss(pool_mean((weights * ce).sum(), pairs, self.batch.span), parts)

    def negatives(self, query: Tensor, key: Tensor, document: Tensor) -> Negatives:
        """Of the queue, or of the pool's keys that are of other documents."""
        scale, smoothing = 1 / self.settings.temperature, self.settings.label_smoothing > 0
        if self.queue is not None:
            return negatives(query, self.queue.keys, scale, with_mean=smoothing)
        keys, documents = key.flatten(0, 1), document.repeat(len(key))
        if self.batch.span == "world":
            keys, documents = gather_with_grad(keys), gather(documents)
        return negatives(
            query, keys, scale, row_keys=document[:, None], column_keys=documents[:, None], with_mean=smoothing
        )

    def after_step(self, applied: bool) -> None:
        """The momentum encoder follows the weights; the step's keys of all ranks enter the queue. Nothing of a step
        that was left out.

        Order of the keys: pool, view, row of the pool, whatever the number of ranks.
        """
        if self.queue is None or self.momentum is None:
            return
        new_keys, self._new_keys = self._new_keys, []
        if not applied:
            return
        self.momentum.update()
        own = torch.stack(new_keys).to(self.queue.keys.dtype)  # [forwards, views, rows, dim]
        ranks = world_size()
        keys = gather(own).view(ranks, *own.shape)
        if self.batch.span == "world":
            keys = keys.permute(1, 2, 0, 3, 4)
        self.queue.put(keys.reshape(-1, own.shape[-1]))

    def extra_state(self) -> dict[str, Tensor]:
        if self.queue is None or self.momentum is None:
            return {}
        state = {f"momentum.{name}": tensor for name, tensor in self.momentum.average.items()}
        return state | {"queue.keys": self.queue.keys, "queue.pointer": torch.tensor(self.queue.pointer)}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        if self.queue is None or self.momentum is None:
            return
        self.queue.keys.copy_(state["queue.keys"])
        self.queue.pointer = int(state["queue.pointer"])
        for name, average in self.momentum.average.items():
            average.copy_(state[f"momentum.{name}"])


def _spread(vectors: Tensor) -> Tensor:
    """Standard deviation over rows, mean over dimensions: near 0 once the vectors collapse to one."""
    return vectors.std(0, correction=min(1, len(vectors) - 1)).mean()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
