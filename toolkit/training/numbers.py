"""Derived numbers of a stage, and the checks that need parameter counts. Called by --dry-run and by the loop."""

import math
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PretrainedConfig

from toolkit.models.backbone import add_lora, on_meta
from toolkit.models.lengths import check_length, check_window
from toolkit.recipe import (
    ContrastiveObjective,
    LanguageModelObjective,
    Lora,
    RecipeError,
    ReContrieverObjective,
    RevelaObjective,
    Stage,
    batch_numbers,
)

# Full fine-tuning under gradient caching keeps unsharded gradients of all trainable parameters until the backward ends.
MAX_UNSHARDED_PARAMETERS = 2_000_000_000
BYTES = {"bf16": 2, "fp32": 4}


def parameter_counts(
    stage: Stage, encoder: PretrainedConfig, language_model: PretrainedConfig | None
) -> dict[str, int]:
    """Trainable and total parameters of each model of a stage, from configs alone (nothing is allocated).

    Raises:
        RecipeError: if the recipe's LoRA targets match no module, inputs are longer than the language model's sliding
            window, no Matryoshka size is the model's width, or the stage is full fine-tuning of a
            multi-billion model under gradient caching.
        ValueError: if inputs are longer than the retriever reads, or a model's type is not supported.
    """
    lengths = (stage.encoder.max_tokens, stage.encoder.eval_max_tokens)
    check_length(encoder, max((length for length in lengths if length is not None), default=0))
    if isinstance(stage.objective, ContrastiveObjective) and stage.objective.matryoshka is not None:
        _check_matryoshka(max(stage.objective.matryoshka), encoder.hidden_size, stage.name)
    models = {"retriever": (encoder, stage.lora, False)}
    if isinstance(stage.objective, RevelaObjective) and language_model is not None:
        try:
            check_window(language_model, stage.objective.language_model.max_tokens)
        except ValueError as error:
            raise RecipeError(f"stage {stage.name}: objective.language_model.max_tokens: {error}") from None
        models["language_model"] = (language_model, stage.objective.language_model.lora, True)
    elif isinstance(stage.objective, LanguageModelObjective):
        models = {"language_model": (encoder, None, True)}
    counts: dict[str, int] = {}
    for name, (config, lora, causal) in models.items():
        model = on_meta(config, causal)
        if lora is not None:
            model = _with_lora(model, lora, causal, f"stage {stage.name}: {name}")
        counts[f"{name}_parameters"] = sum(p.numel() for p in model.parameters())
        counts[f"{name}_trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    check_gradients(stage, sum(count for name, count in counts.items() if name.endswith("_trainable")))
    return counts


def _check_matryoshka(largest: int, hidden_size: int, stage: str) -> None:
    """The export holds vectors of all dimensions, so these are trained too."""
    if largest > hidden_size:
        problem = f"{largest} is more than the model's {hidden_size} dimensions; remove it"
    elif largest < hidden_size:
        problem = f"lacks the model's {hidden_size} dimensions, which its export has; add {hidden_size}"
    else:
        return
    raise RecipeError(f"stage {stage}: objective.matryoshka: {problem}")


def _with_lora(model: nn.Module, lora: Lora, causal: bool, where: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return add_lora(model, lora.rank, lora.alpha, lora.dropout, lora.targets, causal, seed=0)
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from None


def check_gradients(stage: Stage, trainable: int) -> None:
    """Refuse full fine-tuning of a multi-billion model under gradient caching, with the memory it would take."""
    sliced = stage.batch.forward_rows is not None or stage.batch.forward_tokens is not None
    if sliced and trainable >= MAX_UNSHARDED_PARAMETERS:
        gigabytes = trainable * BYTES[stage.precision] / 1e9
        raise RecipeError(
            f"stage {stage.name}: gradients of {trainable / 1e9:.1f} billion trainable parameters stay unsharded "
            f"({gigabytes:.0f} GB a GPU) while slices are recomputed; use lora, or set batch.forward_rows and "
            "batch.forward_tokens to null"
        )


def derived(stage: Stage, world_size: int) -> Iterator[tuple[str, str]]:
    """(name, value) of everything that follows from the recipe's batch and optimizer keys on `world_size` ranks."""
    numbers = batch_numbers(stage, world_size)
    batch, optim = stage.batch, stage.optim
    rows = numbers["rows_per_step_global"]
    row, texts, longest = _row(stage)
    spread = batch.pool if batch.span == "world" else batch.pools_per_step
    yield "pool", f"{batch.pool} {row}, span {batch.span}"
    yield "rows per step (global)", f"{batch.pool} x {batch.pools_per_step} pools = {rows}"
    yield "ranks", f"{world_size} (fit: {', '.join(str(n) for n in range(1, spread + 1) if spread % n == 0)})"
    yield "rows per forward (per rank)", str(numbers["rows_per_forward_per_rank"])
    yield "forwards per step (per rank)", str(numbers["accumulation_per_rank"])
    yield "slices", _slices(stage, numbers["rows_per_forward_per_rank"])
    yield "steps", f"{optim.steps} ({optim.warmup_steps} warm-up, {optim.warmup}; then {optim.schedule})"
    known = longest is not None
    yield "tokens (at most)", f"{rows * optim.steps * texts * longest:,}" if known else "set by encoder.max_tokens"


def _row(stage: Stage) -> tuple[str, int, int | None]:
    """What a row is, how many texts it has, and the longest of them in tokens (None before it is known)."""
    objective, data, longest = stage.objective, stage.data, stage.encoder.max_tokens
    match objective:
        case LanguageModelObjective():
            return "passages", 1, objective.max_tokens
        case RevelaObjective():
            return "passages", 1, objective.language_model.max_tokens
        case ContrastiveObjective():
            positives = f"at most {data.positives} positives" if data.positives > 1 else "1 positive"
            negatives = f"at most {data.negatives}" if data.negatives else "0"  # rows may have fewer
            texts = 1 + data.positives + data.negatives
            return f"queries with {positives} and {negatives} hard negatives each", texts, longest
        case ReContrieverObjective():
            return f"texts with 1 query and {objective.views} keys each", 1 + objective.views, longest


def _slices(stage: Stage, rows: int) -> str:
    """How `rows` rows of a forward run; slices of equal tokens can be counted only where the texts are known."""
    batch, sides = stage.batch, _sides(stage)
    if batch.forward_tokens is not None:
        return f"about {batch.forward_tokens:,} tokens each, texts sorted by length"
    if batch.forward_rows is None:
        return "none: all activations are kept"
    counts = ", ".join(f"{math.ceil(rows * texts / batch.forward_rows):,} of {side}" for side, texts in sides.items())
    return f"of at most {batch.forward_rows:,} texts; a forward has {counts}"


def _sides(stage: Stage) -> dict[str, int]:
    """What the objective slices, each by itself, and its texts per row."""
    objective, data = stage.objective, stage.data
    match objective:
        case LanguageModelObjective():
            return {"passages": 1}
        case RevelaObjective():
            return {"queries": 1, "passages": 1, "language model inputs": 1}
        case ContrastiveObjective():
            return {"queries": 1, "documents": data.positives + data.negatives}
        case ReContrieverObjective():
            return {"queries": 1, "keys": objective.views}


def render(rows: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> str:
    """Aligned lines of (name, value)."""
    return "\n".join(f"  {name:<30} {value}" for name, value in rows)
