"""Worker: what the collectives and the engine do on several ranks. Request: model folders; answer: figures by name."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from tiny import models_at, random_pools, revela_stage

from toolkit.collectives import (
    RankZeroFailed,
    first_of_any_rank,
    gather_with_grad,
    on_rank_zero,
    pool_mean,
    rank,
    sum_over_ranks,
    world_size,
)
from toolkit.methods.pair_loss import Scale
from toolkit.ranks.last_words import end
from toolkit.ranks.process_group import start_distributed
from toolkit.ranks.together import on_every_rank
from toolkit.recipe.errors import RecipeError
from toolkit.retrieval import embed
from toolkit.training.engine import build_engine, gather_trainable, train_step

CPU = torch.device("cpu")
ZERO: dict[str, dict[str, Any]] = {
    **{str(stage): {"stage": stage} for stage in range(4)},
    "2 offloaded": {"stage": 2, "offload_optimizer": "cpu"},
    "3 offloaded": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
}


def gradient_of_two_gathers() -> list[float]:
    """Two gathers share one incoming gradient; the backward of the first must leave it as it is."""
    x, y = (torch.tensor([float(rank() + 1)], requires_grad=True) for _ in range(2))
    weights = torch.tensor([1.0, 2.0]) * (rank() + 1)
    ((gather_with_grad(x) + gather_with_grad(y)) * weights).sum().backward()
    assert x.grad is not None and y.grad is not None
    return [float(x.grad), float(y.grad)]


def errors() -> dict[str, Any]:
    def fail_on(where: int) -> str:
        if rank() == where:
            raise RecipeError(f"rank {where} has no disk")
        return "fine"

    said: dict[str, Any] = {}
    try:
        said["of_last"] = on_every_rank(lambda: fail_on(world_size() - 1))
    except RecipeError as error:
        said["of_last"] = str(error)
    said["of_none"] = on_every_rank(lambda: fail_on(-1))
    try:
        on_rank_zero(lambda: fail_on(0))
        said["of_zero"] = "nothing"
    except (RecipeError, RankZeroFailed) as error:
        said["of_zero"] = type(error).__name__
    said["first"] = first_of_any_rank("" if rank() == 0 else f"from {rank()}, with ümlaut")
    said["result"] = on_rank_zero(lambda: {"rank": rank()})
    return said


def rows_in_blocks() -> list[float]:
    embed.ROWS_PER_GATHER = 2
    own = torch.arange(3 * rank() + 1).float().numpy()[:, None] + 10 * rank()
    return embed.gather_rows(own)[:, 0].tolist()


def uneven_mean() -> list[float]:
    """Mean over ranks of what pool_mean returns, for own sums and counts that differ."""
    own_sum, own_count = torch.tensor(5.0 * (rank() + 1)), torch.tensor(4.0 ** rank())
    return [float(sum_over_ranks(pool_mean(own_sum, own_count, span)) / world_size()) for span in ("world", "rank")]


def shared_memory() -> list[str]:
    """What the ranks of this group hold in /dev/shm by name; DeepSpeed's collectives use it here."""
    assert deepspeed.comm.comm.cdb.shm_comm_op is not None
    dist.barrier()
    return [path.name for path in Path("/dev/shm").glob(f"*_{os.environ['MASTER_PORT']}_*")]


def at_the_floor(span: str) -> list[float]:
    """Gradient of a learned temperature at its floor (log factor 7), where the ranks ask for the opposite.

    Of the scale they ask +0.5 and -0.7, then +0.7 and -0.5.
    """
    found = []
    for asked in ((0.5, -0.7), (0.7, -0.5)):
        log_factor = torch.tensor(7.0, requires_grad=True)
        scale: Any = Scale.apply(log_factor, 0.05, span)
        scale.backward(torch.tensor(asked[rank()]))
        assert log_factor.grad is not None
        found.append(float(log_factor.grad))
    return found


def first_update(folders: dict[str, str], zero: dict[str, Any], precision: str) -> float:
    """Mean size of the adapters' B after one AdamW step from zero: Adam's first step is lr for every weight."""
    stage = revela_stage(zero=zero, precision=precision, optim__lr=1e-3, batch__pools_per_step=world_size())
    engine = build_engine(stage, 3, CPU, models_at(Path(folders["llama"]), None, Path(folders["llama_lm"])))
    train_step(engine, stage, [random_pools(world_size(), 8)[rank()]], 0, 3, 0.0, CPU)
    weights = gather_trainable(engine.module, stage.zero.stage)
    engine.destroy()
    found = [weight.float().abs().mean() for name, weight in weights.items() if "lora_B" in name]
    return float(torch.stack(found).mean()) if found else 0.0


def main() -> None:
    folders = json.loads(Path(sys.argv[-2]).read_text())
    start_distributed()
    answer = {
        "two_gathers": gradient_of_two_gathers(),
        "errors": errors(),
        "blocks": rows_in_blocks(),
        "uneven_mean": uneven_mean(),
        "shared_memory": shared_memory(),
        "floor": {span: at_the_floor(span) for span in ("world", "rank")},
        "updates": {f"{p} {z}": first_update(folders, ZERO[z], p) for p in ("fp32", "bf16") for z in ZERO},
    }
    everyone = first_of_any_rank("" if rank() != world_size() - 1 else json.dumps(answer))
    if rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps({"first": answer, "last": json.loads(everyone)}))


if __name__ == "__main__":
    main()
    end(0)
