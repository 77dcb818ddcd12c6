"""Derived numbers of a stage, and the checks that need parameter counts. Called by --dry-run and by the loop."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PretrainedConfig

from toolkit.models.backbone import add_lora, check_length, on_meta
from toolkit.recipe import (
    Batch,
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
        RecipeError: if the recipe's LoRA targets match no module, or the stage is full fine-tuning of a multi-billion
            model under gradient caching.
    """
    check_length(encoder, max(stage.encoder.max_tokens, stage.encoder.eval_max_tokens))
    if (
        isinstance(stage.objective, ContrastiveObjective)
        and max(stage.objective.matryoshka or [0]) > encoder.hidden_size
    ):
        raise RecipeError(
            f"stage {stage.name}: objective.matryoshka: {max(stage.objective.matryoshka or [0])} is more than the "
            f"model's {encoder.hidden_size} dimensions; remove it"
        )
    models = {"retriever": (encoder, stage.lora, False)}
    if isinstance(stage.objective, RevelaObjective) and language_model is not None:
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
    yield "slices", _slices(batch, numbers["rows_per_forward_per_rank"])
    yield "steps", f"{optim.steps} ({optim.warmup_steps} warm-up, {optim.warmup}; then {optim.schedule})"
    yield "tokens (at most)", f"{rows * optim.steps * texts * longest:,}"


def _row(stage: Stage) -> tuple[str, int, int]:
    """What a row is, how many texts it has, and the longest of them in tokens."""
    objective, data, longest = stage.objective, stage.data, stage.encoder.max_tokens
    match objective:
        case LanguageModelObjective():
            return "passages", 1, objective.max_tokens
        case RevelaObjective():
            return "passages", 1, objective.language_model.max_tokens
        case ContrastiveObjective():
            slots = f"{data.positives} positive{'s' * (data.positives > 1)} and {data.negatives} hard negatives"
            return f"queries with {slots} each", 1 + data.positives + data.negatives, longest
        case ReContrieverObjective():
            return f"texts with 1 query and {objective.views} keys each", 1 + objective.views, longest


def _slices(batch: Batch, rows: int) -> str:
    if batch.forward_tokens is not None:
        return f"about {batch.forward_tokens:,} tokens each, texts sorted by length"
    if batch.forward_rows is not None:
        return f"{min(batch.forward_rows, rows):,} texts each"
    return "none: all activations are kept"


def render(rows: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> str:
    """Aligned lines of (name, value)."""
    return "\n".join(f"  {name:<30} {value}" for name, value in rows)
