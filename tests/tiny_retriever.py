"""Tiny retrievers of every kind an export can meet, as training holds them when it exports."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from toolkit.embed import Retriever, embed_texts
from toolkit.export import write_export
from toolkit.models.backbone import add_lora, load_encoder_backbone, load_tokenizer
from toolkit.models.encoder import Encoder
from toolkit.prepare import ModelSource
from toolkit.recipe import EncoderSettings

TEXTS = [
    "open a file and read its lines",
    "sorted(items, key=len)",
    "Return the largest of two numbers, or of any number of them, as the operator less than says. " * 4,  # cut
    "x",
]
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "mistral": MistralConfig}
TOKENIZERS = ("plain", "gpt2", "bos", "bos_eos")
CARD = {
    "recipe": "tiny", "recipe_digest": "0123456789abcdef", "stage": "revela", "method": "revela", "data": "stdlib",
    "data_digest": "fedcba9876543210", "steps": 1200, "rows_seen": 76800, "tokens_seen": 4915200,
    "command": "deepspeed launcher/run.py recipes/tiny.json", "seed": 7,
}  # fmt: skip


class Case(NamedTuple):
    kind: str
    tokenizer: str
    lora: bool
    pooling: str
    normalize: bool
    append_eos: bool
    dtype: torch.dtype


CASES = {
    "llama_lora": Case("llama", "bos", True, "eos", True, True, torch.float32),
    "qwen2_lora": Case("qwen2", "plain", True, "mean", False, False, torch.float32),
    "mistral_lora": Case("mistral", "bos_eos", True, "eos", True, True, torch.bfloat16),
    "qwen3_lora": Case("qwen3", "gpt2", True, "mean", False, True, torch.bfloat16),
    "llama_full": Case("llama", "plain", False, "mean", True, True, torch.bfloat16),
    "qwen2_full": Case("qwen2", "gpt2", False, "eos", False, True, torch.float32),
    "mistral_full": Case("mistral", "bos", False, "mean", True, False, torch.float32),
    "qwen3_full": Case("qwen3", "bos_eos", False, "eos", False, True, torch.bfloat16),
}


class Made(NamedTuple):
    """A model as training holds it when it exports, and what it gives."""

    case: Case
    backbone: Any  # on the meta device: its weights cannot be read, as at ZeRO stage 3
    state: dict[str, torch.Tensor]
    settings: EncoderSettings
    tokenizer: Any
    base: ModelSource
    live: dict[str, np.ndarray]

    def write(self, folder: Path, merged: bool = True, **changes: Any) -> Path:
        arguments = {
            "backbone": self.backbone, "state": self.state, "settings": self.settings, "tokenizer": self.tokenizer,
            "base": self.base, "dtype": self.case.dtype, "merged": merged, "card": CARD,
        }  # fmt: skip
        write_export(folder, **(arguments | changes))
        return folder


def small_tokenizer(style: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE; special tokens: none, as GPT-2 (ByteLevel), as Llama 3 (also bos), or bos and eos."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(TEXTS, trainer)
    template = processors.TemplateProcessing
    if style == "gpt2":
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    elif style == "bos":
        first = template(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)])
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), first])
    elif style == "bos_eos":
        both = [("<s>", 0), ("</s>", 1)]
        backend.post_processor = template(single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=both)
    bos = {} if style in ("plain", "gpt2") else {"bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **bos)


def small_model(kind: str, folder: Path, tokenizer: str, tied: bool = False) -> Path:
    """A folder with a random causal language model; its vocabulary has room for tokens that a tokenizer class adds."""
    config = CONFIGS[kind](
        vocab_size=330, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    small_tokenizer(tokenizer).save_pretrained(folder)
    return folder


def make(case: Case, folder: Path) -> Made:
    folder = small_model(case.kind, folder, case.tokenizer)
    settings = EncoderSettings(
        pooling=case.pooling, normalize=case.normalize, append_eos=case.append_eos, query_prefix="find: ",
        passage_prefix="text:\n", max_tokens=16, eval_max_tokens=24,
    )  # fmt: skip
    backbone: Any = load_encoder_backbone(folder, case.dtype)
    if case.lora:
        backbone = add_lora(backbone, 4, 8.0, 0.0, ["q_proj", "down_proj"], causal=False, seed=1).to(case.dtype)
    state = {}
    for name, weight in backbone.named_parameters():
        if "lora_B" in name:  # zero at the start
            torch.nn.init.normal_(weight, std=0.05)
        if weight.requires_grad:
            state[name] = weight.detach().clone()
    tokenizer = load_tokenizer(folder)
    retriever = Retriever(Encoder(backbone, case.pooling, case.normalize).eval(), tokenizer, settings)
    live = {"query": embed_texts(retriever, TEXTS, "query"), "passage": embed_texts(retriever, TEXTS, "passage")}
    return Made(case, backbone.to("meta"), state, settings, tokenizer, ModelSource(folder, str(folder), None), live)
