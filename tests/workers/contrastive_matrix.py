"""Worker: the contrastive methods on several ranks against their dense one-process forms, case by case.

Request: {"folders", "cases"}; answer: per case the errors of the loss, of the whole gradient and of the worst array.
"""

import copy
import json
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from reference_contrastive import ReContrieverReference, contrastive_loss
from revela_matrix import OwnSlice, perturb
from tiny import random_crops, random_pairs, rows_of_crops, rows_of_pairs, stage_of

import toolkit.objectives.contrastive
import toolkit.objectives.recontriever
import toolkit.training.engine as engines
from toolkit.collectives import rank, sum_over_ranks, world_size
from toolkit.objectives import build_objective
from toolkit.objectives.contrastive import Contrastive
from toolkit.objectives.recontriever import Momentum, ReContriever
from toolkit.recipe import ReContrieverObjective
from toolkit.training.process_group import start_distributed

NUM_POOLS, POOL, SEED = 4, 8, 3
CPU = torch.device("cpu")
MODULES = (toolkit.objectives.contrastive, toolkit.objectives.recontriever)
# Mistakes that must be seen: name -> (where, which function, what stands in for it)
CONTROLS: dict[str, tuple[tuple[Any, ...], str, Any]] = {
    "own_slice_backward": (MODULES, "gather_with_grad", OwnSlice.apply),
    "no_world_size": (MODULES, "pool_mean", lambda own, count, span: own / sum_over_ranks(count)),
    "mean_of_own_rows": (MODULES, "pool_mean", lambda own, count, span: own / count),
    "keys_of_the_query_encoder": ((Momentum,), "in_place", lambda self: nullcontext()),
    "momentum_stands_still": ((Momentum,), "update", lambda self: None),
}


def build_perturbed(stage: Any, seed: int, device: Any, folder: Path, adapter: None, lm_folder: None) -> Any:
    objective = build_objective(stage, seed, device, folder, adapter, lm_folder)
    perturb(objective, size=0.1)
    if isinstance(objective, ReContriever) and objective.momentum is not None:
        objective.momentum = Momentum(objective.encoder, objective.momentum.share)
        random = torch.Generator().manual_seed(7)
        for average in objective.momentum.average.values():  # as after many steps: another model than the query's
            average += 0.05 * torch.randn(average.shape, generator=random)
    return objective


def run_engine(case: dict[str, Any], folders: dict[str, str]) -> tuple[Any, ...]:
    """Two steps of the engine: what `compare` compares."""
    stage = stage_of(case["method"], **case["changes"], batch__pool=POOL, batch__pools_per_step=NUM_POOLS)
    folder = Path(folders[case["arch"]])
    pools = make_pools(stage, case["seed"])
    engines.build_objective = build_perturbed
    whole = stage.zero.stage == 3 and not case.get("keep_persistent")
    threshold = {"stage3_param_persistence_threshold": 0} if whole else {}
    engine = engines.build_engine(stage, SEED, CPU, folder, None, None, reduce_bucket_size=3000, **threshold)
    names = [name for name, p in engine.module.named_parameters() if p.requires_grad]
    mine = own_batches(stage, pools)
    gradients: dict[str, torch.Tensor] = {}
    losses: list[torch.Tensor] = []
    for _ in range(2):  # at ZeRO-3 the second step runs from the recorded trace; queues hold new keys by then
        losses = []
        for index, batch in enumerate(mine):
            loss = engine(batch)
            engine.backward(loss.total)
            losses.append(loss.total.detach())
            if index == len(mine) - 1:
                parameters = dict(engine.module.named_parameters())
                gradients = {n: deepspeed.utils.safe_get_full_grad(parameters[n]).clone() for n in names}
            engine.step()
        engine.module.after_step()
    total = float(sum_over_ranks(torch.stack(losses).mean()) / world_size())
    state = {name: tensor.clone() for name, tensor in engine.module.extra_state().items()}
    engine.destroy()
    return stage, pools, folder, total, gradients, state


def make_pools(stage: Any, seed: int) -> list[Any]:
    if isinstance(stage.objective, ReContrieverObjective):
        return random_crops(NUM_POOLS, POOL, stage.objective.views, seed)
    return random_pairs(NUM_POOLS, POOL, stage.data.positives, stage.data.negatives, seed)


def own_batches(stage: Any, pools: list[Any]) -> list[Any]:
    if stage.batch.span == "rank":
        share = len(pools) // world_size()
        return pools[rank() * share : (rank() + 1) * share]
    rows = POOL // world_size()
    cut = rows_of_crops if isinstance(stage.objective, ReContrieverObjective) else rows_of_pairs
    return [cut(pool, rank() * rows, (rank() + 1) * rows) for pool in pools]


def compare(
    stage: Any, pools: Any, folder: Path, total: float, gradients: Any, state: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Errors of one case: the loss, and the worst gradient array, each as max|a-b| / max|b|."""
    objective = build_perturbed(stage, SEED, CPU, folder, None, None)
    answer: dict[str, float] = {}
    if isinstance(objective, Contrastive):
        expected = contrastive_loss(objective.encoder, pools, objective.settings, objective.scale())
    else:
        queue = None if objective.queue is None else objective.queue.keys.clone()
        reference = ReContrieverReference(stage.objective, queue)
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
        expected = reference.loss(objective.encoder, key_encoder, pools)
        if reference.queue is not None:
            pointer = int(state["queue.pointer"])
            found = torch.cat([state["queue.keys"][pointer:], state["queue.keys"][:pointer]])
            answer["queue"] = float((found - reference.queue).abs().max() / reference.queue.abs().max())
    expected.backward()
    true = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    assert true.keys() == gradients.keys()
    errors = {name: gradients[name] - true[name] for name in true}
    norm = torch.nn.utils.get_total_norm
    largest = {name: float(gradient.abs().max()) for name, gradient in true.items()}
    # A softmax does not see what all keys share: the bias of BERT's keys has no gradient but rounding.
    compared = [name for name in true if largest[name] > 1e-6 * max(largest.values())]
    assert all(name.endswith("key.bias") for name in true.keys() - set(compared))
    return answer | {
        "loss": abs(total - float(expected)) / abs(float(expected)),
        "gradient": float(norm(errors.values()) / norm(true.values())),
        "worst_array": max(float(errors[name].abs().max()) / largest[name] for name in compared),
        "smallest_array": min(largest[name] for name in compared),
    }


def main() -> None:
    request = json.loads(Path(sys.argv[-2]).read_text())
    start_distributed()
    answers = []
    for case in request["cases"]:
        places, name, stand_in = CONTROLS.get(case.get("control"), ((), "", None))
        with ExitStack() as patches:
            for place in places:
                patches.enter_context(mock.patch.object(place, name, stand_in))
            made = run_engine(case, request["folders"])
        answers.append(compare(*made))
    if rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
    dist.destroy_process_group()  # else the group's threads may abort the process as it ends
