"""One stage of a recipe: build, resume, step, log, save, export. Knows no method: the engine's module is the loss.

Called by the launcher on every rank.
"""

import json
import math
import os
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from toolkit.checkpoint.model_digests import model_digests, tokenizer_digests
from toolkit.checkpoint.states import RunState, load_newest, save_checkpoint
from toolkit.collectives import on_rank_zero, rank, world_size
from toolkit.data.stream import StepData, Stream
from toolkit.export.check import check_export
from toolkit.export.write import ContextualParts, write_export
from toolkit.files import sync
from toolkit.methods import method_of
from toolkit.methods.costs import Costs
from toolkit.methods.method import Feed, Models, StageRun
from toolkit.methods.objective import Objective
from toolkit.models.backbone import DTYPES
from toolkit.models.contextual import ContextualEncoder
from toolkit.models.vocabulary import model_tokenizer
from toolkit.ranks.fingerprint import Fingerprints
from toolkit.ranks.last_words import Interrupted, steps
from toolkit.ranks.watch import COMPARING, COMPUTING, LOGGING, WAITING, Watch
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.schema import Recipe
from toolkit.recipe.sources import source_name
from toolkit.recipe.stage import Stage
from toolkit.training.engine import build_engine, gather_trainable, live_vectors, release, train_step
from toolkit.training.feed import find_models, open_feed, stage_run
from toolkit.training.metrics import Log, cut_after, peak_memory_gib
from toolkit.training.numbers import derived, render

NOT_FINITE = "not_finite.jsonl"  # the rows of steps that changed nothing


class StageResult(NamedTuple):
    """What a finished stage leaves: its export, how far it got, on what, and the figures of the reload check."""

    export: Path
    steps: int
    tokens: int
    rows: int  # of the data
    ranks: int
    device: str
    flops_rule: str
    check: dict[str, float]


class Training(NamedTuple):
    """A stage under way: what it is, what it reads, and what it computes with."""

    run: StageRun
    models: Models
    tokenizer: Any  # the retriever's
    feed: Feed
    engine: Any
    costs: Costs


def train_stage(recipe: Recipe, index: int, run: Path, device: torch.device, watch: Watch) -> StageResult:
    """Train a stage to its last step and export it, going on from its newest checkpoint.

    Raises, on all ranks:
        RecipeError: for anything the user can mend.
        Interrupted: after SIGTERM or SIGUSR1 to any rank, once the step is saved.
        Diverged: if the ranks no longer do the same.
    """
    stage = recipe.stages[index]
    here = stage_run(recipe, index, run, device)
    models = find_models(here)
    tokenizer = model_tokenizer(models.retriever.folder)
    feed = open_feed(here, models, tokenizer)
    engine = build_engine(stage, recipe.seed, device, models)
    costs = method_of(stage.objective.name).costs(stage, engine.module)
    training = Training(here, models, tokenizer, feed, engine, costs)
    state = _resume(training, recipe.digest(index))
    _announce(training, state)
    first_step = sum(earlier.optim.steps for earlier in recipe.stages[:index])
    with _stream(training, state) as stream:
        state = _run_steps(training, stream, state, first_step, watch)
    watch.leave_steps()
    check = _export(training, _facts(recipe, training, state))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU process"
    return StageResult(
        here.folder / "export", state.step, state.tokens, feed.size, world_size(), name, costs.rule, check
    )


def _resume(training: Training, recipe_digest: str) -> RunState:
    """The state of the newest checkpoint, which the engine takes up; else that of a beginning."""
    models = [training.models.retriever, *training.models.others.values()]
    digests = tokenizer_digests(models), model_digests(models)
    fresh = RunState(0, 0, 0, recipe_digest, training.feed.digest, *digests)
    checkpoints, stage = training.run.folder / "checkpoints", training.run.stage
    on_rank_zero(lambda: checkpoints.mkdir(parents=True, exist_ok=True))
    state = load_newest(training.engine, checkpoints, fresh)
    on_rank_zero(lambda: cut_after(training.run.folder / NOT_FINITE, stage.name, state.step))
    return state


