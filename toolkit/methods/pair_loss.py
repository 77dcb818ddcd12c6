"""InfoNCE over pairs: a query, its positives and hard negatives, against every document of the global pool.

Called by the objectives of the methods on pairs, each with vectors that it makes in its own way.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.collectives import gather, gather_with_grad, max_over_ranks, pool_mean, sum_over_ranks, world_size
from toolkit.data.pairs import PairBatch
from toolkit.losses.contrastive import InfoNCE, info_nce
from toolkit.losses.masks import Surrogate, relative_limit
from toolkit.methods.objective import Loss, Objective
from toolkit.methods.pair_keys import FalseNegatives, PairLossSettings, RelativeRule
from toolkit.models.encoder import Encoder
from toolkit.recipe.training import Batch
from toolkit.slicing import Slices, padding

LOWEST_TEMPERATURE = 0.01  # of a learned one (CLIP, arXiv 2103.00020)
NO_KEY = -2  # stands for the query of a hard negative, which is nobody's positive


class Pool(NamedTuple):
    """What own rows are compared with; Q is 0 if no direction reads queries."""

    queries: Tensor  # [Q, dim]
    documents: Tensor  # [D, dim]
    query_keys: Tensor  # int64 [rows, a], of own queries, and of their positives that others hold too
    all_query_keys: Tensor  # int64 [Q, b]
    document_keys: Tensor  # int64 [D, 2], of a document and of the query it is a positive of
    document_owner: Tensor  # int64 [D], key of the query of its row; [0] where no setting asks for it


class PairObjective(Objective):
    """Mean loss over the pool's rows, weighted by the rows' weights; own rows against gathered columns."""

    def __init__(self, encoder: Encoder, settings: PairLossSettings, batch: Batch) -> None:
        super().__init__()
        self.encoder = encoder
        self.settings = settings
        self.batch = batch
        # Log of the factor on the recipe's 1 / temperature: 0 is exact in bf16, and weight decay leads back to it.
        self.log_factor = nn.Parameter(torch.zeros(1)) if settings.learn_temperature else None

    def loss(self, query: Tensor, document: Tensor, batch: PairBatch, slices: list[Slices]) -> Loss:
        """The loss of own vectors: query [rows, dim], document [rows * slots, dim], and the slices they were run in."""
        pool = self.pool(query, document, batch)
        document = document.view(len(query), -1, document.shape[-1])  # [rows, positives + negatives, dim]
        scale, sizes = self.scale(), self.settings.matryoshka or [query.shape[-1]]
        surrogate = self.surrogate(batch, pool)
        losses = {size: self.info_nce(size, query, document, pool, batch, scale, surrogate) for size in sizes}
        loss = torch.stack([part.loss for part in losses.values()]).mean(0)
        weight = batch.weight.to(loss.dtype)
        rows = torch.tensor(float(len(query)), device=query.device)
        parts = {
            "accuracy": (losses[max(sizes)].correct.float().sum(), rows),
            "temperature": (1 / torch.as_tensor(scale, device=query.device).detach(), torch.ones_like(rows)),
            "padding": padding(slices, query.device),
            **_masked(losses[max(sizes)], rows),
        }
        return Loss(pool_mean((weight * loss).sum(), weight.sum(), self.batch.span), parts)

    def scale(self) -> Tensor | float:
        """1 / temperature."""
        if self.log_factor is None:
            return 1 / self.settings.temperature
        return Scale.apply(self.log_factor[0].float(), self.settings.temperature, self.batch.span)  # pyright: ignore

    def pool(self, query: Tensor, document: Tensor, batch: PairBatch) -> Pool:
        """Vectors and keys of the whole pool; gathered once, whatever the number of sizes and directions."""
        document_key = torch.cat([batch.positive_key, batch.negative_key], 1)
        owner = batch.query_key[:, None].expand_as(document_key).clone()
        owner[:, batch.positive_key.shape[1] :] = NO_KEY
        document_keys = self.keys_of_pool(torch.stack([document_key, owner], -1).flatten(0, 1))
        known = torch.where(batch.known_key < 0, batch.query_key[:, None], batch.known_key)
        query_keys = torch.cat([batch.query_key[:, None], known], 1)
        documents = self.of_pool(document)
        if {"document_to_query", "query_to_query"} & set(self.settings.directions):
            all_query_keys = self.keys_of_pool(query_keys)
            held = _held_by_two(all_query_keys, document_keys)
            keys = _only(query_keys, held), _only(all_query_keys, held), document_keys
            return Pool(self.of_pool(query), documents, *keys, self.owners(batch))
        query_keys = _only(query_keys, _held_by_two(query_keys, document_keys))
        return Pool(query[:0], documents, query_keys, query_keys[:0], document_keys, self.owners(batch))

    def owners(self, batch: PairBatch) -> Tensor:
        """Of every document of the pool the key of its row's query, positive or not: int64 [D]; [0] if nobody asks."""
        if self.settings.in_batch_negatives and self.settings.false_negatives is None:
            return batch.query_key[:0]
        slots = batch.positive_key.shape[1] + batch.negative_key.shape[1]
        return self.keys_of_pool(batch.query_key[:, None]).expand(-1, slots).flatten()

    def surrogate(self, batch: PairBatch, pool: Pool) -> Surrogate | None:
        """What the surrogate says of own queries and the pool's documents; its vectors are gathered without gradient.

        Raises:
            ValueError: if the settings ask for it and the batch has none.
        """
        rule = self.settings.false_negatives
        if rule is None:
            return None
        if batch.surrogate_query is None or batch.surrogate_document is None:
            raise ValueError("false_negatives need the surrogate's vectors in the batch; collate with the surrogate's")
        document = _unit(batch.surrogate_document)
        columns = gather(document) if self.batch.span == "world" else document
        row = _unit(batch.surrogate_query)
        return Surrogate(row, columns, _limit(rule, row, document, batch), batch.query_key, pool.document_owner)

    def info_nce(
        self,
        size: int,
        query: Tensor,
        document: Tensor,
        pool: Pool,
        batch: PairBatch,
        scale: Tensor | float,
        surrogate: Surrogate | None,
    ) -> InfoNCE:
        """Loss of own rows on the first `size` dimensions: query [rows, dim], document [rows, slots, dim]."""
        settings, sides = self.settings, (query, document, pool.queries, pool.documents)
        if settings.matryoshka is not None:
            sides = [side[..., :size] for side in sides]
            sides = [F.normalize(side, dim=-1) for side in sides] if self.encoder.normalize else sides
        query, document, queries, documents = sides
        own_query, joint = batch.query_key, settings.equal_queries == "joint"
        return info_nce(
            query,
            document[:, : batch.positive_key.shape[1]],
            batch.positive_key >= 0,
            queries,
            documents,
            pool.query_keys,
            pool.all_query_keys,
            batch.positive_key[..., None],
            pool.document_keys,
            scale,
            absent=pool.document_keys[:, 0] < 0,
            only=None if settings.in_batch_negatives else (own_query, pool.document_owner),
            joint_positives=(own_query, pool.document_keys[:, 1]) if joint else None,
            surrogate=surrogate,
            directions=tuple(settings.directions),
            partition=settings.partition,
            margin=settings.false_negative_margin,
            threshold=settings.false_negative_threshold,
        )

    def of_pool(self, vectors: Tensor) -> Tensor:
        return gather_with_grad(vectors) if self.batch.span == "world" else vectors

    def keys_of_pool(self, keys: Tensor) -> Tensor:
        """Keys [rows, any] of the whole pool, with the last repeated where another rank's rows have more."""
        if self.batch.span == "rank":
            return keys
        missing = max_over_ranks(keys.shape[1], keys.device) - keys.shape[1]
        return gather(torch.cat([keys, keys[:, -1:].expand(-1, missing)], 1))


