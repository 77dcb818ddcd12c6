"""Worker: the Revela engine under DeepSpeed against the dense reference, case by case. Request and answer are JSON."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import deepspeed
import reference
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from fp64 import fp64_inside
from reference import NAME, revela_loss
from tiny import build_objective, models_at, random_pools, revela_stage, rows_of

import toolkit.losses.language
import toolkit.methods.revela.objective
import toolkit.training.engine as engines
from toolkit.collectives import gather, rank, sum_over_ranks, world_size
from toolkit.methods import method_of
from toolkit.methods.method import Models
from toolkit.methods.revela import pool_memory
from toolkit.methods.revela.keys import RevelaObjective
from toolkit.methods.revela.objective import Revela
from toolkit.models.backbone import load_causal_lm
from toolkit.ranks.last_words import end
from toolkit.ranks.process_group import start_distributed

GRID, STEPS = 2**13, 8
POOL = 8


def on_grid(similarity: torch.Tensor) -> torch.Tensor:
    """Similarities as a few steps of a 2^-13 grid, gradient straight through.

    At tau = 1e-4 fp32 rounding alone would move weights; a step is 1.2 tau, so rows keep several sources.
    """
    scaled = similarity * STEPS / GRID
    return scaled + ((similarity * STEPS).round() / GRID - scaled).detach()


class Outcome(NamedTuple):
    """What a step made, over all ranks."""

    loss: float
    gradients: dict[str, torch.Tensor]
    queue: torch.Tensor | None = None  # its keys, oldest first


def perturb(objective: torch.nn.Module, size: float = 0.3) -> None:
    """Adapters start with B = 0, which would hide the gradient of A."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in objective.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))


def build_perturbed(stage: Any, seed: int, device: Any, models: Models, fp64: bool) -> Any:
    objective: Any = method_of(stage.objective.name).build(stage, seed, device, models)
    perturb(objective)
    if stage.objective.temperature < 0.01:
        objective.weights = lambda q, p, masked: weights_of(objective, on_grid(q @ p.T), masked)  # pyright: ignore
    elif fp64:  # no recipe has similarities in fp64
        objective.weights = lambda q, p, masked: weights_of(objective, q @ p.T, masked)  # pyright: ignore
    return objective.double() if fp64 else objective


def weights_of(objective: Revela, similarity: torch.Tensor, duplicates: torch.Tensor | None) -> torch.Tensor:
    own = torch.arange(len(similarity)) + objective._first_row(len(similarity))
    masked = torch.nn.functional.one_hot(own, similarity.shape[1]).bool()
    masked = masked if duplicates is None else masked | duplicates
    some = ~masked.all(-1)
    scores = (similarity / objective.settings.temperature).masked_fill(masked, float("-inf"))
    return torch.zeros_like(scores).index_put((some,), scores[some].softmax(-1))


