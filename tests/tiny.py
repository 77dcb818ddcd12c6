"""Tiny models, stages and batches that the tests share."""

import json
import string
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertTokenizer

from toolkit.data.spans import RevelaBatch
from toolkit.data.tokens import Tokens, pad
from toolkit.recipe import Recipe, Stage

VOCABULARY = 96
TARGETS = ["q_proj", "v_proj", "down_proj"]


def save_model(folder: Path, kind: str, seed: int = 0, tie: bool = False) -> Path:
    """A random two-layer model of a transformers model type, saved to a folder.

    A causal language model without tokenizer; "bert": a bidirectional encoder, as published (with a pooling layer), and
    its tokenizer.
    """
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16 if kind == "qwen3" else 8}
    config = AutoConfig.for_model(
        kind,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **({"num_attention_heads": 4} if kind == "bert" else heads),
    )
    torch.manual_seed(seed)
    (AutoModel if kind == "bert" else AutoModelForCausalLM).from_config(config).save_pretrained(folder)
    if kind == "bert":
        wordpiece_tokenizer().save_pretrained(folder)
    return folder


def wordpiece_tokenizer() -> BertTokenizer:
    """BERT's tokenizer ([CLS] text [SEP], lower case) with single characters as its pieces: VOCABULARY tokens."""
    letters = string.ascii_lowercase + string.digits
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *string.punctuation][:VOCABULARY]
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})


def make_recipe(*stages: dict[str, Any], **changes: Any) -> Recipe:
    """A valid recipe; `changes` are for its top keys."""
    raw = {"name": "tiny", "description": "", "seed": 3, "stages": list(stages)} | changes
    return Recipe.model_validate_json(json.dumps(raw))


def revela_stage(**changes: Any) -> Stage:
    """A Revela stage; `changes` are `section__key=value`."""
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": TARGETS}
    raw: dict[str, Any] = {
        "name": "revela",
        "start": {"hub": "unused"},
        "encoder": {
            "pooling": "eos", "normalize": True, "append_eos": True, "query_prefix": "query: ",
            "passage_prefix": "passage: ", "max_tokens": 32, "eval_max_tokens": 32,
        },
        "lora": lora,
        "objective": {
            "name": "revela", "temperature": 0.05, "similarity_dtype": "fp32", "v_norm": True, "half_query": True,
            "dual_loss": False, "detach_kv": False,
            "language_model": {"start": {"hub": "unused"}, "lora": lora, "max_tokens": 32},
        },
        "data": {"sources": [{"folder": "unused", "format": "groups"}]},
        "batch": {"pool": 8, "span": "rank", "pools_per_step": 4, "forward_rows": None},
        "optim": {"lr": 1e-30, "warmup_steps": 0, "warmup": "linear", "schedule": "constant", "steps": 2, "clip": 0.0},
        "precision": "fp32",
        "zero": {"stage": 1},
        "save": {"every": 100, "keep": 1},
        "eval": {"suites": []},
        "export": {"merged": False},
    }  # fmt: skip
    for key, value in changes.items():
        node, path = raw, key.split("__")
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = value
    return Stage.model_validate_json(json.dumps(raw))


def random_pools(num_pools: int, pool: int, seed: int = 0) -> list[RevelaBatch]:
    """Pools of random passages of uneven lengths (4 to 14 tokens), right padded."""
    generator = torch.Generator().manual_seed(seed)

    def side() -> Tokens:
        lengths = torch.randint(4, 15, (pool,), generator=generator).tolist()
        return pad([torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths], 0)

    return [RevelaBatch(side(), side(), side(), torch.arange(pool) // 2) for _ in range(num_pools)]


def rows_of(batch: Any, first: int, last: int) -> Any:
    """Rows of a batch with each side cut to its own longest row, as a rank's own collation would."""
    if isinstance(batch, Tokens):
        length = int(batch.attention_mask[first:last].sum(1).max())
        return Tokens(*(t[first:last, :length] for t in batch))
    return type(batch)(*(rows_of(x, first, last) if isinstance(x, tuple) else x[first:last] for x in batch))
