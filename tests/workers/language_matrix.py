"""Worker: the language_model engine on several ranks against transformers' own logits. Request and answer are JSON."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from revela_matrix import (
    POOL,
    Outcome,
    compared,
    number_of_pools,
    own_batches,
    precision,
    two_steps,
    worst_of_ranks,
)
from tiny import models_at, random_tokens, revela_stage

import toolkit.losses.language
import toolkit.methods.language_model.objective
import toolkit.training.engine as engines
from toolkit.collectives import pool_mean, rank
from toolkit.methods import method_of
from toolkit.methods.language_model.rows import LanguageModelBatch
from toolkit.methods.method import Models
from toolkit.models.backbone import load_causal_lm
from toolkit.ranks.last_words import end
from toolkit.ranks.process_group import start_distributed

CPU = torch.device("cpu")
# A mistake that must be seen at span world: the mean over the own tokens.
MEANS = {None: pool_mean, "own_mean": lambda own, count, span: own / count}


def build_fp64(stage: Any, seed: int, device: Any, models: Models) -> torch.nn.Module:
    return method_of(stage.objective.name).build(stage, seed, device, models).double()


def run_case(case: dict[str, Any], folder: Path) -> dict[str, float]:
    """Errors of one case in fp64, as `compared` gives them."""
    batch = {"batch__pool": POOL, "batch__pools_per_step": number_of_pools(case)}
    objective = {"name": "language_model", "max_tokens": 14}
    stage = revela_stage(lora=None, objective=objective, **batch, **case["changes"])
    generator = torch.Generator().manual_seed(3)
    pools = [LanguageModelBatch(random_tokens(POOL, generator)) for _ in range(number_of_pools(case))]
    engines.build_objective = build_fp64
    mean = MEANS[case.get("control")]
    with (
        precision(True),
        mock.patch.object(toolkit.losses.language, "MAX_LOGITS", case["max_logits"]),
        mock.patch.object(toolkit.methods.language_model.objective, "pool_mean", mean),
    ):
        persistent = {"stage3_param_persistence_threshold": 0} if stage.zero.stage == 3 else {}
        engine = engines.build_engine(stage, 3, CPU, models_at(folder), reduce_bucket_size=3000, **persistent)
        found = two_steps(engine, own_batches(pools, stage.batch.span))
        engine.destroy()
    return compared(found, partial(dense, pools, folder), True)


def dense(pools: list[LanguageModelBatch], folder: Path, fp64: bool) -> Outcome:
    """Of the whole logits of every pool, padding masked."""
    causal_lm = load_causal_lm(folder, torch.float64, "sdpa")
    losses = []
    with precision(fp64):
        for pool in pools:
            ids, mask = pool.text
            logp = causal_lm(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
            nll = -logp.gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]
            losses.append(nll.sum() / mask[:, 1:].sum())
        loss = torch.stack(losses).mean()
        loss.backward()
    gradients = {f"causal_lm.{name}": p.grad for name, p in causal_lm.named_parameters() if p.grad is not None}
    return Outcome(float(loss.detach()), gradients)


def main() -> None:
    request = json.loads(Path(sys.argv[-2]).read_text())
    start_distributed()
    answers = worst_of_ranks([run_case(case, Path(request["folders"][case["arch"]])) for case in request["cases"]])
    if rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
    end(0)
