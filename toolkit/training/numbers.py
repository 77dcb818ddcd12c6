"""Derived numbers of a stage, and the checks that need parameter counts. Called by --dry-run and by the loop."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PretrainedConfig

from toolkit.models.backbone import add_lora, on_meta
from toolkit.recipe import Lora, RecipeError, RevelaObjective, Stage, batch_numbers

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
    models = {"retriever": (encoder, stage.lora, False)}
    if isinstance(stage.objective, RevelaObjective) and language_model is not None:
        models["language_model"] = (language_model, stage.objective.language_model.lora, True)
    elif not isinstance(stage.objective, RevelaObjective):
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
    if stage.batch.forward_rows is not None and trainable >= MAX_UNSHARDED_PARAMETERS:
        gigabytes = trainable * BYTES[stage.precision] / 1e9
        raise RecipeError(
            f"stage {stage.name}: gradients of {trainable / 1e9:.1f} billion trainable parameters stay unsharded "
            f"({gigabytes:.0f} GB a GPU) while slices are recomputed; use lora, or set batch.forward_rows to null"
        )


def derived(stage: Stage, world_size: int) -> Iterator[tuple[str, str]]:
    """(name, value) of everything that follows from the recipe's batch and optimizer keys on `world_size` ranks."""
    numbers = batch_numbers(stage, world_size)
    batch, optim = stage.batch, stage.optim
    rows = numbers["rows_per_step_global"]
    objective = stage.objective
    longest = objective.language_model.max_tokens if isinstance(objective, RevelaObjective) else objective.max_tokens
    spread = batch.pool if batch.span == "world" else batch.pools_per_step
    yield "pool", f"{batch.pool} passages, span {batch.span}"
    yield "rows per step (global)", f"{batch.pool} x {batch.pools_per_step} pools = {rows}"
    yield "ranks", f"{world_size} (fit: {', '.join(str(n) for n in range(1, spread + 1) if spread % n == 0)})"
    yield "rows per forward (per rank)", str(numbers["rows_per_forward_per_rank"])
    yield "forwards per step (per rank)", str(numbers["accumulation_per_rank"])
    yield "slices per forward", str(numbers["slices_per_forward"])
    yield "steps", f"{optim.steps} ({optim.warmup_steps} warm-up, {optim.warmup}; then {optim.schedule})"
    yield "tokens (at most)", f"{rows * optim.steps * longest:,} read by the language model"


def render(rows: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> str:
    """Aligned lines of (name, value)."""
    return "\n".join(f"  {name:<30} {value}" for name, value in rows)
