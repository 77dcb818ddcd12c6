"""The DeepSpeed engine around an objective: build it, run one optimizer step, read whole weights out of it.

Called by the loop. Every function is collective: all ranks call it.
"""

import gc
import math
from collections import Counter
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import Tensor, nn

from toolkit.collectives import rank, world_size
from toolkit.data.tokens import Tokens, pad, pad_id, tokenize
from toolkit.determinism import seed_step
from toolkit.methods import method_of
from toolkit.methods.method import Models
from toolkit.methods.objective import Loss, Objective
from toolkit.models.contextual import ContextualEncoder
from toolkit.models.vocabulary import model_tokenizer
from toolkit.recipe.models import EncoderSettings
from toolkit.recipe.stage import Stage
from toolkit.training.deepspeed_config import ds_config
from toolkit.training.metrics import reduce_losses
from toolkit.training.numbers import check_gradients
from toolkit.training.schedule import learning_rate


def build_objective(stage: Stage[Any, Any], seed: int, device: torch.device, models: Models) -> Objective:
    """The objective of a stage with its models loaded, as its method builds it."""
    return method_of(stage.objective.name).build(stage, seed, device, models)


def build_engine(
    stage: Stage,
    seed: int,
    device: torch.device,
    models: Models,
    **changes: Any,
) -> Any:
    """The DeepSpeed engine around the stage's objective.

    Args:
        models: the stage's, on disk.
        changes: keys of `zero_optimization` to replace (tests make buckets small enough to matter).

    Raises:
        ValueError: if the models and the recipe do not fit, e.g. LoRA targets that match no module.
        RecipeError: for full fine-tuning of a multi-billion model in slices.
    """
    objective = build_objective(stage, seed, device, models)
    trainable = [p for p in objective.parameters() if p.requires_grad]
    check_gradients(stage, sum(p.numel() for p in trainable))
    config = ds_config(stage, world_size())
    config["zero_optimization"] |= changes
    config["optimizer"]["params"]["lr"] = 0.0  # DeepSpeed may step once to make its states; train_step sets the rate
    engine: Any
    engine, *_ = deepspeed.initialize(model=objective, model_parameters=trainable, config=config)  # pyright: ignore
    if stage.zero.stage == 0 and stage.precision == "bf16":
        engine.optimizer.optimizer.state.clear()  # that step counted: Adam's bias correction would be one late
    return engine


def train_step(
    engine: Any, stage: Stage, batches: list[Any], step: int, seed: int, waited: float, device: torch.device
) -> dict[str, float]:
    """One optimizer step over this rank's forwards; returns its scalars, equal on all ranks.

    A loss or gradient that is not finite on any rank changes no weight on any; "loss" or "grad_norm" tells.
    """
    seed_step(seed, step, rank())
    lr = learning_rate(stage.optim, step)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    losses, norm = [], None
    tokens: Counter[str] = Counter()
    beside: Counter[str] = Counter()
    for batch in batches:
        batch = to_device(batch, device)
        tokens.update(_num_tokens(batch))
        beside.update(engine.module.beside(batch))
        loss = engine(batch)
        engine.backward(loss.total * _one_or_nan(loss.total))
        losses.append(Loss(loss.total.detach(), loss.parts))
        del loss  # with its graph goes what the pool held
        if len(losses) == len(batches):
            norm = _plain_norm(engine, stage)
        if norm is None or norm.isfinite():
            engine.step()
        else:  # DeepSpeed's other optimizers leave such a step out themselves
            engine.zero_grad()
            engine.micro_steps += 1
    applied = engine.was_step_applied() and (norm is None or bool(norm.isfinite()))
    if not applied and stage.zero.stage in (1, 2) and stage.zero.offload_optimizer is not None:
        for group in engine.optimizer.averaged_gradients:  # which DeepSpeed leaves as they are, to be added to
            engine.optimizer.averaged_gradients[group] = None
    engine.module.after_step(applied)
    values = reduce_losses(losses, tokens, beside, waited, device)
    values["lr"] = lr
    values["grad_norm"] = float(engine.get_global_grad_norm() if norm is None else norm)
    if not applied and math.isfinite(values["grad_norm"]):
        raise RuntimeError(f"DeepSpeed left out step {step} with a finite gradient norm")
    return values


