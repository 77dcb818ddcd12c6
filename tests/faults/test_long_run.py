"""2,000 steps: neither memory nor open files grow; printed by `pytest -rP tests/faults/test_long_run.py`."""

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
from in_process import one_stage, start

from toolkit.training.metrics import Log

STEPS, EVERY, SETTLED = 2000, 100, 400
MIB_GROWN = 4.0


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measured(folder: Path, monkeypatch: pytest.MonkeyPatch, kept: list[Any] | None) -> dict[int, tuple[float, int]]:
    """MiB and open files every so many steps of a run; where `kept` is a list it leaks 10 kB a step, and files."""
    recipe = one_stage(folder, ("stages.0.optim.steps", STEPS), ("stages.0.save", {"every": 500, "keep": 2}))
    recipe["stages"][0]["eval"] = {"suites": []}
    found, write = {}, Log.write

    def counted(log: Log, step: int, values: dict[str, Any]) -> None:
        write(log, step, values)
        if kept is not None:
            kept.append(os.urandom(10_000))
        if step % EVERY == 0:
            if kept is not None:
                kept.append(os.open(os.devnull, os.O_RDONLY))
            gc.collect()
            found[step] = (resident_mib(), len(os.listdir("/proc/self/fd")))

    with monkeypatch.context() as counting:
        counting.setattr(Log, "write", counted)
        assert start(folder, recipe, monkeypatch) == 0
    assert len((folder / "run" / "log.jsonl").read_text().splitlines()) == STEPS
    return found


def grown(found: dict[int, tuple[float, int]]) -> float:
    """MiB from the steps that are settled to the last, each end the mean of three."""
    settled = [found[step][0] for step in sorted(found) if step >= SETTLED]
    return sum(settled[-3:]) / 3 - sum(settled[:3]) / 3


def opened(found: dict[int, tuple[float, int]]) -> int:
    """Fewest files open in the second half of the settled steps, beyond those in the first; TensorBoard opens its file
    for every write, now and then while they are counted."""
    counts = [found[step][1] for step in sorted(found) if step >= SETTLED]
    half = len(counts) // 2
    return min(counts[half:]) - min(counts[:half])


@pytest.mark.full
def test_memory_and_files_do_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    found = measured(tmp_path / "a", monkeypatch, None)
    print(json.dumps({"MiB grown": round(grown(found), 2), "step: MiB, open files": found}))
    assert grown(found) < MIB_GROWN and opened(found) <= 0
    (tmp_path / "b").mkdir()
    control = measured(tmp_path / "b", monkeypatch, [])
    assert grown(control) > 2 * MIB_GROWN and opened(control) > 5
