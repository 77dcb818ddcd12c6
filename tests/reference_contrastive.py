"""The contrastive methods as their papers write them: one process, every score in one matrix, no slices, no tiles.

The yardstick of the tests on several ranks; shares nothing with the code it measures but the encoder and its pooling.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.data.pairs import PairBatch
from toolkit.methods.contrastive.keys import ContrastiveObjective
from toolkit.methods.recontriever.crops import CropBatch
from toolkit.methods.recontriever.keys import ReContrieverObjective
from toolkit.models.encoder import Encoder

INF = float("inf")


def contrastive_loss(encoder: Encoder, pools: list[PairBatch], settings: ContrastiveObjective, scale: Any) -> Tensor:
    """Mean over pools of the weighted mean over rows."""
    losses = []
    for pool in pools:
        query, document = encoder(pool.query), encoder(pool.document)
        sizes = settings.matryoshka or [query.shape[1]]
        rows = torch.stack([rows_loss(query[:, :n], document[:, :n], pool, settings, scale) for n in sizes]).mean(0)
        losses.append((rows * pool.weight).sum() / pool.weight.sum())
    return torch.stack(losses).mean()


def rows_loss(query: Tensor, document: Tensor, pool: PairBatch, settings: ContrastiveObjective, scale: Any) -> Tensor:
    """InfoNCE of every row [rows]: each of its positives against the negatives of every direction."""
    query, document = F.normalize(query, dim=1), F.normalize(document, dim=1)
    rows, slots, positives = len(query), len(document) // len(query), pool.positive_key.shape[1]
    of_query = query @ document.T
    scores = {
        "query_to_document": of_query,
        "query_to_query": query @ query.T,
        "document_to_query": of_query.T,
        "document_to_document": document @ document.T,
    }
    key = torch.cat([pool.positive_key, pool.negative_key], 1).flatten().tolist()
    asked = pool.query_key.tolist()
    positives_of: dict[int, set[int]] = {query_key: set() for query_key in asked}
    for query_key, keys in zip(asked, torch.cat([pool.positive_key, pool.known_key], 1).tolist(), strict=True):
        positives_of[query_key].update(k for k in keys if k >= 0)  # of the query, in whatever row it has them
    known = [positives_of[query] for query in asked]
    owner = [asked[j // slots] if j % slots < positives else None for j in range(len(document))]
    masked = masked_columns(pool, settings)
    of_rows = []
    for i in range(rows):
        present = [i * slots + slot for slot in range(positives) if key[i * slots + slot] >= 0]
        lowest = min(float(of_query[i, place].detach()) for place in present)
        documents = [j for j in range(len(document)) if key[j] >= 0 and key[j] not in known[i] and owner[j] != asked[i]]
        documents = [j for j in documents if not masked[i, j]]
        queries = [j for j in range(rows) if asked[j] != asked[i] and not known[i] & known[j]]
        losses = []
        for place in present:
            pair = of_query[i, place]
            groups = []
            for direction in settings.directions:
                row, columns = (i, lowest) if direction.startswith("query") else (place, float(pair.detach()))
                limit = _limit(columns, settings)
                found = scores[direction][row, documents if direction.endswith("document") else queries]
                groups.append(found[found <= limit])
            if settings.partition == "joint":
                groups = [torch.cat(groups)]
            logits = [torch.cat([pair[None], group]) * scale for group in groups]
            losses.append(torch.stack([x.logsumexp(0) - x[0] for x in logits]).mean())
        if settings.equal_queries == "joint":
            held = [j for j in range(len(document)) if key[j] >= 0 and owner[j] == asked[i]]
            found = scores["query_to_document"][i, documents]
            found = found[found <= _limit(lowest, settings)]
            logits = torch.cat([of_query[i, held], found]) * scale
            losses = [logits.logsumexp(0) - logits[: len(held)].mean()]
        of_rows.append(torch.stack(losses).mean())
    return torch.stack(of_rows)


def masked_columns(pool: PairBatch, settings: ContrastiveObjective) -> Tensor:
    """Documents of other queries that are no negatives, by the surrogate or since none is: bool [rows, documents]."""
    slots, positives = len(pool.document.input_ids) // len(pool.weight), pool.positive_key.shape[1]
    owner = pool.query_key.repeat_interleave(slots)
    others = pool.query_key[:, None] != owner
    if not settings.in_batch_negatives:
        return others
    rule = settings.false_negatives
    if rule is None:
        return torch.zeros_like(others)
    assert pool.surrogate_query is not None and pool.surrogate_document is not None
    similar = F.cosine_similarity(pool.surrogate_query[:, None].double(), pool.surrogate_document[None].double(), dim=2)
    own = similar.view(len(similar), -1, slots)[range(len(similar)), range(len(similar)), :positives]
    lowest = own.masked_fill(pool.positive_key < 0, INF).amin(1)
    return others & (similar >= (lowest[:, None] + rule.eps if rule.rule == "relative" else rule.cut))


def _limit(positive: float, settings: ContrastiveObjective) -> float:
    margin, threshold = settings.false_negative_margin, settings.false_negative_threshold
    return min(INF if margin is None else positive + margin, INF if threshold is None else threshold)


class ReContrieverReference:
    """The method's state and loss on whole pools; the encoders are the caller's."""

    def __init__(self, settings: ReContrieverObjective, queue: Tensor | None) -> None:
        self.settings = settings
        self.queue = queue

    def loss(self, query_encoder: Encoder, key_encoder: Encoder, pools: list[CropBatch]) -> Tensor:
        """Mean over pools; with a queue its keys are overwritten, oldest first, when all pools are through."""
        losses, new_keys = [], []
        for pool in pools:
            query, key = query_encoder(pool.query), key_encoder(pool.key)
            key = key.view(self.settings.views, len(query), -1)
            if self.queue is not None:
                key = key.detach()
                new_keys.append(key.flatten(0, 1))
            losses.append(self.pool_loss(query, key, pool.document))
        if self.queue is not None:
            keys = torch.cat(new_keys)
            self.queue = torch.cat([self.queue[len(keys) :], keys])  # oldest first; the loss knows no order
        return torch.stack(losses).mean()

    def pool_loss(self, query: Tensor, key: Tensor, document: Tensor) -> Tensor:
        settings = self.settings
        views, rows = key.shape[:2]
        total = query.sum() * 0
        for b in range(rows):
            relevance = (key[:, b] @ query[b]).detach()
            if settings.clamp_negative:
                relevance = relevance.clamp(min=0)
            if settings.relevance == "softmax":
                assert settings.relevance_temperature is not None
                relevance = torch.exp(relevance / settings.relevance_temperature)
            weights = torch.ones(views) / views if settings.relevance == "none" else relevance / relevance.sum()
            others = self.queue if self.queue is not None else key[:, document != document[b]].flatten(0, 1)
            negatives = (others.to(query.dtype) @ query[b]).expand(views, -1)
            logits = torch.cat([(key[:, b] @ query[b])[:, None], negatives], 1) / settings.temperature
            first = torch.zeros(views, dtype=torch.long)
            ce = F.cross_entropy(logits, first, label_smoothing=settings.label_smoothing, reduction="none")
            total = total + (weights * ce).sum()
        return total / (views * rows)
