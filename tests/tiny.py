"""Tiny models, stages and batches that the tests share."""

import json
import string
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertTokenizer

from toolkit.data.graded import GradedBatch
from toolkit.data.pairs import PairBatch
from toolkit.data.tokens import Tokens, pad
from toolkit.methods import method_of
from toolkit.methods.method import Models
from toolkit.methods.recontriever.crops import CropBatch
from toolkit.methods.revela.rows import RevelaBatch
from toolkit.prepare.models import ModelSource
from toolkit.recipe.schema import Recipe, recipe_type, stage_type
from toolkit.recipe.stage import Stage

VOCABULARY = 96
TARGETS = ["q_proj", "v_proj", "down_proj"]


def save_model(folder: Path, kind: str, seed: int = 0, tie: bool = False, width: int = 32) -> Path:
    """A random two-layer model of a transformers model type, saved to a folder.

    A causal language model without tokenizer; "bert": a bidirectional encoder, as published (with a pooling layer), and
    its tokenizer.
    """
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16 if kind == "qwen3" else 8}
    config = AutoConfig.for_model(
        kind,
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 3 // 2,
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


def without_dropout(folder: Path) -> Path:
    """Sets the dropout of a saved "bert" to 0: each rank draws its own."""
    config = json.loads((folder / "config.json").read_text())
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config | none))
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
    return recipe_type().model_validate_json(json.dumps(raw))


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
    return stage_type(raw["objective"]["name"]).model_validate_json(json.dumps(raw))


def models_at(folder: Path, adapter: Path | None = None, lm_folder: Path | None = None) -> Models:
    """The models of a stage that lie in folders; `lm_folder`: Revela's language model."""
    others = {} if lm_folder is None else {"language_model": ModelSource(lm_folder, str(lm_folder))}
    return Models(ModelSource(folder, str(folder), adapter), others)


def build_objective(
    stage: Stage, seed: int, device: Any, folder: Path, adapter: Path | None = None, lm_folder: Path | None = None
) -> Any:
    """The objective of a stage whose models lie in folders."""
    return method_of(stage.objective.name).build(stage, seed, device, models_at(folder, adapter, lm_folder))


