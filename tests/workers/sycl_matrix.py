"""Worker: the SyCL engine on several ranks against the dense form on one, case by case.

Request: {"folders", "cases"}; answer: per case the errors of the loss, of the whole gradient and of the worst array.
"""

import json
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from reference_listwise import sycl_loss
from revela_matrix import Outcome, OwnSlice, compared, number_of_pools, perturb, precision, two_steps, worst_of_ranks
from tiny import models_at, random_graded, rows_of_graded, stage_of

import toolkit.methods.sycl.objective as objectives
import toolkit.training.engine as engines
from toolkit.collectives import rank, sum_over_ranks, world_size
from toolkit.losses.listwise import wasserstein
from toolkit.methods import method_of
from toolkit.methods.method import Models
from toolkit.ranks.last_words import end
from toolkit.ranks.process_group import start_distributed

POOL, SEED = 8, 3
CPU = torch.device("cpu")
# Mistakes that must be seen: name -> (function of the objective's module, what stands in for it)
CONTROLS: dict[str, tuple[str, Any]] = {
    "own_slice_backward": ("gather_with_grad", OwnSlice.apply),
    "no_world_size": ("pool_mean", lambda own, count, span: own / sum_over_ranks(count)),
    "mean_of_own_rows": ("pool_mean", lambda own, count, span: own / count),
    "times_world_size": ("wasserstein", lambda *given, **how: world_size() * wasserstein(*given, **how)),
    "first_row_is_own": ("rank", lambda: 0),
}


def build_perturbed(stage: Any, seed: int, device: Any, models: Models, fp64: bool) -> Any:
    objective = method_of(stage.objective.name).build(stage, seed, device, models)
    perturb(objective, size=0.1)
    return objective.double() if fp64 else objective


def run_case(case: dict[str, Any], folders: dict[str, str]) -> dict[str, float]:
    """Errors of one case, as `compared` gives them; a mistake is the engine's, not the dense form's."""
    stage = stage_of("sycl", **case["changes"], batch__pool=POOL, batch__pools_per_step=number_of_pools(case))
    folder, fp64 = Path(folders[case["arch"]]), case["fp64"]
    pools = random_graded(stage.batch.pools_per_step, POOL, stage.data.group.size, case["seed"])
    engines.build_objective = partial(build_perturbed, fp64=fp64)
    threshold = {"stage3_param_persistence_threshold": 0} if stage.zero.stage == 3 else {}
    with precision(fp64), ExitStack() as patches:
        if "control" in case:
            patches.enter_context(mock.patch.object(objectives, *CONTROLS[case["control"]]))
        engine = engines.build_engine(stage, SEED, CPU, models_at(folder), reduce_bucket_size=3000, **threshold)
        found = two_steps(engine, own_batches(stage, pools))
        engine.destroy()
    return compared(found, partial(dense, stage, pools, folder), fp64)


def own_batches(stage: Any, pools: list[Any]) -> list[Any]:
    if stage.batch.span == "rank":
        share = len(pools) // world_size()
        return pools[rank() * share : (rank() + 1) * share]
    rows = POOL // world_size()
    return [rows_of_graded(pool, rank() * rows, (rank() + 1) * rows) for pool in pools]


def dense(stage: Any, pools: Any, folder: Path, fp64: bool) -> Outcome:
    """The dense form's."""
    with precision(fp64):
        objective = build_perturbed(stage, SEED, CPU, models_at(folder), fp64)
        loss = sycl_loss(objective.encoder, pools, objective.settings)
        loss.backward()
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return Outcome(float(loss.detach()), gradients)


def main() -> None:
    request = json.loads(Path(sys.argv[-2]).read_text())
    start_distributed()
    answers = worst_of_ranks([run_case(case, request["folders"]) for case in request["cases"]])
    if rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
    end(0)
