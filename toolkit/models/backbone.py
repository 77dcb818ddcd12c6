"""Transformer backbones: load from a folder or build small from a config; number format, attention, adapters.

Called by prepare, training, export and embedding. Reads safetensors only and never runs code that came with weights.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.utils import logging as hub_logging
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
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
CAUSAL_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # causal language models; without their head, retrievers
ENCODER_TYPES = ("bert", "roberta", "xlm-roberta", "distilbert", "modernbert")  # bidirectional: retrievers only
POOLING_LAYER = ("bert", "roberta", "xlm-roberta")  # come with a layer on the first token that no retriever reads
LEARNED_POSITIONS = ("bert", "roberta", "xlm-roberta", "distilbert")  # an embedding per position, so a longest input


class LoraSettings(Protocol):
    """What the recipe's `lora` section says of an adapter."""

    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def targets(self) -> list[str]: ...


def load_encoder_backbone(folder: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """The model of a folder without head and pooling layer, in eval mode.

    Raises:
        ValueError: for an unsupported model type, or weights that are damaged or not all there.
    """
    return _load(AutoModel, folder, dtype, "sdpa", **headless(read_config(folder))).to(device)


def load_adapted(base: str | Path, adapter: Path, dtype: torch.dtype, device: torch.device | str) -> PeftModel:
    """load_encoder_backbone of `base`, with the adapter of a folder beside its weights; all in `dtype`."""
    model: Any = load_encoder_backbone(base, dtype, device)
    # autocast_adapter_dtype would keep a bf16 adapter in fp32, unlike in training
    found = PeftModel.from_pretrained(model, adapter, torch_device=str(device), autocast_adapter_dtype=False)
    return found.to(dtype).eval()


def load_causal_lm(
    folder: str | Path, dtype: torch.dtype, attention: str, device: torch.device | str = "cpu"
) -> nn.Module:
    """The causal language model of a folder, in eval mode; `attention` is "sdpa" or a registered interface.

    Raises:
        ValueError: for an unsupported or bidirectional model type, or weights that are damaged or not all there.
    """
    _check_causal(read_config(folder), folder)
    return _load(AutoModelForCausalLM, folder, dtype, attention).to(device)


def _load(auto: Any, folder: str | Path, dtype: torch.dtype, attention: str, **options: Any) -> Any:
    with _readable(folder):
        model, report = auto.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,  # by default transformers asks at the terminal
            output_loading_info=True,
            **options,
        )
    missing = sorted(report["missing_keys"])
    if missing:  # they would be random
        raise ValueError(
            f"{folder}: the weights file lacks {len(missing)} weights of a {type(model).__name__} "
            f"({', '.join(missing[:3])}); name a folder that holds the whole model"
        )
    return model


def headless(config: PretrainedConfig) -> dict[str, bool]:
    """Options of AutoModel that keep a pooling layer away: never read, it would be a parameter without gradient."""
    return {"add_pooling_layer": False} if config.model_type in POOLING_LAYER else {}


def _check_causal(config: PretrainedConfig, name: str | Path) -> None:
    if config.model_type in ENCODER_TYPES:
        raise ValueError(
            f"{name}: model type {config.model_type!r} reads both ways and predicts no next token, so it can be the "
            f"retriever only; as the language model name one of type {', '.join(CAUSAL_TYPES)}"
        )


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
    """The model of a config without memory (all parameters on the meta device); ValueError as in load_causal_lm."""
    if causal:
        _check_causal(config, str(config.name_or_path))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config) if causal else AutoModel.from_config(config, **headless(config))


def read_config(folder: str | Path) -> PretrainedConfig:
    """The config.json of a folder; raises ValueError unless its model type is supported."""
    supported = CAUSAL_TYPES + ENCODER_TYPES
    with _readable(folder):
        found = PretrainedConfig.get_config_dict(folder, local_files_only=True)[0].get("model_type")
        if found is None:
            raise ValueError("config.json is not there, or names no model_type")
        if found in supported:
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    raise ValueError(f"{folder}: model type {found!r} is not supported; use one of {', '.join(supported)}")