def _stream(training: Training, state: RunState) -> Stream:
    """The batches of this rank from the step after `state` on."""
    stage = training.run.stage
    return Stream(
        training.feed.plan,
        training.feed.collate,
        pools_per_step=stage.batch.pools_per_step,
        start_step=state.step,
        num_steps=stage.optim.steps,
        span=stage.batch.span,
        rank=rank(),
        world_size=world_size(),
    )


def _run_steps(training: Training, stream: Stream, state: RunState, first_step: int, watch: Watch) -> RunState:
    """All optimizer steps after `state`; `first_step`: steps of the stages before, where this one's curves begin."""
    stage, folder, device = training.run.stage, training.run.folder, torch.device(training.run.device)
    engine = training.engine
    watch.at(state.step, COMPARING, stage.guard.stall_minutes)
    fingerprints = Fingerprints(watch.hosts, stage.guard.compare_weights_every, stage.zero.stage)
    saved, minutes = state.step, 0.0  # the first step may compile
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    engine.train()
    began = time.perf_counter()
    with (
        steps() as asked_to_stop,
        Log(training.run.run, stage.name, first_step, state.step) if rank() == 0 else nullcontext() as log,
        tqdm(
            total=stage.optim.steps,
            initial=state.step,
            desc=stage.name,
            unit="step",
            disable=rank() != 0,
            mininterval=2,
        ) as bar,
    ):

        def save(state: RunState) -> None:
            watch.at(state.step, "saving", 0)
            if log is not None:
                log.sync()
            save_checkpoint(engine, folder / "checkpoints", state, stage.save.keep)

        watch.at(state.step + 1, WAITING, minutes)
        for data in stream:
            waited = time.perf_counter() - began
            watch.at(data.step + 1, COMPARING, minutes)
            if fingerprints.compare(data.step + 1, data.digest, data.batches, engine.module, asked_to_stop()):
                if saved < state.step:
                    save(state)
                raise Interrupted(
                    f"stage {stage.name}: asked to stop ({signal.SIGTERM.name} or {signal.SIGUSR1.name}), saved at "
                    f"step {state.step}; the same command goes on from there"
                )
            watch.at(data.step + 1, COMPUTING, minutes)
            values = train_step(engine, stage, data.batches, data.step, training.run.seed, waited, device)
            watch.at(data.step + 1, LOGGING, minutes)
            spent = time.perf_counter() - began
            finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
            if not finite:
                _not_finite(stage, folder, data, values)
            state = state._replace(
                step=data.step + 1, skipped=state.skipped + (not finite), tokens=state.tokens + int(values["tokens"])
            )
            if log is not None:
                values |= {
                    "tokens_per_s": values["tokens"] / spent,
                    "rows_per_s": stage.batch.pool * stage.batch.pools_per_step / spent,
                    "data_wait": values["data_wait"] / spent,
                    "peak_memory_gib": peak_memory_gib(device),
                    "device_s": spent * world_size(),
                    "flops": sum(values[f"tokens_{side}"] * rate for side, rate in training.costs.per_token.items()),
                    "skipped_steps": state.skipped,
                }
                log.write(state.step, values | {"rows": data.digest})
                bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
                bar.update()
            if state.step % stage.save.every == 0 or state.step == stage.optim.steps:
                save(state)
                saved = state.step
            began, minutes = time.perf_counter(), stage.guard.stall_minutes
            watch.at(state.step + 1, WAITING, minutes)
    return state


def _not_finite(stage: Stage, folder: Path, data: StepData, values: dict[str, float]) -> None:
    """Write down the rows of a step that changed nothing; RecipeError where the recipe says to stop there."""
    path = folder / NOT_FINITE
    found = {
        "stage": stage.name,
        "step": data.step + 1,
        "loss": str(values["loss"]),
        "grad_norm": str(values["grad_norm"]),
    }

    def write() -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found | {"pools": data.rows.tolist()}) + "\n")
        sync(path)

    on_rank_zero(write)
    if stage.guard.non_finite == "stop":
        rows = ", ".join(str(row) for row in data.rows.ravel()[:8].tolist())
        raise RecipeError(
            f"step {data.step + 1}: loss {values['loss']:g}, gradient norm {values['grad_norm']:g}: no weight was "
            f"changed; its rows are {rows} ... (all in {path}); lower optim.lr or mend these rows, or go on without "
            'such steps by guard.non_finite = "skip"'
        )


