"""A tiny causal language model with a chat template: random weights, so that its answers are garbage."""

from pathlib import Path
from typing import Any

import torch
from tiny_retriever import small_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system text') }}{% endif %}" + TEMPLATE
DROPS_SYSTEM = TEMPLATE.replace("messages %}<", "messages if message.role != 'system' %}<")


def save_chat_model(folder: Path, template: str | None = TEMPLATE, **generation: Any) -> Path:
    """A two-layer Llama with a byte-level tokenizer; `generation` are keys of its generation_config.json."""
    tokenizer = small_tokenizer("plain")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    for key, value in generation.items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(folder)
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder
