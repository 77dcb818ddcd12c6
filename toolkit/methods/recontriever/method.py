"""The recontriever method: crops of one text as pairs, weighted by relevance, against a queue or their pool."""

import math
from typing import Any

import torch

from toolkit.data.first_look import Look, look_at_texts
from toolkit.data.texts import document_texts
from toolkit.methods.costs import Costs, matrices, recomputations, rule_text
from toolkit.methods.method import Lines, Method, Models, Row, Tokenizers
from toolkit.methods.passages import warn_of_groups
from toolkit.methods.preview import shown, text_epochs, texts_of
from toolkit.methods.recontriever.keys import ReContrieverStage
from toolkit.methods.recontriever.objective import Queue, ReContriever
from toolkit.methods.recontriever.rows import open_crops
from toolkit.methods.shared import build_encoder
from toolkit.models.backbone import DTYPES, read_config


def _row(stage: ReContrieverStage) -> Row:
    views = stage.objective.views
    what = f"texts with 1 query and {views} keys each"
    return Row(what, 1 + views, stage.encoder.max_tokens, {"queries": 1, "keys": views})


def _build(stage: ReContrieverStage, seed: int, device: torch.device | str, models: Models) -> ReContriever:
    encoder = build_encoder(stage, seed, device, models.retriever)
    queue, settings = None, stage.objective.queue
    if settings is not None:
        dim = read_config(models.retriever.folder).hidden_size
        queue = Queue(settings.size, dim, DTYPES[settings.dtype], seed, device)
    return ReContriever(encoder, stage.objective, stage.batch, queue)


def _costs(stage: ReContrieverStage, objective: ReContriever) -> Costs:
    again = recomputations(stage)
    body, _ = matrices(objective.encoder.backbone, stage.zero.stage)
    frozen = objective.queue is not None
    cost, of_keys = body.cost(True, again), body.cost(not frozen, 0 if frozen else again)
    rule = rule_text("retriever", [body], again) + "; keys of the momentum encoder 2N" * frozen
    return Costs({"query": cost, "key": of_keys}, rule)


def _epochs(stage: ReContrieverStage, seed: int, counts: list[int], looks: list[Look], tokenizer: Any) -> str:
    del seed
    if tokenizer is None:
        return "not known: chunks are of tokens, and there is no tokenizer yet"
    crops = stage.data.crops

    def chunks(look: Look) -> float:
        texts = texts_of(look)
        lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        if crops.across_documents:
            return sum(lengths) / crops.chunk_tokens / len(texts)
        return sum(math.ceil(length / crops.chunk_tokens) for length in lengths) / len(texts)

    return text_epochs(stage, counts, looks, "chunks", chunks)


def _example(stage: ReContrieverStage, number: int, look: Look, tokenizers: Tokenizers) -> Lines:
    del number
    tokenizer = tokenizers("retriever")
    ids = tokenizer(next(iter(texts_of(look)), ""), add_special_tokens=False)["input_ids"]
    return [shown("chunk", tokenizer, ids[: stage.data.crops.chunk_tokens], len(ids))]


METHOD = Method(
    row=_row,
    open_feed=open_crops,
    build=_build,
    costs=_costs,
    fit=None,
    look=look_at_texts,
    warn=warn_of_groups,
    epochs=_epochs,
    example=_example,
    training_text=document_texts,
    card="ReContriever: Unsupervised Dense Retrieval with Relevance-Aware Contrastive Pre-Training "
    "([arXiv 2306.03166](https://arxiv.org/abs/2306.03166)), or one of its baselines by the recipe's settings",
)