def _unit(vectors: Tensor) -> Tensor:
    """Of unit length in fp32 (fp64 for fp64); they come rounded to the number format of the disk."""
    return F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)


def _limit(rule: FalseNegatives, row: Tensor, document: Tensor, batch: PairBatch) -> Tensor:
    """Of each row the cosine from which on a document is no negative: [rows]."""
    if not isinstance(rule, RelativeRule):
        return row.new_full((len(row),), rule.cut)
    positives = batch.positive_key.shape[1]
    positive = document.view(len(row), -1, document.shape[-1])[:, :positives]
    return relative_limit(row, positive, batch.positive_key >= 0, rule.eps)


def _masked(found: InfoNCE, rows: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """For the log: the share of negatives that the surrogate masked, and of rows that it left none."""
    if found.num_masked is None or found.num_negatives is None:
        return {}
    masked, left = found.num_masked, found.num_negatives
    none_left = ((left == 0) & (masked > 0)).to(rows.dtype).sum()
    return {"masked": (masked.sum(), (masked + left).sum().clamp(min=1)), "rows_all_masked": (none_left, rows)}


class Scale(torch.autograd.Function):
    """exp(log factor) / temperature, at most 1 / LOWEST_TEMPERATURE; there the gradient that asks for more is zero.

    One that asks for less is that of the bound itself, however far the factor is above it. Which of them it is, a whole
    pool decides: the ranks of a pool share the mean of their gradients, whatever their number.
    """

    @staticmethod
    def forward(ctx: Any, log_factor: Tensor, temperature: float, span: str) -> Tensor:
        ctx.span = span
        free = log_factor.exp() / temperature
        scale = free.clamp(max=1 / LOWEST_TEMPERATURE)
        ctx.save_for_backward(scale, free >= 1 / LOWEST_TEMPERATURE)
        return scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        scale, at_bound = ctx.saved_tensors
        grad = sum_over_ranks(grads[0]) / world_size() if ctx.span == "world" else grads[0]
        return torch.where(at_bound, grad.clamp(min=0), grad) * scale, None, None


def _held_by_two(query_keys: Tensor, document_keys: Tensor) -> Tensor:
    """Keys of documents that two queries have as positives, or one query has and a row as its hard negative.

    Only these need comparing: what a single query holds is left out by the query's own key. Arguments: [Q, 1 + K] of
    queries and all their positives, and [D, 2] as in Pool.
    """
    key = torch.cat([query_keys[:, 1:].flatten(), document_keys[:, 0]])
    holder = torch.cat([query_keys[:, :1].expand_as(query_keys[:, 1:]).flatten(), document_keys[:, 1]])
    keys, place = key.unique(return_inverse=True)
    least, most = (
        torch.empty_like(keys).scatter_reduce(0, place, holder, r, include_self=False) for r in ("amin", "amax")
    )
    return keys[least < most]


def _only(query_keys: Tensor, held: Tensor) -> Tensor:
    """A query's key and those of its positives that are in `held`; its own is repeated where another row has more."""
    found = torch.isin(query_keys, held)
    found[:, 0] = True
    order = found.int().argsort(dim=1, descending=True, stable=True)[:, : int(found.sum(1).amax())]
    return torch.where(found, query_keys, query_keys[:, :1]).gather(1, order)
