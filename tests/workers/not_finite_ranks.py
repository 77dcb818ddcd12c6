"""Worker: a step of which one rank's loss or gradient is not finite, between two others; JSON to JSON."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import models_at, random_crops, random_pools, revela_stage, stage_of

from toolkit.collectives import rank, world_size
from toolkit.methods.objective import Loss
from toolkit.ranks.last_words import end
from toolkit.ranks.process_group import start_distributed
from toolkit.recipe.stage import Stage
from toolkit.training.engine import build_engine, gather_trainable, train_step

CPU = torch.device("cpu")
SEED = 3


def step(engine: Any, stage: Stage, number: int) -> dict[str, float]:
    if stage.objective.name == "revela":
        pools = random_pools(2 * world_size(), stage.batch.pool, seed=number)
    else:
        pools = random_crops(2 * world_size(), stage.batch.pool, 3, seed=number)
    return train_step(engine, stage, pools[rank() :: world_size()], number, SEED, 0.0, CPU)


def poison(engine: Any, what: str) -> None:
    """Rank 1's loss becomes infinite, or its gradient under a loss that stays as it is; once."""
    forward = engine.module.forward

    def poisoned(batch: Any) -> Loss:
        loss = forward(batch)
        engine.module.forward = forward
        if rank() != 1 or what == "nothing":
            return loss
        zero = loss.total - loss.total.detach()
        return Loss(loss.total * math.inf if what == "loss" else loss.total + zero.abs().sqrt(), loss.parts)

    engine.module.forward = poisoned


def all_state(engine: Any, stage: Stage) -> dict[str, torch.Tensor]:
    """Trainable weights, and what the objective keeps besides."""
    kept = {name: tensor.clone() for name, tensor in engine.module.extra_state().items()}
    return gather_trainable(engine.module, stage.zero.stage) | kept


def run_case(
    case: dict[str, Any], folders: dict[str, str], clean: dict[str, dict[str, torch.Tensor]]
) -> dict[str, Any]:
    """Steps with a poisoned one between them, and the same without; what differs after them.

    Args:
        clean: the weights of the steps without, of the cases before; cases that differ in the poison share them.
    """
    changes = {"optim__lr": 1e-2, "optim__clip": 1.0, "optim__steps": 4} | case["changes"]
    stage = revela_stage(**changes) if case["method"] == "revela" else stage_of(case["method"], **changes)
    lm = Path(folders["llama_lm"]) if case["method"] == "revela" else None
    stage = stage.model_copy(update={"batch": stage.batch.model_copy(update={"pools_per_step": 2 * world_size()})})

    def build() -> Any:
        return build_engine(stage, SEED, CPU, models_at(Path(folders["llama"]), None, lm))

    same = json.dumps([case["method"], case["changes"]])
    if same not in clean:
        engine = build()
        step(engine, stage, 0)
        step(engine, stage, 2)
        clean[same] = all_state(engine, stage)
        engine.destroy()
    engine = build()
    step(engine, stage, 0)
    poison(engine, case["what"])
    before = all_state(engine, stage)
    values = step(engine, stage, 1)
    after = all_state(engine, stage)
    step(engine, stage, 2)
    weights = all_state(engine, stage)
    engine.destroy()
    return {
        "changed": sum(not torch.equal(before[name], after[name]) for name in before),
        "different": sum(not torch.equal(clean[same][name], weights[name]) for name in weights),
        "moved": sum(not torch.equal(weights[name], before[name]) for name in before),
        "arrays": len(before),
        "loss": str(values["loss"]),
        "grad_norm": str(values["grad_norm"]),
    }


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[-2]).read_text())
    start_distributed()
    clean: dict[str, dict[str, torch.Tensor]] = {}
    answer = {name: run_case(case, request["folders"], clean) for name, case in request["cases"].items()}
    if rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(answer))
    end(0)