class OwnSlice(torch.autograd.Function):
    """The usual contrastive trick, wrong here: a gather whose backward keeps the own rows and sums nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        ctx.rows = len(x)
        return gather(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        return grad[rank() * ctx.rows : (rank() + 1) * ctx.rows]


# Mistakes that must be seen at span world: name -> (module, function of it, what stands in for it)
CONTROLS = {
    "own_slice_backward": (toolkit.methods.revela.objective, "gather_with_grad", OwnSlice.apply),
    "keys_without_gradient": (pool_memory, "_ticket", lambda own, layers, route: own.new_zeros(1)),
    "no_world_size": (
        toolkit.methods.revela.objective,
        "pool_mean",
        lambda own, count, span: own / sum_over_ranks(count),
    ),
    "mean_of_own_tokens": (toolkit.methods.revela.objective, "pool_mean", lambda own, count, span: own / count),
}


@contextmanager
def precision(fp64: bool) -> Iterator[None]:
    """DeepSpeed and the models in fp64, where rounding hides nothing; DeepSpeed else refuses it on a CPU.

    At ZeRO-3 it does so on CPUs that compute in fp16 only: there it looks at the dtype that it is given.
    """
    if not fp64:
        yield
        return
    accelerator: Any = get_accelerator()
    dtypes = [*accelerator.supported_dtypes(), torch.float64]
    with (
        fp64_inside(),
        mock.patch.object(accelerator, "supported_dtypes", lambda: dtypes),
        mock.patch.object(accelerator, "is_fp16_supported", lambda: False),
    ):
        yield


def run_case(case: dict[str, Any], folders: dict[str, str]) -> dict[str, float]:
    """Errors of one case, as `compared` gives them."""
    stage = revela_stage(**case["changes"], batch__pool=POOL, batch__pools_per_step=number_of_pools(case))
    assert isinstance(stage.objective, RevelaObjective)
    folder, lm_folder = Path(folders[case["arch"]]), Path(folders[case["arch"] + "_lm"])
    pools = random_pools(stage.batch.pools_per_step, POOL, seed=case["seed"])
    engines.build_objective = partial(build_perturbed, fp64=case["fp64"])
    with precision(case["fp64"]), mock.patch.object(toolkit.losses.language, "MAX_LOGITS", case["max_logits"]):
        engine = engines.build_engine(
            stage, 3, torch.device("cpu"), models_at(folder, None, lm_folder), reduce_bucket_size=3000,
            **({"stage3_param_persistence_threshold": 0} if stage.zero.stage == 3 else {}),
        )  # fmt: skip
        found = two_steps(engine, own_batches(pools, stage.batch.span))
        engine.destroy()
    return compared(found, partial(dense, stage, pools, folder, lm_folder), case["fp64"])


def number_of_pools(case: dict[str, Any]) -> int:
    """Of a step: each rank has two batches, but at span rank on four ranks, where it has one."""
    return 2 if world_size() == 1 or case["changes"]["batch__span"] == "world" else 4


def two_steps(engine: Any, batches: list[Any]) -> Outcome:
    """Loss over all ranks and gradients of the second of two steps: at ZeRO-3 that one runs from its recorded trace."""
    names = [name for name, p in engine.module.named_parameters() if p.requires_grad]
    gradients: dict[str, torch.Tensor] = {}
    losses: list[torch.Tensor] = []
    for _ in range(2):
        losses = []
        for index, batch in enumerate(batches):
            loss = engine(batch)
            engine.backward(loss.total)
            losses.append(loss.total.detach())
            if index == len(batches) - 1:
                parameters = dict(engine.module.named_parameters())
                full: Any = deepspeed.utils.safe_get_full_grad
                gradients = {n: full(parameters[n]).clone() for n in names}
            engine.step()
        engine.module.after_step(True)
    loss = float(sum_over_ranks(torch.stack(losses).mean()) / world_size())
    return Outcome(loss, gradients)


def own_batches(pools: list[Any], span: str) -> list[Any]:
    if span == "rank":
        share = len(pools) // world_size()
        return pools[rank() * share : (rank() + 1) * share]
    rows = POOL // world_size()
    return [rows_of(pool, rank() * rows, (rank() + 1) * rows) for pool in pools]


def dense(stage: Any, pools: Any, folder: Path, lm_folder: Path, fp64: bool) -> Outcome:
    """The dense form's."""
    objective: Any = build_objective(stage, 3, "cpu", folder, None, lm_folder)
    whole = load_causal_lm(lm_folder, torch.float32, NAME)
    if stage.objective.language_model.lora is None:
        objective.language_model.causal_lm = whole.train()
    else:
        objective.language_model.causal_lm.get_base_model().set_attn_implementation(NAME)
    perturb(objective)
    reference.similarities = (
        (lambda q, p: on_grid(q @ p.T)) if stage.objective.temperature < 0.01 else (lambda q, p: q @ p.T)
    )
    with precision(fp64):
        objective.to(torch.float64 if fp64 else torch.float32)
        loss = revela_loss(
            objective.encoder, objective.language_model.causal_lm, pools, stage.objective, stage.data.near_duplicates
        )
        loss.backward()
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return Outcome(float(loss.detach()), gradients)


def compared(found: Outcome, dense: Callable[[bool], Outcome], fp64: bool) -> dict[str, float]:
    """Errors against the dense form in fp64; of an fp32 engine, by how much they pass those of the dense form in fp32.

    loss: relative; gradient: norm of the whole gradient's error over its norm; worst_array, queue: max|a-b| / max|b|.
    """
    true = dense(True)
    largest = {name: float(gradient.abs().max()) for name, gradient in true.gradients.items()}
    # A softmax does not see what all keys share: the bias of BERT's keys has no gradient but rounding.
    named = [name for name in largest if largest[name] > 1e-6 * max(largest.values())]
    assert all(name.endswith("key.bias") for name in largest.keys() - set(named))

    def errors(outcome: Outcome) -> dict[str, float]:
        assert outcome.gradients.keys() == true.gradients.keys()
        off = {name: outcome.gradients[name].double() - true.gradients[name] for name in largest}
        norm = torch.nn.utils.get_total_norm
        figures = {
            "loss": abs(outcome.loss - true.loss) / abs(true.loss),
            "gradient": float(norm(off.values()) / norm(true.gradients.values())),
            "worst_array": max(float(off[name].abs().max()) / largest[name] for name in named),
        }
        if true.queue is not None:
            assert outcome.queue is not None
            figures["queue"] = float((outcome.queue.double() - true.queue).abs().max() / true.queue.abs().max())
        return figures

    figures = errors(found)
    if not fp64:
        rounding = errors(dense(False))
        figures = {name: figure - rounding[name] for name, figure in figures.items()}
    return figures | {"smallest_array": min(largest[name] for name in named)}


def worst_of_ranks(answers: list[dict[str, float]]) -> list[dict[str, float]]:
    """Of each case the largest error on any rank: losses, gradients and queues are the same on all."""
    everything: list[Any] = [None] * world_size()
    dist.all_gather_object(everything, answers)
    return [{name: max(rank[name] for rank in case) for name in case[0]} for case in zip(*everything, strict=True)]


def main() -> None:
    request = json.loads(Path(sys.argv[-2]).read_text())
    start_distributed()
    answers = []
    for case in request["cases"]:
        place, name, stand_in = CONTROLS.get(case.get("control"), (toolkit.methods.revela.objective, "rank", rank))
        with mock.patch.object(place, name, stand_in):
            answers.append(run_case(case, request["folders"]))
    answers = worst_of_ranks(answers)
    if rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
    end(0)
