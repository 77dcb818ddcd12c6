"""Worker: the cde method on several ranks against its plain one-process form, case by case.

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
from contextual import cde_stage, part_of, plain_loss, random_contexts
from revela_matrix import Outcome, OwnSlice, compared, number_of_pools, perturb, precision, two_steps, worst_of_ranks
from tiny import models_at
from torch import Tensor

import toolkit.methods.cde.objective
import toolkit.training.engine as engines
from toolkit.collectives import rank, sum_over_ranks, world_size
from toolkit.methods import method_of
from toolkit.methods.cde.objective import Cde
from toolkit.methods.method import Models
from toolkit.ranks.last_words import end
from toolkit.ranks.process_group import start_distributed
from toolkit.slicing import in_slices

POOL, SEED = 8, 3
CPU = torch.device("cpu")


def truncated(fn: Any, slices: Any, *inputs: Any) -> Any:
    """The reference's cache: of the first stage's slices only the first two have a gradient."""
    found = in_slices(fn, slices, *inputs)
    if not (isinstance(fn, partial) and fn.func.__name__ == "_of_documents") or slices.rows is None:
        return found
    kept = torch.zeros(len(found), dtype=torch.bool)
    kept[torch.cat(slices.rows[:2])] = True
    return torch.where(kept[:, None, None], found, found.detach())


def without_gradient(self: Cde, context: Tensor, null: Tensor) -> Tensor:
    return self.encoder.prefix(context, null).detach()


# Mistakes that must be seen: name -> (where, which function, what stands in for it)
CONTROLS: dict[str, tuple[Any, str, Any]] = {
    "truncated": (toolkit.methods.cde.objective, "in_slices", truncated),
    "own_slice_backward": (toolkit.methods.cde.objective, "gather_with_grad", OwnSlice.apply),
    "prefix_without_gradient": (Cde, "prefix", without_gradient),
}


def build_perturbed(stage: Any, seed: int, device: Any, models: Models, fp64: bool) -> Any:
    objective: Any = method_of(stage.objective.name).build(stage, seed, device, models)
    perturb(objective, size=0.1)
    return objective.double() if fp64 else objective


def run_case(case: dict[str, Any], folders: dict[str, str], mistake: list[Any]) -> dict[str, float]:
    """Errors of one case, as `compared` gives them; a mistake is the engine's, not the plain form's."""
    pools_per_step = number_of_pools(case)
    stage = cde_stage(
        case["arch"], case["context"], **case["changes"], batch__pool=POOL, batch__pools_per_step=pools_per_step
    )
    models, fp64 = models_at(Path(folders[case["arch"]])), case["fp64"]
    if "first" in case:
        models.others["first_stage"] = models_at(Path(folders[case["first"]])).retriever
    pools = random_contexts(pools_per_step, POOL, stage, case["seed"])
    engines.build_objective = partial(build_perturbed, fp64=fp64)
    threshold = {"stage3_param_persistence_threshold": 0} if stage.zero.stage == 3 else {}
    with precision(fp64), ExitStack() as patches:
        for patch in mistake:
            patches.enter_context(patch)
        if case.get("no_engine"):
            found = summed(build_perturbed(stage, SEED, CPU, models, fp64), own_batches(stage, pools))
        else:
            engine = engines.build_engine(stage, SEED, CPU, models, reduce_bucket_size=3000, **threshold)
            found = two_steps(engine, own_batches(stage, pools))
            engine.destroy()
    return compared(found, partial(dense, stage, pools, models), fp64)


def summed(objective: Any, batches: list[Any]) -> Outcome:
    """Loss and gradients of the ranks put together by hand: DeepSpeed keeps gradients in fp32, whatever the weights."""
    losses = [objective(batch).total / len(batches) for batch in batches]
    for loss in losses:
        loss.backward()
    loss = sum_over_ranks(torch.stack(losses).sum().detach()) / world_size()
    trained = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return Outcome(float(loss), {name: sum_over_ranks(grad) / world_size() for name, grad in trained.items()})


def own_batches(stage: Any, pools: list[Any]) -> list[Any]:
    if stage.batch.span == "rank":
        share = len(pools) // world_size()
        return pools[rank() * share : (rank() + 1) * share]
    return [part_of(pool, stage, rank(), world_size()) for pool in pools]


def dense(stage: Any, pools: Any, models: Models, fp64: bool) -> Outcome:
    """The plain form's, whose prefix is run with every text."""
    with precision(fp64):
        objective = build_perturbed(stage, SEED, CPU, models, fp64)
        objective.encoder.share_prefix = False
        loss = plain_loss(objective.encoder, pools, objective.settings, objective.scale())
        loss.backward()
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return Outcome(float(loss.detach()), gradients)


def main() -> None:
    request = json.loads(Path(sys.argv[-2]).read_text())
    start_distributed()
    answers = []
    for case in request["cases"]:
        place = CONTROLS.get(case.get("control"))
        answers.append(run_case(case, request["folders"], [] if place is None else [mock.patch.object(*place)]))
    answers = worst_of_ranks(answers)
    if rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
    end(0)
