"""Worker: the contrastive methods on several ranks against their dense one-process forms, case by case.

Request: {"folders", "cases"}; answer: per case the errors of the loss, of the whole gradient and of the worst array.
"""

import copy
import json
import sys
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from reference_contrastive import ReContrieverReference, contrastive_loss
from revela_matrix import (
    Outcome,
    OwnSlice,
    compared,
    number_of_pools,
    perturb,
    precision,
    two_steps,
    worst_of_ranks,
)
from tiny import models_at, random_crops, random_pairs, rows_of_crops, rows_of_pairs, stage_of, with_surrogate

import toolkit.methods.pair_loss
import toolkit.methods.recontriever.objective
import toolkit.training.engine as engines
from toolkit.collectives import gather, rank, sum_over_ranks, world_size
from toolkit.methods import method_of
from toolkit.methods.contrastive.objective import Contrastive
from toolkit.methods.method import Models
from toolkit.methods.recontriever.keys import ReContrieverObjective
from toolkit.methods.recontriever.objective import Momentum, ReContriever
from toolkit.ranks.last_words import end
from toolkit.ranks.process_group import start_distributed

POOL, SEED = 8, 3
CPU = torch.device("cpu")
MODULES = (toolkit.methods.pair_loss, toolkit.methods.recontriever.objective)


def own_alone(vectors: torch.Tensor) -> torch.Tensor:
    """Own vectors in every rank's place; keys are gathered as they should be."""
    return vectors.repeat(world_size(), 1) if vectors.is_floating_point() else gather(vectors)


# Mistakes that must be seen: name -> (where, which function, what stands in for it)
CONTROLS: dict[str, tuple[tuple[Any, ...], str, Any]] = {
    "own_slice_backward": (MODULES, "gather_with_grad", OwnSlice.apply),
    "no_world_size": (MODULES, "pool_mean", lambda own, count, span: own / sum_over_ranks(count)),
    "mean_of_own_rows": (MODULES, "pool_mean", lambda own, count, span: own / count),
    "keys_of_the_query_encoder": ((Momentum,), "in_place", lambda self: nullcontext()),
    "own_surrogate": ((toolkit.methods.pair_loss,), "gather", own_alone),
    "momentum_stands_still": ((Momentum,), "update", lambda self: None),
}


def build_perturbed(stage: Any, seed: int, device: Any, models: Models, fp64: bool) -> Any:
    objective = method_of(stage.objective.name).build(stage, seed, device, models)
    perturb(objective, size=0.1)
    objective = objective.double() if fp64 else objective
    if isinstance(objective, ReContriever) and objective.momentum is not None:
        objective.momentum = Momentum(objective.encoder, objective.momentum.share)
        random = torch.Generator().manual_seed(7)
        for average in objective.momentum.average.values():  # as after many steps: another model than the query's
            average += 0.05 * torch.randn(average.shape, generator=random)
    return objective


def run_case(case: dict[str, Any], folders: dict[str, str], mistake: list[Any]) -> dict[str, float]:
    """Errors of one case, as `compared` gives them; a mistake is the engine's, not the dense form's."""
    stage = stage_of(case["method"], **case["changes"], batch__pool=POOL, batch__pools_per_step=number_of_pools(case))
    folder, fp64 = Path(folders[case["arch"]]), case["fp64"]
    pools = make_pools(stage, case["seed"])
    engines.build_objective = partial(build_perturbed, fp64=fp64)
    whole = stage.zero.stage == 3 and not case.get("keep_persistent")
    threshold = {"stage3_param_persistence_threshold": 0} if whole else {}
    with precision(fp64), ExitStack() as patches:
        for patch in mistake:
            patches.enter_context(patch)
        engine = engines.build_engine(stage, SEED, CPU, models_at(folder), reduce_bucket_size=3000, **threshold)
        found = two_steps(engine, own_batches(stage, pools))  # queues hold new keys by the second
        state = engine.module.extra_state()
        if "queue.keys" in state:
            keys, pointer = state["queue.keys"], int(state["queue.pointer"])
            found = found._replace(queue=torch.cat([keys[pointer:], keys[:pointer]]))
        engine.destroy()
    return compared(found, partial(dense, stage, pools, folder), fp64)


def make_pools(stage: Any, seed: int) -> list[Any]:
    if isinstance(stage.objective, ReContrieverObjective):
        return random_crops(stage.batch.pools_per_step, POOL, stage.objective.views, seed)
    pools = random_pairs(stage.batch.pools_per_step, POOL, stage.data.positives, stage.data.negatives, seed)
    if stage.objective.false_negatives is None:
        return pools
    return [with_surrogate(pool, seed + number) for number, pool in enumerate(pools)]


def own_batches(stage: Any, pools: list[Any]) -> list[Any]:
    if stage.batch.span == "rank":
        share = len(pools) // world_size()
        return pools[rank() * share : (rank() + 1) * share]
    rows = POOL // world_size()
    cut = rows_of_crops if isinstance(stage.objective, ReContrieverObjective) else rows_of_pairs
    return [cut(pool, rank() * rows, (rank() + 1) * rows) for pool in pools]


def dense(stage: Any, pools: Any, folder: Path, fp64: bool) -> Outcome:
    """The dense form's."""
    with precision(fp64):
        objective = build_perturbed(stage, SEED, CPU, models_at(folder), fp64)
        queue = None
        if isinstance(objective, Contrastive):
            loss = contrastive_loss(objective.encoder, pools, objective.settings, objective.scale())
        else:
            keys = None if objective.queue is None else objective.queue.keys
            reference = ReContrieverReference(stage.objective, keys.double() if fp64 and keys is not None else keys)
            key_encoder = objective.encoder
            if objective.momentum is not None:  # the first step filled the queue and moved the key encoder
                key_encoder = copy.deepcopy(objective.encoder)
                averages = objective.momentum.average
                with torch.no_grad():
                    named = dict(key_encoder.named_parameters())
                    for name, average in averages.items():
                        named[name].copy_(average)
                    reference.loss(objective.encoder, key_encoder, pools)
                    for name, parameter in objective.encoder.named_parameters():
                        named[name].lerp_(parameter, 1 - objective.momentum.share)
            loss = reference.loss(objective.encoder, key_encoder, pools)
            queue = reference.queue
        loss.backward()
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return Outcome(float(loss), gradients, queue)


def main() -> None:
    request = json.loads(Path(sys.argv[-2]).read_text())
    start_distributed()
    answers = []
    for case in request["cases"]:
        places, name, stand_in = CONTROLS.get(case.get("control"), ((), "", None))
        mistake = [mock.patch.object(place, name, stand_in) for place in places]
        answers.append(run_case(case, request["folders"], mistake))
    answers = worst_of_ranks(answers)
    if rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
    end(0)
