"""Tiny retrievers in two stages: backbones of every type, stages, batches, and the plain form of the loss."""

import json
from pathlib import Path
from typing import Any

import torch
from reference_contrastive import contrastive_loss
from tiny import VOCABULARY, random_pairs, random_tokens, revela_stage, rows_of, rows_of_pairs, wordpiece_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModel

from toolkit.data.tokens import Tokens
from toolkit.methods.cde.rows import CdeBatch
from toolkit.models.contextual import ContextualEncoder
from toolkit.recipe.stage import Stage

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "mistral": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],
    "qwen3": ["q_proj", "v_proj", "down_proj"],
    "nomic_bert": ["q_proj", "v_proj", "down_proj"],
    "modernbert": ["Wqkv", "Wo"],
    "bert": ["query", "value", "dense"],
    "roberta": ["query", "value", "dense"],
    "distilbert": ["q_lin", "v_lin"],
}
CAUSAL = ("llama", "mistral", "qwen2", "qwen3")


def save_backbone(folder: Path, kind: str, seed: int = 0, width: int = 32) -> Path:
    """A random two-layer model of a type without dropout, and a tokenizer, in a folder."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": width * 3 // 2, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
    }  # fmt: skip
    if kind in CAUSAL:
        sizes |= {"num_key_value_heads": 2, "head_dim": 16 if kind == "qwen3" else 8, "bos_token_id": 1}
        sizes |= {"eos_token_id": 2, "sliding_window": None} if kind == "mistral" else {"eos_token_id": 2}
    elif kind == "modernbert":
        sizes |= {"local_attention": 8, "global_attn_every_n_layers": 2, "embedding_dropout": 0.0, "mlp_dropout": 0.0}
        sizes |= {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
    elif kind == "distilbert":
        sizes |= {"dim": width, "hidden_dim": width * 3 // 2, "n_layers": 2, "n_heads": 4, "dropout": 0.0}
        sizes |= {"attention_dropout": 0.0}
    else:
        sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "type_vocab_size": 2}
    torch.manual_seed(seed)
    pooling = {"add_pooling_layer": False} if kind in ("bert", "roberta", "nomic_bert") else {}
    AutoModel.from_config(AutoConfig.for_model(kind, **sizes), **pooling).save_pretrained(folder)
    wordpiece_tokenizer().save_pretrained(folder)
    return folder


def context_keys(kind: str, **changes: Any) -> dict[str, Any]:
    """A context of 10 vectors, entering as the type of backbone allows."""
    form = "projected" if kind in CAUSAL else "tokens"
    return {"size": 10, "max_tokens": 16, "form": form, "head": "residual"} | changes


def cde_stage(kind: str, context: dict[str, Any], **changes: Any) -> Stage:
    """A stage that trains a backbone of a type; `changes` are `section__key=value`."""
    base: dict[str, Any] = {
        "objective": {"name": "cde", "temperature": 0.2, "context": context},
        "data": {"sources": [{"folder": "unused", "format": "pairs"}], "negatives": 1},
        "encoder__pooling": "eos" if kind in CAUSAL else "mean",
        "lora": None,
    }
    return revela_stage(name="cde", **json.loads(json.dumps(base)) | changes)


def random_contexts(num_pools: int, pool: int, stage: Stage, seed: int = 0) -> list[CdeBatch]:
    """Whole pools with a context of random documents; some of its vectors are null where the stage has such."""
    generator = torch.Generator().manual_seed(seed + 100)
    context, data = stage.objective.context, stage.data

    def one(pairs: Any) -> CdeBatch:
        documents = random_tokens(context.size // context.vectors_per_document, generator)
        null = torch.rand(context.size, generator=generator) < context.null_probability
        return CdeBatch(pairs, documents, null, torch.zeros(1))

    return [one(pairs) for pairs in random_pairs(num_pools, pool, data.positives, data.negatives, seed)]


def part_of(batch: CdeBatch, stage: Stage, part: int, parts: int) -> CdeBatch:
    """One of several ranks' equal parts of a pool, as its own collation would give it."""
    rows = len(batch.pairs.query_key) // parts
    count = len(batch.context.input_ids)
    share = -(-count // parts)
    own = torch.arange(part * share, (part + 1) * share) % count
    context = Tokens(*(t[own] for t in batch.context))
    if stage.objective.context.vectors_per_document == 1:
        context = rows_of(context, 0, share)
    return batch._replace(pairs=rows_of_pairs(batch.pairs, part * rows, (part + 1) * rows), context=context)


def plain_loss(encoder: ContextualEncoder, pools: list[CdeBatch], settings: Any, scale: Any) -> Tensor:
    """The loss without slices, ranks and shared prefixes: one document at a time, then whole sides."""
    losses = []
    for pool in pools:
        whole = pool.context.input_ids.shape[1]
        documents = [Tokens(*(t[i : i + 1] for t in pool.context)) for i in range(len(pool.context.input_ids))]
        context = torch.cat([encoder.first(document, whole) for document in documents])
        read = _After(encoder, context, pool.null)
        pairs = pool.pairs._replace(weight=pool.pairs.weight.to(context.dtype))
        losses.append(contrastive_loss(read, [pairs], settings, scale))  # pyright: ignore[reportArgumentType]
    return torch.stack(losses).mean()


class _After:
    """Texts -> vectors after a context."""

    def __init__(self, encoder: ContextualEncoder, context: Tensor, null: Tensor) -> None:
        self.encoder, self.context, self.null = encoder, context, null
        self.normalize = encoder.normalize

    def __call__(self, tokens: Tokens) -> Tensor:
        return self.encoder.text(tokens, self.encoder.prefix(self.context, self.null))