def random_pools(num_pools: int, pool: int, seed: int = 0) -> list[RevelaBatch]:
    """Pools of random passages of uneven lengths (4 to 14 tokens), right padded.

    Signatures have two hashes of three values each: of the pairs over half agree at threshold 0.5.
    """
    generator, of_signatures = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)

    def side() -> Tokens:
        lengths = torch.randint(4, 15, (pool,), generator=generator).tolist()
        return pad([torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths], 0)

    def signature() -> torch.Tensor:
        return torch.randint(3, (pool, 2), dtype=torch.int32, generator=of_signatures)

    return [RevelaBatch(side(), side(), side(), torch.arange(pool) // 2, signature()) for _ in range(num_pools)]


def rows_of(batch: Any, first: int, last: int) -> Any:
    """Rows of a batch with each side cut to its own longest row, as a rank's own collation would."""
    if isinstance(batch, Tokens):
        length = int(batch.attention_mask[first:last].sum(1).max())
        return Tokens(*(t[first:last, :length] for t in batch))
    if not isinstance(batch, tuple):
        return None if batch is None else batch[first:last]
    return type(batch)(*(rows_of(x, first, last) for x in batch))


METHODS: dict[str, dict[str, Any]] = {
    "contrastive": {
        "objective": {"name": "contrastive", "temperature": 0.5},
        "data": {"sources": [{"folder": "unused", "format": "pairs"}]},
    },
    "recontriever": {
        "objective": {
            "name": "recontriever", "temperature": 10.0, "views": 3, "relevance": "linear",
            "queue": {"size": 192, "momentum": 0.9, "dtype": "fp32"},
        },
        "data": {
            "sources": [{"folder": "unused"}],
            "crops": {"chunk_tokens": 16, "min_ratio": 0.2, "max_ratio": 0.5, "delete": 0.1},
        },
    },
    "sycl": {
        "objective": {"name": "sycl", "losses": {"wasserstein": 1.0}, "temperature": 0.2},
        "data": {"sources": [{"folder": "unused"}], "group": {"size": 4, "by": "random"}},
    },
}  # fmt: skip


def stage_of(method: str, **changes: Any) -> Stage:
    """A stage of a contrastive method; `changes` are `section__key=value`."""
    return revela_stage(name=method, **json.loads(json.dumps(METHODS[method])), **changes)


def random_tokens(rows: int, generator: torch.Generator) -> Tokens:
    """Random texts of uneven lengths (4 to 14 tokens), right padded."""
    lengths = torch.randint(4, 15, (rows,), generator=generator).tolist()
    return pad([torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths], 0)


def random_pairs(num_pools: int, pool: int, positives: int, negatives: int, seed: int = 0) -> list[PairBatch]:
    """Pools of random pairs with uneven weights: absent slots, one document in two rows, one query twice."""
    generator = torch.Generator().manual_seed(seed)

    def one() -> PairBatch:
        keys = 100 + torch.randperm(pool * (positives + negatives), generator=generator).view(pool, -1)
        positive, negative = keys[:, :positives].clone(), keys[:, positives:].clone()
        positive[1, 0] = positive[5, 0]
        if negatives:
            negative[2, 0] = positive[6, 0]
            negative[3, -1] = -1
        if positives > 1:
            positive[4, 1] = -1
        query = torch.arange(pool) + 1000
        query[7] = query[0]
        document = random_tokens(pool * (positives + negatives), generator)
        known = torch.cat([positive, torch.full_like(positive, -1), torch.full((pool, 1), -1)], 1)
        known[0, positives:-1], known[7, positives:-1] = positive[7], positive[0]  # one query has one set of them
        known[[0, 7], -1] = positive[2, 0]  # a positive that was not drawn
        weight = 0.5 + torch.rand(pool, generator=generator)
        return PairBatch(random_tokens(pool, generator), document, query, positive, negative, known, weight)

    return [one() for _ in range(num_pools)]


def rows_of_pairs(batch: PairBatch, first: int, last: int) -> PairBatch:
    slots = len(batch.document.input_ids) // len(batch.query.input_ids)
    sides = {"document": batch.document, "surrogate_document": batch.surrogate_document}
    sides = {name: rows_of(side, first * slots, last * slots) for name, side in sides.items()}
    return rows_of(batch._replace(document=batch.query), first, last)._replace(**sides)


def with_surrogate(batch: PairBatch, seed: int) -> PairBatch:
    """A batch with a surrogate's vectors: 6 dimensions, documents around their queries, fp16, not of unit length."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(len(batch.weight), 6, generator=generator)
    near = query.repeat_interleave(len(batch.document.input_ids) // len(query), 0)
    near = near + 1.5 * torch.randn(near.shape, generator=generator)
    return batch._replace(surrogate_query=query.half(), surrogate_document=near.half())


def random_crops(num_pools: int, pool: int, views: int, seed: int = 0) -> list[CropBatch]:
    """Pools of random texts whose views lose up to two first tokens, so that they agree."""
    generator = torch.Generator().manual_seed(seed)

    def number(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    def view(text: list[int]) -> list[int]:
        return text[number(3) :]

    def one(t: int) -> CropBatch:
        texts = [[3 + number(VOCABULARY - 3) for _ in range(5 + number(10))] for _ in range(pool)]
        query, *keys = ([view(text) for text in texts] for _ in range(1 + views))
        return CropBatch(
            pad(query, 0), pad([row for of_view in keys for row in of_view], 0), torch.arange(pool) * 7 + t
        )

    return [one(t) for t in range(num_pools)]


def random_graded(num_pools: int, pool: int, size: int, seed: int = 0) -> list[GradedBatch]:
    """Pools of random texts with random grades of 0 to 3, the first passage of a query always of grade 3."""
    generator = torch.Generator().manual_seed(seed)

    def one() -> GradedBatch:
        grade = torch.randint(4, (pool, size), generator=generator).float()
        grade[:, 0] = 3
        return GradedBatch(random_tokens(pool, generator), random_tokens(pool * size, generator), grade)

    return [one() for _ in range(num_pools)]


def rows_of_graded(batch: GradedBatch, first: int, last: int) -> GradedBatch:
    size = batch.grade.shape[1]
    passage = rows_of(batch.passage, first * size, last * size)
    return GradedBatch(rows_of(batch.query, first, last), passage, batch.grade[first:last])


def rows_of_crops(batch: CropBatch, first: int, last: int) -> CropBatch:
    rows = len(batch.document)
    of_views = [slice(v * rows + first, v * rows + last) for v in range(len(batch.key.input_ids) // rows)]
    mask = torch.cat([batch.key.attention_mask[s] for s in of_views])
    ids = torch.cat([batch.key.input_ids[s] for s in of_views])
    key = rows_of(Tokens(ids, mask), 0, len(ids))
    return rows_of(batch._replace(key=batch.query), first, last)._replace(key=key)
