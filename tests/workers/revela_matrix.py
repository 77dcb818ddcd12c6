"""Worker: the Revela engine under DeepSpeed against the dense reference, case by case. Request and answer are JSON."""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import reference
import torch
import torch.distributed as dist
from reference import NAME, revela_loss
from tiny import random_pools, revela_stage, rows_of

import toolkit.objectives.revela
import toolkit.training.engine as engines
from toolkit.collectives import gather, rank, sum_over_ranks, world_size
from toolkit.models.backbone import load_causal_lm
from toolkit.objectives.revela import Revela, build_revela
from toolkit.recipe import RevelaObjective
from toolkit.training.process_group import start_distributed

GRID, STEPS = 2**13, 8
NUM_POOLS, POOL = 4, 8


def on_grid(similarity: torch.Tensor) -> torch.Tensor:
    """Similarities as a few steps of a 2^-13 grid, gradient straight through.

    At tau = 1e-4 fp32 rounding alone would move weights; a step is 1.2 tau, so rows keep several sources.
    """
    scaled = similarity * STEPS / GRID
    return scaled + ((similarity * STEPS).round() / GRID - scaled).detach()


def perturb(objective: torch.nn.Module, size: float = 0.3) -> None:
    """Adapters start with B = 0, which would hide the gradient of A."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in objective.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))


def build_perturbed(stage: Any, seed: int, device: Any, folder: Path, adapter: None, lm_folder: Path) -> Revela:
    objective = build_revela(stage, stage.objective, seed, device, folder, adapter, lm_folder)
    perturb(objective)
    if stage.objective.temperature < 0.01:
        objective.weights = lambda q, p: weights_on_grid(objective, q, p)  # pyright: ignore
    return objective


def weights_on_grid(objective: Revela, query: torch.Tensor, passage: torch.Tensor) -> torch.Tensor:
    own = torch.arange(len(query)) + objective._first_row(len(query))
    itself = torch.nn.functional.one_hot(own, len(passage)).bool()
    return (on_grid(query @ passage.T) / objective.settings.temperature).masked_fill(itself, float("-inf")).softmax(-1)


class OwnSlice(torch.autograd.Function):
    """The usual contrastive trick, wrong here: a gather whose backward keeps the own rows and sums nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        ctx.rows = len(x)
        return gather(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        return grad[rank() * ctx.rows : (rank() + 1) * ctx.rows]


# Mistakes that must be seen at span world: name -> (function of the objective, what stands in for it)
CONTROLS = {
    "own_slice_backward": ("gather_with_grad", OwnSlice.apply),
    "no_world_size": ("pool_mean", lambda own, count, span: own / sum_over_ranks(count)),
    "mean_of_own_tokens": ("pool_mean", lambda own, count, span: own / count),
}


def run_case(case: dict[str, Any], folders: dict[str, str]) -> dict[str, float]:
    """Errors of one case: the loss, and the worst gradient array, each as max|a-b| / max|b|."""
    stage = revela_stage(**case["changes"], batch__pool=POOL, batch__pools_per_step=NUM_POOLS)
    assert isinstance(stage.objective, RevelaObjective)
    folder, lm_folder = Path(folders[case["arch"]]), Path(folders[case["arch"] + "_lm"])
    pools = random_pools(NUM_POOLS, POOL, seed=case["seed"])
    engines.build_objective = build_perturbed
    engine = engines.build_engine(
        stage, 3, torch.device("cpu"), folder, None, lm_folder, reduce_bucket_size=3000,
        **({"stage3_param_persistence_threshold": 0} if stage.zero.stage == 3 else {}),
    )  # fmt: skip
    names = [name for name, p in engine.module.named_parameters() if p.requires_grad]
    mine = own_batches(pools, stage.batch.span)
    gradients: dict[str, torch.Tensor] = {}
    losses: list[torch.Tensor] = []
    for _ in range(2):  # the second step is the one that ZeRO-3 runs from its recorded trace
        losses = []
        for index, batch in enumerate(mine):
            loss = engine(batch)
            engine.backward(loss.total)
            losses.append(loss.total.detach())
            if index == len(mine) - 1:
                parameters = dict(engine.module.named_parameters())
                gradients = {n: deepspeed.utils.safe_get_full_grad(parameters[n]).clone() for n in names}
            engine.step()
    total = float(sum_over_ranks(torch.stack(losses).mean()) / world_size())
    engine.destroy()
    return compare(stage, pools, folder, lm_folder, total, gradients)


def own_batches(pools: list[Any], span: str) -> list[Any]:
    if span == "rank":
        share = len(pools) // world_size()
        return pools[rank() * share : (rank() + 1) * share]
    rows = POOL // world_size()
    return [rows_of(pool, rank() * rows, (rank() + 1) * rows) for pool in pools]


def compare(stage: Any, pools: Any, folder: Path, lm_folder: Path, total: float, gradients: Any) -> dict[str, float]:
    objective = build_revela(stage, stage.objective, 3, "cpu", folder, None, lm_folder)
    dense = load_causal_lm(lm_folder, torch.float32, NAME)
    if stage.objective.language_model.lora is None:
        objective.language_model.causal_lm = dense.train()
    else:
        objective.language_model.causal_lm.get_base_model().set_attn_implementation(NAME)
    perturb(objective)
    reference.similarities = (
        (lambda q, p: on_grid(q @ p.T)) if stage.objective.temperature < 0.01 else (lambda q, p: q @ p.T)
    )
    expected = revela_loss(objective.encoder, objective.language_model.causal_lm, pools, stage.objective)
    expected.backward()
    true = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    assert true.keys() == gradients.keys()
    errors = {name: gradients[name] - true[name] for name in true}
    norm = torch.nn.utils.get_total_norm
    return {
        "loss": abs(total - float(expected)) / abs(float(expected)),
        "gradient": float(norm(errors.values()) / norm(true.values())),
        "worst_array": max(float(errors[name].abs().max() / true[name].abs().max()) for name in true),
        "smallest_array": min(float(true[name].abs().max()) for name in true),
    }


def main() -> None:
    request = json.loads(Path(sys.argv[-2]).read_text())
    start_distributed()
    answers = []
    for case in request["cases"]:
        name, stand_in = CONTROLS.get(case.get("control"), ("rank", rank))
        with mock.patch.object(toolkit.objectives.revela, name, stand_in):
            answers.append(run_case(case, request["folders"]))
    if rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
    dist.destroy_process_group()  # else the group's threads may abort the process as it ends
