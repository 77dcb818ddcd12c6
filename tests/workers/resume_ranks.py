"""Worker: steps after a checkpoint against the same steps without a stop, case by case. Request and answer are JSON."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import models_at, random_crops, random_pools, revela_stage, stage_of

from toolkit.checkpoint import states as checkpoint
from toolkit.checkpoint.shares import WEIGHT
from toolkit.checkpoint.states import RunState, load_newest, save_checkpoint
from toolkit.collectives import on_rank_zero, rank, world_size
from toolkit.ranks.last_words import end
from toolkit.ranks.process_group import start_distributed
from toolkit.recipe.stage import Stage
from toolkit.training.engine import build_engine, gather_trainable, train_step

CPU = torch.device("cpu")
SEED, SAVED, LAST, POOLS = 3, 2, 4, 4
Write = Callable[[str, torch.Tensor], None]


def forget_optimizer(write: Write) -> Write:
    """Adam's moments stay zero."""
    return lambda key, value: write(key, value) if key == WEIGHT else None


def forget_masters(write: Write) -> Write:
    """The fp32 weights of the optimizer are made from the rounded ones."""
    return lambda key, value: write(key, value.bfloat16().float() if key == WEIGHT else value)


def forget_extra(_: Any) -> None:
    """What the objective keeps besides its weights begins anew."""


WRITES: dict[str | None, Callable[[Write], Write]] = {
    "forget_optimizer": forget_optimizer,
    "forget_masters": forget_masters,
}


def take_steps(engine: Any, stage: Stage, first: int, last: int) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """Loss and gradient norm of each step, and the trainable weights after the last (on rank 0)."""
    values = []
    for step in range(first, last):
        if stage.objective.name == "revela":
            pools = random_pools(POOLS, stage.batch.pool, seed=step)
        else:
            pools = random_crops(POOLS, stage.batch.pool, 3, seed=step)
        own = pools[rank() * len(pools) // world_size() : (rank() + 1) * len(pools) // world_size()]
        got = train_step(engine, stage, own, step, SEED, 0.0, CPU)
        values.append([got["loss"], got["grad_norm"]])
    return values, gather_trainable(engine.module, stage.zero.stage)


def load(engine: Any, folder: Path, fresh: RunState, control: str | None) -> RunState:
    """load_newest, which forgets what the control says."""
    pieces, change = checkpoint.pieces, WRITES.get(control, lambda write: write)
    checkpoint.pieces = lambda engine: (piece._replace(write=change(piece.write)) for piece in pieces(engine))
    if control == "forget_extra":
        engine.module.load_extra_state = forget_extra
    try:
        return load_newest(engine, folder, fresh)
    finally:
        checkpoint.pieces = pieces


def run_case(case: dict[str, Any], folders: dict[str, str], checkpoints: Path, save: bool) -> dict[str, Any]:
    """What a run without a stop and a resumed one give, and how many weight arrays of them are not equal.

    Without `save` the checkpoint of an earlier launch is taken up, and there is no run without a stop.
    """
    changes = {"optim__lr": 1e-2, "optim__clip": 1.0, "optim__steps": LAST} | case["changes"]
    make = revela_stage if case["method"] == "revela" else lambda **more: stage_of(case["method"], **more)
    stage = make(**changes, batch__pools_per_step=POOLS)

    def build() -> Any:
        lm = Path(folders["llama_lm"]) if case["method"] == "revela" else None
        return build_engine(stage, SEED, CPU, models_at(Path(folders["llama"]), None, lm))

    answer: dict[str, Any] = {}
    first = 0 if case["control"] == "before any step" else SAVED  # as if all steps until then had been left out
    saved = RunState(SAVED, 0, 17, "stage", "data", ["tokenizer"], ["model"])
    weights_file = checkpoints / "weights.safetensors"
    if save:
        engine = build()
        _, at_save = take_steps(engine, stage, 0, first)
        checkpoints.mkdir(parents=True, exist_ok=True)
        save_checkpoint(engine, checkpoints, saved, keep=1)
        on_rank_zero(lambda: save_file(at_save, weights_file))
        answer["whole"], whole = take_steps(engine, stage, SAVED, LAST)
        engine.destroy()
        answer["moved"] = sum(not torch.equal(whole[name], at_save[name]) for name in whole)
    engine = build()
    found = load(engine, checkpoints, saved._replace(step=0, tokens=0), case["control"])
    loaded, written = gather_trainable(engine.module, stage.zero.stage), load_file(weights_file)
    answer["resumed"], again = take_steps(engine, stage, SAVED, LAST)
    answer |= {
        "state": found == saved,
        "optimizer": type(engine.optimizer).__name__,
        "arrays": len(written),
        "not_as_saved": sum(not torch.equal(loaded[name], written[name]) for name in loaded),
        "different": sum(not torch.equal(whole[name], again[name]) for name in whole) if save else None,
    }
    engine.destroy()
    return answer


def main() -> None:
    request = json.loads(Path(sys.argv[-2]).read_text())
    start_distributed()
    checkpoints = Path(request["checkpoints"])
    answer = {
        name: run_case(case, request["folders"], checkpoints / case["of"], request["save"])
        for name, case in request["cases"].items()
    }
    if rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
    end(0)
