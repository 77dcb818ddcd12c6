"""Tiny retrievers of every kind an export can meet, as training holds them when it exports."""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tiny import wordpiece_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaTokenizer,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

from toolkit.export.write import write_export
from toolkit.methods.revela.method import METHOD
from toolkit.models.backbone import add_lora, load_encoder_backbone, load_tokenizer
from toolkit.models.encoder import Encoder
from toolkit.prepare.models import ModelSource
from toolkit.recipe.models import EncoderSettings
from toolkit.retrieval.embed import Retriever, embed_texts

TEXTS = [
    "open a file and read its lines",
    "sorted(items, key=len)",
    "Return the largest of two numbers, or of any number of them, as the operator less than says. " * 4,  # cut
    "x",
]
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "mistral": MistralConfig}
ENCODERS = {  # bidirectional: model type -> style of tokenizer
    "bert": "wordpiece", "roberta": "roberta", "xlm-roberta": "unigram", "distilbert": "wordpiece",
    "modernbert": "cls_sep", "nomic_bert": "wordpiece", "t5": "t5",
}  # fmt: skip
TARGETS = {kind: ["q_proj", "down_proj"] for kind in CONFIGS} | {
    "bert": ["query", "key", "value", "dense"], "roberta": ["query", "key", "value", "dense"],
    "xlm-roberta": ["query", "value"], "distilbert": ["q_lin", "lin2"], "modernbert": ["Wqkv", "Wo"],
    "nomic_bert": ["k_proj", "up_proj"], "t5": ["q", "wo"],
}  # fmt: skip
TOKENIZERS = ("plain", "gpt2", "bos", "bos_eos")
CARD = {
    "recipe": "tiny", "recipe_digest": "0123456789abcdef", "stage": "revela", "method": "revela",
    "method_card": METHOD.card,
    "data": "stdlib",
    "data_digest": "fedcba9876543210", "steps": 1200, "rows_seen": 76800, "tokens_seen": 4915200,
    "command": "deepspeed launcher/run.py recipes/tiny.json", "seed": 7,
}  # fmt: skip


class Case(NamedTuple):
    kind: str
    tokenizer: str
    lora: bool
    pooling: Literal["eos", "mean"]
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
    "bert_lora": Case("bert", "wordpiece", True, "mean", True, True, torch.float32),
    "bert_full": Case("bert", "wordpiece", False, "eos", True, False, torch.float32),
    "roberta_lora": Case("roberta", "roberta", True, "eos", False, True, torch.bfloat16),
    "xlm_roberta_full": Case("xlm-roberta", "unigram", False, "mean", True, True, torch.bfloat16),
    "distilbert_lora": Case("distilbert", "wordpiece", True, "mean", False, True, torch.float32),
    "modernbert_lora": Case("modernbert", "cls_sep", True, "mean", True, True, torch.bfloat16),
    "modernbert_full": Case("modernbert", "cls_sep", False, "eos", True, True, torch.float32),
    "nomic_bert_lora": Case("nomic_bert", "wordpiece", True, "mean", True, True, torch.float32),
    "nomic_bert_full": Case("nomic_bert", "wordpiece", False, "mean", True, True, torch.bfloat16),
    "t5_lora": Case("t5", "t5", True, "mean", True, True, torch.bfloat16),
    "t5_full": Case("t5", "t5", False, "mean", False, True, torch.float32),
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


def small_tokenizer(style: str) -> Any:
    """Byte-level BPE; special tokens: none, as GPT-2 (ByteLevel), as Llama 3 (also bos), or bos and eos.

    Or a bidirectional encoder's: BERT's, RoBERTa's, XLM-RoBERTa's, T5's, or BPE with [CLS] and [SEP] as ModernBERT's.
    """
    if style == "wordpiece":
        return wordpiece_tokenizer()
    if style == "t5":
        pieces = [*("<pad>", "</s>", "<unk>"), *(chr(i) for i in range(33, 127)), "\u2581"]
        return T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)
    if style == "unigram":
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        pieces = [*special, *(chr(i) for i in range(33, 127)), "\u2581"]
        return XLMRobertaTokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)])
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(TEXTS, trainer)
    if style == "roberta":
        written: Any = json.loads(backend.to_str())["model"]
        second = {"</s>": "<pad>"}  # RoBERTa's padding is token 1
        vocabulary: Any = {second.get(token, token): i for token, i in written["vocab"].items()} | {"</s>": 321}
        merges: Any = [tuple(merge) for merge in written["merges"]]
        return RobertaTokenizer(vocab=vocabulary, merges=merges)
    if style == "cls_sep":
        both = [("<s>", 0), ("</s>", 1)]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=both)
        return PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="<s>", sep_token="</s>", pad_token="</s>")
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
    """A folder with a random causal language model, or an encoder as published (with its pooling layer or decoder).

    The vocabulary has room for tokens that a tokenizer class adds.
    """
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"vocab_size": 330, "max_position_embeddings": 64, "initializer_range": 0.2}
    tokenizer_made = small_tokenizer(tokenizer)
    torch.manual_seed(0)
    if kind in ENCODERS:
        sizes |= {"distilbert": {"dim": 32, "hidden_dim": 64}, "modernbert": {"local_attention": 8}}.get(kind, {})
        sizes |= {"d_ff": 64, "d_kv": 8, "initializer_factor": 2.0} if kind == "t5" else {}
        config = AutoConfig.for_model(kind, pad_token_id=tokenizer_made.pad_token_id, **sizes)
        AutoModel.from_config(config).save_pretrained(folder)
    else:
        config = CONFIGS[kind](num_key_value_heads=2, tie_word_embeddings=tied, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer_made.save_pretrained(folder)
    return folder


def make(case: Case, folder: Path) -> Made:
    folder = small_model(case.kind, folder, case.tokenizer)
    settings = EncoderSettings(
        pooling=case.pooling, normalize=case.normalize, append_eos=case.append_eos, query_prefix="find: ",
        passage_prefix="text:\n", max_tokens=16, eval_max_tokens=24,
    )  # fmt: skip
    backbone: Any = load_encoder_backbone(folder, case.dtype)
    if case.lora:
        backbone = add_lora(backbone, 4, 8.0, 0.0, TARGETS[case.kind], causal=False, seed=1).to(case.dtype)
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