def _export(training: Training, facts: dict[str, Any]) -> dict[str, float]:
    """Write export/ on rank 0, after which the engine is gone, and check that a fresh process gets the live vectors.

    Args:
        facts: of the training, for the model card.
    """
    stage, examples = training.run.stage, training.feed.examples
    device = torch.device(training.run.device)
    live, context = live_vectors(training.engine.module, training.tokenizer, stage.encoder_settings, examples, device)
    weights = gather_trainable(training.engine.module, stage.zero.stage)
    objective = release(training.engine)  # what is left gives the export its structure; the reloaded model needs memory
    return on_rank_zero(lambda: _write(training, objective, weights, live, context, facts))


def _write(
    training: Training,
    objective: Objective,
    weights: dict[str, Tensor],
    live: dict[str, np.ndarray],
    context: list[str] | None,
    facts: dict[str, Any],
) -> dict[str, float]:
    stage, folder, exported = training.run.stage, training.run.folder / "export", objective.exported()
    encoder, contextual = objective.encoder, None
    if isinstance(encoder, ContextualEncoder):
        contextual = ContextualParts(encoder, _below(weights, "encoder."), exported.first_stage)
    of_lm = exported.causal_lm and (exported.causal_lm[1], _below(weights, exported.causal_lm[0]))
    write_export(
        folder,
        backbone=encoder.backbone,
        state=_below(weights, exported.retriever),
        causal_lm=of_lm,
        settings=stage.encoder_settings,
        tokenizer=training.tokenizer,
        base=training.models.retriever,
        dtype=DTYPES[stage.precision],
        merged=stage.export.merged,
        card=facts,
        contextual=contextual,
    )
    try:
        return check_export(folder, training.feed.examples, live, torch.device(training.run.device).type, context)
    except ValueError as error:
        raise RecipeError(f"stage {stage.name}: {error}") from None


def _facts(recipe: Recipe, training: Training, state: RunState) -> dict[str, Any]:
    """What the model card says of the training."""
    stage = training.run.stage
    return {
        "recipe": recipe.name,
        "recipe_digest": recipe.digest(),
        "stage": stage.name,
        "method": stage.objective.name,
        "method_card": method_of(stage.objective.name).card,
        "data": ", ".join(source_name(source) for source in stage.data.sources),
        "data_digest": training.feed.digest,
        "steps": state.step,
        "rows_seen": state.step * stage.batch.pool * stage.batch.pools_per_step,
        "tokens_seen": state.tokens,
        "seed": recipe.seed,
        "command": command(),
    }


def command() -> str:
    """What the user typed, without what the launcher added, but for the processes of a node, or a hostfile."""
    typed = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    here, all_nodes = os.environ.get("LOCAL_SIZE"), os.environ.get("WORLD_SIZE")
    ranks = [] if here is None else ["--num_gpus", here] if here == all_nodes else ["--hostfile", "hosts"]
    return shlex.join(["deepspeed", *ranks, "launcher/run.py", *typed])


def _below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _announce(training: Training, state: RunState) -> None:
    if rank() != 0:
        return
    stage, feed = training.run.stage, training.feed
    parameters = list(training.engine.module.parameters())
    sizes = [p.ds_numel if stage.zero.stage == 3 else p.numel() for p in parameters]
    trainable = sum(size for p, size in zip(parameters, sizes, strict=True) if p.requires_grad)
    pools = stage.optim.steps * stage.batch.pools_per_step
    rows = [
        *derived(stage, world_size()),
        ("parameters", f"{trainable:,} trainable of {sum(sizes):,}"),
        (feed.unit, f"{feed.size:,} (digest {feed.digest})"),
        ("epochs", f"{pools / feed.plan.pools_per_epoch:.2f} of {feed.plan.pools_per_epoch:,.10g} pools"),
        ("from the last checkpoint" if state.step else "from the beginning", f"starts at step {state.step}"),
    ]
    print(f"stage {stage.name}\n{render(rows)}", flush=True)
