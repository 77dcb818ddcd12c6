"""Transformer backbones: load from a folder or build small from a config; number format, attention, adapters.

Called by prepare, training, export and embedding. Reads safetensors only and never runs code that came with weights.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    logging,
)

# Every rank and every reload would print a bar, an encoder's missing head would be reported as a fault, and libraries
# would remind one another's authors of renamed functions.
logging.disable_progress_bar()
logging.set_verbosity_error()
hub_logging.set_verbosity_error()
warnings.filterwarnings("ignore", category=FutureWarning)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
SUPPORTED_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def load_encoder_backbone(folder: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """The model of a folder without its head, in eval mode; raises ValueError for an unsupported model type."""
    read_config(folder)
    with _readable(folder):
        return AutoModel.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, local_files_only=True
        ).to(device)


def load_causal_lm(
    folder: str | Path, dtype: torch.dtype, attention: str, device: torch.device | str = "cpu"
) -> nn.Module:
    """The causal language model of a folder, in eval mode; `attention` is "sdpa" or a registered interface."""
    read_config(folder)
    with _readable(folder):
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, use_safetensors=True, local_files_only=True
        )
    return model.to(device)


@contextmanager
def _readable(folder: str | Path) -> Iterator[None]:
    """The many exceptions of a damaged or foreign model folder as one ValueError of one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{folder}: cannot be loaded ({type(error).__name__}: {reason}); write the folder again"
        ) from None


def on_meta(config: PretrainedConfig, causal: bool) -> nn.Module:
    """The model of a config without memory (all parameters on the meta device)."""
    with torch.device("meta"):
        return (AutoModelForCausalLM if causal else AutoModel).from_config(config)


def read_config(folder: str | Path) -> PretrainedConfig:
    """The config.json of a folder; raises ValueError unless its model type is supported."""
    with _readable(folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type not in SUPPORTED_TYPES:
        raise ValueError(
            f"{folder}: model type {config.model_type!r} is not supported; use one of {', '.join(SUPPORTED_TYPES)}"
        )
    return config


def check_window(config: PretrainedConfig, max_tokens: int) -> None:
    """Raise ValueError if a layer's sliding window is shorter than the input.

    The paper does not say how a window and in-batch attention go together, so neither do we.
    """
    window = None if config.model_type == "llama" else config.sliding_window  # None where the window is switched off
    if window is not None and window < max_tokens:
        raise ValueError(
            f"a sliding window of {window} tokens is shorter than max_tokens {max_tokens}; shorten the input"
        )


def load_tokenizer(folder: str | Path) -> Any:
    """The fast tokenizer of a folder, padding on the right; raises ValueError if it has no end token."""
    with _readable(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=True)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer names no end token (eos_token); set one in tokenizer_config.json")
    tokenizer.padding_side = "right"
    return tokenizer


def llama_config(build: dict[str, Any], bos_id: int, eos_id: int, pad_id: int) -> LlamaConfig:
    """The config of a small Llama from the recipe's `build` keys."""
    return LlamaConfig(
        vocab_size=build["tokenizer"]["vocab_size"],
        hidden_size=build["hidden_size"],
        intermediate_size=build["intermediate_size"],
        num_hidden_layers=build["layers"],
        num_attention_heads=build["heads"],
        num_key_value_heads=build["kv_heads"],
        max_position_embeddings=build["max_tokens"],
        tie_word_embeddings=build["tie_embeddings"],
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )


def build_llama(config: LlamaConfig, seed: int) -> nn.Module:
    """A causal language model with random weights, a function of (config, seed) alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def add_lora(
    model: nn.Module, rank: int, alpha: float, dropout: float, targets: list[str], causal: bool, seed: int
) -> PeftModel:
    """Freeze a model and add adapters (LoRA, arXiv 2106.09685), a function of (model, settings, seed).

    Raises:
        ValueError: if a target names no linear module; lists those that exist.
    """
    linear = sorted(
        {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    )
    unknown = [target for target in targets if target not in linear]
    if unknown:
        raise ValueError(f"LoRA targets {', '.join(unknown)} match no module; the model has {', '.join(linear)}")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=dropout,
        target_modules=list(targets),
        task_type=TaskType.CAUSAL_LM if causal else TaskType.FEATURE_EXTRACTION,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)  # pyright: ignore[reportReturnType, reportArgumentType]
