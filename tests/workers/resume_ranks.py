"""Worker: steps after a checkpoint against the same steps without a stop, case by case. Request and answer are JSON."""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import random_pools, revela_stage

from toolkit.collectives import rank, world_size
from toolkit.last_words import end
from toolkit.recipe import Stage
from toolkit.training.checkpoint import RunState, load_newest, save_checkpoint
from toolkit.training.engine import build_engine, gather_trainable, train_step
from toolkit.training.process_group import start_distributed

CPU = torch.device("cpu")
SEED, SAVED, LAST, FORWARDS = 3, 2, 4, 2


def forget_optimizer(engine: Any) -> None:
    """Weights alone are loaded: Adam begins anew."""
    engine.load_checkpoint = functools.partial(engine.load_checkpoint, load_optimizer_states=False)


def forget_masters(engine: Any) -> None:
    """The fp32 weights of the optimizer are made from the rounded ones."""
    engine.zero_load_from_fp32_weights = lambda: False


def forget_step(engine: Any) -> None:
    """A decaying temperature begins anew."""
    engine.module.load_extra_state = lambda state: None


CONTROLS = {"forget_optimizer": forget_optimizer, "forget_masters": forget_masters, "forget_step": forget_step}


def take_steps(engine: Any, stage: Stage, first: int, last: int) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """Loss and gradient norm of each step, and the trainable weights after the last (on rank 0)."""
    values = []
    for step in range(first, last):
        pools = random_pools(FORWARDS * world_size(), stage.batch.pool, seed=step)
        got = train_step(engine, stage, pools[rank() :: world_size()], step, SEED, 0.0, CPU)
        values.append([got["loss"], got["grad_norm"]])
    return values, gather_trainable(engine.module, stage.zero.stage)


def run_case(case: dict[str, Any], folders: dict[str, str], checkpoints: Path) -> dict[str, Any]:
    """What a run without a stop and a resumed one give, and how many weight arrays of them are not equal."""
    changes = {"optim__lr": 1e-2, "optim__clip": 1.0, "optim__steps": LAST} | case["changes"]
    stage = revela_stage(**changes, batch__pools_per_step=FORWARDS * world_size())

    def build() -> Any:
        return build_engine(stage, SEED, CPU, Path(folders["llama"]), None, Path(folders["llama_lm"]))

    engine = build()
    _, at_save = take_steps(engine, stage, 0, SAVED)
    checkpoints.mkdir(parents=True, exist_ok=True)
    saved = RunState(SAVED, 17, "stage", "data", ["tokenizer"], world_size())
    save_checkpoint(engine, checkpoints, saved, keep=1)
    whole, weights = take_steps(engine, stage, SAVED, LAST)
    engine.destroy()
    engine = build()
    CONTROLS.get(case["control"], lambda _: None)(engine)
    found = load_newest(engine, checkpoints, saved._replace(step=0, tokens=0))
    resumed, again = take_steps(engine, stage, SAVED, LAST)
    optimizer = type(engine.optimizer).__name__
    engine.destroy()
    return {
        "whole": whole,
        "resumed": resumed,
        "state": found == saved,
        "optimizer": optimizer,
        "arrays": len(weights),
        "moved": sum(not torch.equal(weights[name], at_save[name]) for name in weights),
        "different": sum(not torch.equal(weights[name], again[name]) for name in weights),
    }


def main() -> None:
    request = json.loads(Path(sys.argv[-2]).read_text())
    start_distributed()
    checkpoints = Path(request["checkpoints"])
    answer = {name: run_case(case, request["folders"], checkpoints / name) for name, case in request["cases"].items()}
    if rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
    end(0)
