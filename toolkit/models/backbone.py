"""Transformer backbones: load from a folder or build small from a config; number format, attention, adapters.

Called by prepare, training, export and embedding. Reads safetensors only and never runs code that came with weights.
"""

import json
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
    T5EncoderModel,
    logging,
)

from toolkit.models.adapters import LoraSettings, check_continued, check_fit, fill, with_adapter
from toolkit.models.formats import check_report, lacks_weights, say_decoder, say_own_class, warn_once
from toolkit.models.own_names import check_own_names

# Every rank and every reload would print a bar, an encoder's missing head would be reported as a fault, and libraries
# would remind one another's authors of renamed functions.
logging.disable_progress_bar()
logging.set_verbosity_error()
hub_logging.set_verbosity_error()
warnings.filterwarnings("ignore", category=FutureWarning)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
CAUSAL_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # causal language models; without their head, retrievers
# Bidirectional: retrievers only. Of T5 the encoder alone.
ENCODER_TYPES = ("bert", "roberta", "xlm-roberta", "distilbert", "modernbert", "nomic_bert", "t5")
POOLING_LAYER = ("bert", "roberta", "xlm-roberta")  # come with a layer on the first token that no retriever reads


def load_encoder_backbone(folder: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """The model of a folder without head and pooling layer, in eval mode.

    Raises:
        ValueError: for an unsupported model type, a direction that it does not read in, or weights that are damaged,
            not all there or not of this model.
    """
    config = read_config(folder)
    _check_direction(config, folder)
    return _load(headless_class(config), folder, config, dtype, "sdpa").to(device)


def load_adapted(base: str | Path, adapter: Path, dtype: torch.dtype, device: torch.device | str) -> PeftModel:
    """load_encoder_backbone of `base`, with the adapter of a folder beside its weights; all in `dtype`.

    Raises:
        ValueError: as load_encoder_backbone, or if the adapter does not fit the model.
    """
    return with_adapter(load_encoder_backbone(base, dtype, device), adapter).to(dtype).eval()


def load_causal_lm(
    folder: str | Path, dtype: torch.dtype, attention: str, device: torch.device | str = "cpu"
) -> nn.Module:
    """The causal language model of a folder, in eval mode; `attention` is "sdpa" or a registered interface.

    Raises:
        ValueError: for an unsupported or bidirectional model, or weights that are damaged, not all there or not of
            this model.
    """
    config = read_config(folder)
    _check_causal(config, folder)
    return _load(AutoModelForCausalLM, folder, config, dtype, attention).to(device)


def _load(auto: Any, folder: str | Path, config: PretrainedConfig, dtype: torch.dtype, attention: str) -> Any:
    if problem := lacks_weights(Path(folder)):
        raise ValueError(problem)
    with _readable(folder):
        model, report = auto.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,  # by default transformers asks at the terminal
            ignore_mismatched_sizes=True,  # they are in the report
            output_loading_info=True,
            **({} if auto is AutoModelForCausalLM else headless(config)),
        )
    say_own_class(model, _auto_name(auto), folder)
    check_report(model, report, folder)
    say_decoder(model, Path(folder))
    return model


