"""log.jsonl of a run as numbers: scalars by stage and step, and what a stage's training cost. Called by reports.

A resumed run goes on in the log from its checkpoint and drops the lines behind it: every step stands there once.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

Steps = dict[int, dict[str, Any]]  # step -> its line


class Cost(NamedTuple):
    """Sums over a stage's steps; None where a line lacks the number."""

    tokens: float | None
    flops: float | None
    device_seconds: float | None
    peak_memory_gib: float | None  # largest of rank 0


def read_log(run: Path) -> dict[str, Steps]:
    """Stage name -> its steps in order; empty for a run that logged none."""
    log = run / "log.jsonl"
    stages: dict[str, Steps] = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else []:
        row = json.loads(line)
        if "stage" in row and "step" in row:
            stages.setdefault(row["stage"], {})[row["step"]] = row
    return {stage: dict(sorted(steps.items())) for stage, steps in stages.items()}


def cost(steps: Steps) -> Cost:
    """What the steps of a stage cost together."""

    def values(key: str) -> list[float] | None:
        found = [row[key] for row in steps.values() if key in row]
        return found if found and len(found) == len(steps) else None

    def total(key: str) -> float | None:
        found = values(key)
        return None if found is None else sum(found)

    peaks = values("peak_memory_gib")
    return Cost(total("tokens"), total("flops"), total("device_s"), None if peaks is None else max(peaks))
