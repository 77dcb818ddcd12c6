"""InfoNCE over pairs: a query, its positives and hard negatives, against every document of the global pool."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.collectives import gather, gather_with_grad, max_over_ranks, pool_mean
from toolkit.data.pairs import PairBatch
from toolkit.data.tokens import Tokens
from toolkit.losses.contrastive import InfoNCE, info_nce
from toolkit.models.backbone import DTYPES, adapted, load_encoder_backbone, read_config
from toolkit.models.encoder import Encoder
from toolkit.objectives import Loss, Objective
from toolkit.objectives.language_model import recompute_layers
from toolkit.recipe import Batch, ContrastiveObjective, Stage
from toolkit.slicing import Slices, in_slices, padding, plan_slices

LOWEST_TEMPERATURE = 0.01  # of a learned one (CLIP, arXiv 2103.00020)
NO_KEY = -2  # stands for the query of a hard negative, which is nobody's positive


class Contrastive(Objective):
    """Mean loss over the pool's rows, weighted by the rows' weights; own rows against gathered columns."""

    def __init__(self, encoder: Encoder, settings: ContrastiveObjective, batch: Batch) -> None:
        super().__init__()
        self.encoder = encoder
        self.settings = settings
        self.batch = batch
        start = torch.tensor([-math.log(settings.temperature)])  # one number in a list: DeepSpeed sends it as bytes
        self.log_scale = nn.Parameter(start) if settings.learn_temperature else None

    def forward(self, batch: PairBatch) -> Loss:
        query, of_queries = encode(self.encoder, batch.query, self.batch)
        document, of_documents = encode(self.encoder, batch.document, self.batch)
        document = document.view(len(query), -1, document.shape[-1])  # [rows, positives + negatives, dim]
        scale, sizes = self.scale(), self.settings.matryoshka or [query.shape[-1]]
        losses = [self.info_nce(query[..., :dim], document[..., :dim], batch, scale) for dim in sizes]
        loss = torch.stack([part.loss for part in losses]).mean(0)
        weight = batch.weight.to(loss.dtype)
        rows = torch.tensor(float(len(query)), device=query.device)
        parts = {
            "accuracy": (losses[0].correct.float().sum(), rows),
            "temperature": (1 / torch.as_tensor(scale, device=query.device).detach(), torch.ones_like(rows)),
            "padding": padding([of_queries, of_documents], query.device),
        }
        return Loss(pool_mean((weight * loss).sum(), weight.sum(), self.batch.span), parts)

    def scale(self) -> Tensor | float:
        """1 / temperature."""
        if self.log_scale is None:
            return 1 / self.settings.temperature
        return self.log_scale[0].float().exp().clamp(max=1 / LOWEST_TEMPERATURE)

    def info_nce(self, query: Tensor, document: Tensor, batch: PairBatch, scale: Tensor | float) -> InfoNCE:
        """Loss of own rows: query [rows, dim], document [rows, slots, dim]."""
        settings = self.settings
        if self.encoder.normalize and settings.matryoshka is not None:
            query, document = F.normalize(query, dim=-1), F.normalize(document, dim=-1)
        num_positives = batch.positive_key.shape[1]
        all_documents = self.of_pool(document.flatten(0, 1))
        reads_queries = {"document_to_query", "query_to_query"} & set(settings.directions)
        own_keys = torch.where(batch.known_key < 0, batch.query_key[:, None], batch.known_key)
        query_keys = torch.cat([batch.query_key[:, None], own_keys], 1)
        document_key = torch.cat([batch.positive_key, batch.negative_key], 1)
        owner = batch.query_key[:, None].expand_as(document_key).clone()
        owner[:, num_positives:] = NO_KEY
        document_keys = self.keys_of_pool(torch.stack([document_key, owner], -1).flatten(0, 1))
        return info_nce(
            query,
            document[:, :num_positives],
            batch.positive_key >= 0,
            self.of_pool(query) if reads_queries else query[:0],
            all_documents,
            query_keys,
            self.keys_of_pool(query_keys) if reads_queries else query_keys[:0],
            batch.positive_key[..., None],
            document_keys,
            scale,
            absent=document_keys[:, 0] < 0,
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


def encode(encoder: Encoder, tokens: Tokens, batch: Batch) -> tuple[Tensor, Slices]:
    """Vectors [rows, dim] under gradient caching, and the slices they ran in."""
    slices = plan_slices(tokens.attention_mask, batch.forward_rows, batch.forward_tokens)
    return in_slices(encoder, slices, tokens), slices


def build_encoder(stage: Stage, seed: int, device: torch.device | str, folder: Path, adapter: Path | None) -> Encoder:
    """The retriever of a stage in training mode; `adapter` is continued, else a new one is made if the recipe asks."""
    backbone = load_encoder_backbone(folder, DTYPES[stage.precision], device)
    backbone = adapted(backbone, stage.lora, adapter, False, seed).train()
    if stage.activation_checkpointing:
        recompute_layers(backbone)
    return Encoder(backbone, stage.encoder.pooling, stage.encoder.normalize)


def build_contrastive(
    stage: Stage,
    settings: ContrastiveObjective,
    seed: int,
    device: torch.device | str,
    folder: Path,
    adapter: Path | None,
) -> Contrastive:
    """The objective of a `contrastive` stage, in training mode; raises ValueError if it has too few dimensions."""
    dim = read_config(folder).hidden_size
    if settings.matryoshka is not None and max(settings.matryoshka) > dim:
        raise ValueError(f"objective.matryoshka: {max(settings.matryoshka)} is more than the model's {dim} dimensions")
    return Contrastive(build_encoder(stage, seed, device, folder, adapter), settings, stage.batch).to(device)