def check_weights(folder: Path) -> None:
    """check_report of a folder whose model another library loads; nothing is allocated."""
    with _readable(folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, report = headless_class(config).from_pretrained(
            folder,
            device_map="meta",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    check_own_names(config, folder)
    say_own_class(model, "AutoModel", folder)
    check_report(model, report, folder)
    say_decoder(model, folder)


def check_adapter(base: str, folder: Path) -> None:
    """Raise ValueError unless the adapter of a folder fits a base (folder or id in the cache) that another library
    puts it on; nothing is allocated."""
    with _readable(base):
        config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = _without_weights(config)
    check_own_names(config, base)
    say_own_class(model, "AutoModel", base)
    check_fit(model, folder)


def _auto_name(auto: Any) -> str:
    """The key of an auto_map that names a class in place of this one."""
    return "AutoModelForCausalLM" if auto is AutoModelForCausalLM else "AutoModel"


def _without_weights(config: PretrainedConfig) -> Any:
    """A headless model of random weights."""
    found = headless_class(config)
    return found.from_config(config, **headless(config)) if found is AutoModel else found(config)


def headless_class(config: PretrainedConfig) -> Any:
    """What reads a text as a retriever; of T5, AutoModel would be the decoder too."""
    return T5EncoderModel if config.model_type == "t5" else AutoModel


def headless(config: PretrainedConfig) -> dict[str, bool]:
    """Options of AutoModel that keep a pooling layer away: never read, it would be a parameter without gradient."""
    return {"add_pooling_layer": False} if config.model_type in POOLING_LAYER else {}


def _check_causal(config: PretrainedConfig, name: str | Path) -> None:
    if config.model_type in ENCODER_TYPES:
        raise ValueError(
            f"{name}: model type {config.model_type!r} reads both ways and predicts no next token, so it can be the "
            f"retriever only; as the language model name one of type {', '.join(CAUSAL_TYPES)}"
        )
    for key, _ in _both_ways(config.to_dict()):
        raise ValueError(
            f"{name}: config.json says {key}, so the model reads both ways and predicts no next token: it can be the "
            "retriever only; as the language model name one without that"
        )


def _check_direction(config: PretrainedConfig, name: str | Path) -> None:
    """Raise ValueError where config.json says that a retriever reads both ways, and it would not.

    Of all such keys only is_causal at the top is read, by the function that makes the masks of the causal types.
    """
    for key, is_read in _both_ways(config.to_dict()):
        if config.model_type in CAUSAL_TYPES and not is_read:
            raise ValueError(
                f"{name}: config.json says {key}, which has no effect on type {config.model_type}; set is_causal to "
                "false at its top, then it reads both ways, or take the key out, then it reads from left to right"
            )


def _both_ways(settings: dict[str, Any], at: str = "") -> Iterator[tuple[str, bool]]:
    """What a config says of attention to later tokens ("is_causal: false"), at any depth, and whether that is read."""
    for key, value in settings.items():
        if (key == "is_causal" and value != True) or (key == "use_bidirectional_attention" and value):  # noqa: E712
            yield f"{at}{key}: {json.dumps(value, default=str)}", key == "is_causal" and not at and not value
        elif isinstance(value, dict):
            yield from _both_ways(value, f"{at}{key}.")


@contextmanager
def _readable(folder: str | Path) -> Iterator[None]:
    """The many exceptions of a damaged or foreign model folder as one ValueError of one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{folder}: cannot be loaded ({type(error).__name__}: {reason}); write the folder again"
        ) from None


def on_meta(config: PretrainedConfig, causal: bool) -> nn.Module:
    """The model of a config without memory (all parameters on the meta device); ValueError as where it is loaded."""
    (_check_causal if causal else _check_direction)(config, str(config.name_or_path))
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config) if causal else _without_weights(config)
    say_own_class(model, "AutoModelForCausalLM" if causal else "AutoModel", str(config.name_or_path))
    return model


def read_config(folder: str | Path) -> PretrainedConfig:
    """The config.json of a folder; raises ValueError unless its model type is supported."""
    supported = CAUSAL_TYPES + ENCODER_TYPES
    config = None
    with _readable(folder):
        found = PretrainedConfig.get_config_dict(folder, local_files_only=True)[0].get("model_type")
        if found is None:
            raise ValueError("config.json is not there, or names no model_type")
        if found in supported:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if config is not None:
        check_own_names(config, folder)
        _check_padding(config, folder)
        return config
    raise ValueError(f"{folder}: model type {found!r} is not supported; use one of {', '.join(supported)}")


def _check_padding(config: PretrainedConfig, folder: str | Path) -> None:
    """Take away a negative pad_token_id, for which no token stands; ValueError for one that the model cannot be built
    with."""
    pad, rows = config.pad_token_id, config.vocab_size
    counted = config.model_type in ("roberta", "xlm-roberta")  # the first token has the position after that of padding
    if pad is not None and (pad >= rows or (pad < 0 and counted)):
        raise ValueError(
            f"{folder}/config.json: pad_token_id {pad} is outside the vocabulary of {rows:,}; write "
            + ("the id of the padding token" if counted else "null: texts are then padded with the end token")
        )
    if pad is not None and pad < 0:
        config.pad_token_id = None
        warn_once(f"warning: {folder}/config.json: pad_token_id {pad} is no token; it is taken as null")


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
            `lora`'s). It may come from another class of the model: its weights get our names.
        causal, seed: as in add_lora.

    Raises:
        ValueError: if the adapter of the folder is none of `lora`, or does not fit, or targets match no module.
    """
    if adapter is not None:
        check_continued(on_meta(model.config, causal), adapter, lora)  # pyright: ignore[reportArgumentType]
        assert lora is not None
    if lora is None:
        return model
    found = add_lora(model, lora.rank, lora.alpha, lora.dropout, lora.targets, causal, seed)
    if adapter is not None:
        fill(found, adapter)
    return found
