"""Scalars of a step: summed over forwards and ranks once, then to log.jsonl and TensorBoard."""

import json
import math
import os
import resource
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from toolkit.collectives import sum_over_ranks, world_size
from toolkit.files import replace_text
from toolkit.methods.objective import Loss


def reduce_losses(
    losses: Iterable[Loss], tokens: dict[str, int], beside: dict[str, int], wait: float, device: torch.device
) -> dict[str, float]:
    """Means over all forwards and ranks of one step; "loss" is exactly what was optimised.

    Args:
        tokens: side of the batch -> real tokens of this rank; the same sides on all ranks.
        beside: the same of what is run beside them, and not counted among the tokens.

    Returns also tokens and tokens_SIDE (global sums) and data_wait (mean seconds a rank waited for data).
    """
    totals: dict[str, list[Tensor]] = {}
    losses = list(losses)
    for loss in losses:
        for name, pair in loss.parts.items():
            totals.setdefault(name, [torch.zeros((), dtype=torch.float64, device=device) for _ in pair])
            for total, value in zip(totals[name], pair, strict=True):
                total += value
    own = torch.stack([loss.total.detach().double() for loss in losses]).mean()
    sides = [*tokens, *beside]
    extra = torch.tensor([wait, *tokens.values(), *beside.values()], dtype=torch.float64, device=device)
    flat = sum_over_ranks(torch.cat([own[None], extra, *(torch.stack(pair) for pair in totals.values())])).tolist()
    counts, sums = flat[2 : 2 + len(sides)], flat[2 + len(sides) :]
    of_texts = sum(counts[: len(tokens)])
    values = {"loss": flat[0] / world_size(), "tokens": of_texts, "data_wait": flat[1] / world_size()}
    values |= {f"tokens_{side}": count for side, count in zip(sides, counts, strict=True)}
    for index, name in enumerate(totals):
        total, count = sums[2 * index : 2 * index + 2]
        values[name] = total / count
    return values


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory of rank 0 in GiB: of the GPU's allocator in this stage, or of the process without a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


class Log:
    """log.jsonl and TensorBoard of a run, continued without a repeated step; rank 0 only."""

    def __init__(self, run: Path, stage: str, first_step: int, resumed_step: int) -> None:
        self._stage = stage
        self._first = first_step
        path = run / "log.jsonl"
        cut_after(path, stage, resumed_step)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + resumed_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line and one set of scalars; `step` counts within the stage, TensorBoard's over the run.

        What is not finite has no place in JSON and is left out.
        """
        values = {name: x for name, x in values.items() if not isinstance(x, float) or math.isfinite(x)}
        self._file.write(json.dumps({"stage": self._stage, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{self._stage}/{name}", value, self._first + step)

    def sync(self) -> None:
        """Wait until log.jsonl is on the disk: a checkpoint is not there before its steps are."""
        os.fsync(self._file.fileno())
        self._board.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._board.close()


def write_eval_scalars(run: Path, scores: dict[str, dict[str, float]], step: int) -> None:
    """eval/<collection>/<metric> at the global step of the run."""
    with SummaryWriter(str(run / "tensorboard")) as board:
        for collection, metrics in scores.items():
            for name, value in metrics.items():
                board.add_scalar(f"eval/{collection}/{name}", value, step)


def cut_after(path: Path, stage: str, step: int) -> None:
    """Forget JSON lines of a stage past the step it resumes from (and a line cut short by a crash).

    They are the end of the file and are cut off; only where an earlier stage is taken up again the file is rewritten.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _is_before(line, stage, step)]
    whole = sum(map(len, kept))
    if kept == lines[: len(kept)]:
        os.truncate(path, whole)
    else:
        replace_text(path, b"".join(kept).decode())


def _is_before(line: bytes, stage: str, step: int) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return entry["stage"] != stage or entry["step"] <= step