def longest_input(config: PretrainedConfig) -> int:
    """The most tokens that a retriever has positions for."""
    # RoBERTa's first token has the position after that of padding
    taken = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta") else 0
    return config.max_position_embeddings - taken


def check_length(
    config: PretrainedConfig, max_tokens: int, keys: str = "encoder.max_tokens and encoder.eval_max_tokens"
) -> None:
    """Raise ValueError if a retriever with learned positions has fewer of them than the longest input has tokens.

    `keys`: what the user has to set instead.
    """
    positions = longest_input(config)
    if config.model_type in LEARNED_POSITIONS and max_tokens > positions:
        raise ValueError(
            f"the model ({config.model_type}) has learned positions for {positions} tokens; set {keys} to at most "
            f"{positions} (found {max_tokens})"
        )


def check_window(config: PretrainedConfig, max_tokens: int) -> None:
    """Raise ValueError if a layer's sliding window is shorter than the input.

    The paper does not say how a window and in-batch attention go together, so neither do we.
    """
    windowed = config.model_type in ("mistral", "qwen2", "qwen3")
    window = config.sliding_window if windowed else None  # also None where the window is switched off
    if window is not None and window < max_tokens:
        raise ValueError(
            f"a sliding window of {window} tokens is shorter than max_tokens {max_tokens}; shorten the input"
        )


def load_tokenizer(folder: str | Path) -> Any:
    """The fast tokenizer of a folder, cutting and padding on the right, whatever side its own config names.

    Where it names no end token, the separator is it.

    Raises:
        ValueError: if it has neither.
    """
    with _readable(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=True, trust_remote_code=False)
    if tokenizer.eos_token is None:  # [CLS] text [SEP]
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer names no end token (eos_token); set one in tokenizer_config.json")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
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


def build_llama(config: LlamaConfig, seed: int, zero_residual: bool) -> nn.Module:
    """A causal language model with random weights, a function of the arguments alone.

    zero_residual: attention and feed-forward start without effect (their last projections are zero).
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    if zero_residual:
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)
    return model


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


def adapted(model: nn.Module, lora: LoraSettings | None, adapter: Path | None, causal: bool, seed: int) -> nn.Module:
    """A model ready to train: all of it, with new adapters (`add_lora`), or with those of a folder to go on with.

    Args:
        lora: the recipe's settings; None trains all parameters.
        adapter: folder with adapter_config.json and adapter_model.safetensors; must agree with `lora` (dropout is
            `lora`'s).
        causal, seed: as in add_lora, for new adapters.

    Raises:
        ValueError: if the adapter of the folder is none of `lora`, or targets match no module.
    """
    if adapter is not None:
        device = str(next(model.parameters()).device)
        config = adapter_config(adapter, lora)
        return PeftModel.from_pretrained(model, adapter, is_trainable=True, config=config, torch_device=device)  # pyright: ignore[reportArgumentType]
    if lora is None:
        return model
    return add_lora(model, lora.rank, lora.alpha, lora.dropout, lora.targets, causal, seed)


def adapter_config(adapter: Path, lora: LoraSettings | None) -> LoraConfig:
    """The config of an adapter to go on with; raises ValueError if rank, alpha or targets are not those of `lora`."""
    config = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{adapter}: holds an adapter of type {config.peft_type}; only LoRA adapters can be continued")
    targets = config.target_modules
    there = _lora_line(config.r, config.lora_alpha, [targets] if isinstance(targets, str) else list(targets or ()))
    here = "is null" if lora is None else f"has {_lora_line(lora.rank, lora.alpha, lora.targets)}"
    if lora is None or here != f"has {there}":
        raise ValueError(
            f"{adapter}: holds an adapter, and the stage's lora {here}; name {adapter}/merged (full weights), or set "
            f"lora to {there}"
        )
    config.lora_dropout = lora.dropout
    return config


def _lora_line(rank: int, alpha: float, targets: list[str]) -> str:
    return f"rank {rank}, alpha {float(alpha):g}, targets {', '.join(sorted(set(targets)))}"
