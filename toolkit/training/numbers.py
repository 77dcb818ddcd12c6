"""Derived numbers of a stage, and the checks that need parameter counts. Called by --dry-run and by the loop."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from toolkit.methods import keys_of, method_of
from toolkit.models.backbone import add_lora, on_meta
from toolkit.models.lengths import check_length
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.models import Lora
from toolkit.recipe.stage import Stage, batch_numbers

# Full fine-tuning under gradient caching keeps unsharded gradients of all trainable parameters until the backward ends.
MAX_UNSHARDED_PARAMETERS = 2_000_000_000
BYTES = {"bf16": 2, "fp32": 4}


def parameter_counts(stage: Stage[Any, Any], configs: dict[str, PretrainedConfig]) -> dict[str, int]:
    """Trainable and total parameters of each model of a stage, from configs alone (nothing is allocated).

    Args:
        configs: name in MethodKeys.models -> config.

    Raises:
        RecipeError: if the recipe's LoRA targets match no module, a model does not fit the method's keys, or the stage
            is full fine-tuning of a multi-billion model under gradient caching.
        ValueError: if inputs are longer than the retriever reads, or a model's type is not supported.
    """
    models = keys_of(stage.objective.name).models(stage)
    lengths = (stage.encoder.max_tokens, stage.encoder.eval_max_tokens)
    check_length(configs[models[0].name], max((length for length in lengths if length is not None), default=0))
    fit = method_of(stage.objective.name).fit
    try:
        if fit is not None:
            fit(stage, configs)
    except RecipeError as error:
        raise RecipeError(f"stage {stage.name}: {error}") from None
    counts: dict[str, int] = {}
    for each in models:
        model = on_meta(configs[each.name], each.causal)
        if each.lora is not None:
            model = _with_lora(model, each.lora, each.causal, f"stage {stage.name}: {each.name}")
        counts[f"{each.name}_parameters"] = sum(p.numel() for p in model.parameters())
        counts[f"{each.name}_trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
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
    if stage.in_slices and trainable >= MAX_UNSHARDED_PARAMETERS:
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
    row = method_of(stage.objective.name).row(stage)
    spread = batch.pool if batch.span == "world" else batch.pools_per_step
    yield "pool", f"{batch.pool} {row.what}, span {batch.span}"
    yield "rows per step (global)", f"{batch.pool} x {batch.pools_per_step} pools = {rows}"
    yield "ranks", f"{world_size} (fit: {', '.join(str(n) for n in range(1, spread + 1) if spread % n == 0)})"
    yield "rows per forward (per rank)", str(numbers["rows_per_forward_per_rank"])
    yield "forwards per step (per rank)", str(numbers["accumulation_per_rank"])
    yield "slices", _slices(stage, row.sides, numbers["rows_per_forward_per_rank"])
    yield "steps", f"{optim.steps} ({optim.warmup_steps} warm-up, {optim.warmup}; then {optim.schedule})"
    most = "set by encoder.max_tokens" if row.longest is None else f"{rows * optim.steps * row.texts * row.longest:,}"
    yield "tokens (at most)", most


def _slices(stage: Stage, sides: dict[str, int], rows: int) -> str:
    """How `rows` rows of a forward run; slices of equal tokens can be counted only where the texts are known."""
    batch = stage.batch
    if batch.forward_tokens is not None:
        return f"about {batch.forward_tokens:,} tokens each, texts sorted by length"
    if batch.forward_rows is None:
        return "none: all activations are kept"
    counts = ", ".join(f"{math.ceil(rows * texts / batch.forward_rows):,} of {side}" for side, texts in sides.items())
    return f"of at most {batch.forward_rows:,} texts; a forward has {counts}"


def render(rows: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> str:
    """Aligned lines of (name, value)."""
    return "\n".join(f"  {name:<30} {value}" for name, value in rows)