def _one_or_nan(loss: Tensor) -> Tensor:
    """What makes the gradient of a loss that is not finite so, too, and leaves any other as it is."""
    return 1 + (loss - loss).detach()


def _plain_norm(engine: Any, stage: Stage) -> Tensor | None:
    """Gradient norm before clipping at ZeRO stage 0 in fp32, where DeepSpeed does not report one."""
    if stage.zero.stage or stage.precision != "fp32":
        return None
    return torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch (nested NamedTuples of tensors and None) on a device."""
    if batch is None:
        return None
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return type(batch)(*(to_device(part, device) for part in batch))


def _num_tokens(batch: Any) -> dict[str, int]:
    """Real tokens of each side of a batch."""
    sides = dict(_sides(batch))
    counts = torch.stack([part.attention_mask.sum() for part in sides.values()]).tolist()  # one wait for the device
    return dict(zip(sides, counts, strict=True))


def _sides(batch: Any) -> Iterator[tuple[str, Tokens]]:
    for name, part in batch._asdict().items():
        if isinstance(part, Tokens):
            yield name, part
        elif isinstance(part, tuple):
            yield from _sides(part)


@torch.no_grad()
def live_vectors(
    objective: Objective, tokenizer: Any, settings: EncoderSettings, texts: list[str], device: torch.device
) -> tuple[dict[str, np.ndarray], list[str] | None]:
    """Vectors of a few texts from the model in training, as queries and as passages; called on all ranks (ZeRO-3).

    Those of a contextual encoder are without context, and as "query_in_context" and "passage_in_context" with the one
    of the documents that come back beside them: the texts over and over.
    """

    def tokens(tokenizer: Any, texts: list[str], prefix: str, longest: int) -> Tokens:
        rows = tokenize(tokenizer, texts, prefix, longest, settings.append_eos)
        return to_device(pad(rows, pad_id(tokenizer)), device)

    objective.eval()
    encoder, vectors, documents = objective.encoder, {}, None
    sides = (("query", settings.query_prefix), ("passage", settings.passage_prefix))
    for kind, prefix in sides:
        vectors[kind] = encoder(tokens(tokenizer, texts, prefix, settings.eval_max_tokens)).float().cpu().numpy()
    if isinstance(encoder, ContextualEncoder):
        count, folder = encoder.settings.size // encoder.settings.vectors_per_document, objective.exported().first_stage
        documents = list(islice(cycle(texts), count))
        of_first = tokenizer if folder is None else model_tokenizer(folder)
        context = encoder.first(tokens(of_first, documents, settings.passage_prefix, encoder.settings.max_tokens))
        for kind, prefix in sides:
            found = encoder(tokens(tokenizer, texts, prefix, settings.eval_max_tokens), context)
            vectors[f"{kind}_in_context"] = found.float().cpu().numpy()
    objective.train()
    return vectors, documents


def gather_trainable(module: nn.Module, zero_stage: int) -> dict[str, Tensor]:
    """Whole trainable weights on the CPU of rank 0 (elsewhere empty); called on all ranks."""
    weights = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=zero_stage == 3):
                if rank() == 0:
                    weights[name] = parameter.detach().cpu().clone()
    return weights


def release(engine: Any) -> Objective:
    """Give back the memory of an engine; its objective is left without weights, on the meta device."""
    objective = engine.module
    engine.destroy()
    objective.zero_grad(set_to_none=True)
    objective.to("meta")
    gc.collect()
    torch.cuda.empty_cache()
    return objective
