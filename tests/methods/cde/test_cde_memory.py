"""Gradient caching in two stages: however many texts and documents there are, the memory of a step is one slice's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contextual import cde_stage, context_keys, random_contexts, save_backbone
from tiny import build_objective
from torch.profiler import ProfilerActivity, profile

from toolkit.data.tokens import Tokens

SLICE = 2  # texts


def peak_mib(run: Callable[[], Any]) -> float:
    """The most memory that was there at once, of what was allocated meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyright: ignore
    there = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        there += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        most = max(most, there)
    return most / 2**20


class Step:
    """A step of a pool of so many rows: two texts each, and a context of 20 documents."""

    def __init__(self, kind: str, folder: Path, rows: int, sliced: bool) -> None:
        forward = {"batch__forward_rows": SLICE} if sliced else {}
        context = context_keys(kind, size=20)
        self.stage = cde_stage(kind, context, batch__span="rank", batch__pool=rows, batch__pools_per_step=1, **forward)
        self.objective = build_objective(self.stage, 3, "cpu", folder)
        self.pool = random_contexts(1, rows, self.stage)[0]
        for parameter in self.objective.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def run(self) -> None:
        self.objective(self.pool).total.backward()

    def one_slice(self) -> None:
        """The second stage's pass over one slice, its activations kept."""
        encoder = self.objective.encoder
        prefix = encoder.prefix(torch.randn(20, 64))
        encoder.text(Tokens(*(t[:SLICE] for t in self.pool.pairs.document)), prefix).sum().backward()


@pytest.mark.parametrize("kind", ["nomic_bert", "llama"])
def test_the_memory_of_a_step_is_that_of_a_slice(kind: str, tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / kind, kind, width=64)
    whole = [peak_mib(Step(kind, folder, rows, sliced=False).run) for rows in (8, 24)]
    sliced = [peak_mib(Step(kind, folder, rows, sliced=True).run) for rows in (8, 24)]
    of_slice = peak_mib(Step(kind, folder, 8, sliced=True).one_slice)
    assert whole[1] > 1.8 * whole[0] > 8 * of_slice
    assert max(sliced) < 2 * of_slice  # with the loss, and the gradients of the slice's weights
    # Of each further slice its texts' vectors and keys are kept, and the state of random numbers.
    assert sliced[1] - sliced[0] < 0.03 * (whole[1] - whole[0])
