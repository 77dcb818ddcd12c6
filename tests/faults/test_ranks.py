"""One of several ranks dies, stands still, reads other rows or is asked to stop: what ends, what is said, what goes on.

Run by make test-main; pytest tests/faults runs every fault of the README's table that needs a run of its own.
"""

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import WORKERS, launch, pooled
from recipe_changes import changed
from safetensors.numpy import load_file

Done = subprocess.CompletedProcess
STAGE = "stage_0_language_model"
STEPS, FAULTY_STEP = 8, 5
FULL = pytest.mark.full
pytestmark = pytest.mark.main


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first stage of the tiny recipe without evaluation, eight steps, a checkpoint every two."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "data").mkdir()
    lines = [json.dumps({"text": "\n".join(f"def f{i}_{j}(x): return x" for j in range(6))}) for i in range(12)]
    (folder / "data" / "documents.jsonl").write_text("\n".join(lines) + "\n")
    whole = changed(("stages.0.data.sources", [{"folder": str(folder / "data")}]), ("stages.0.optim.steps", STEPS))
    (stage,) = whole["stages"][:1]
    stage["batch"]["pools_per_step"] = 6
    stage |= {"eval": {"suites": []}, "save": {"every": 2, "keep": 2}, "export": {"merged": False}}
    stage["guard"] = {"stall_minutes": 0.5, "compare_weights_every": 2}
    (folder / "recipe.json").write_text(json.dumps(whole | {"stages": [stage]}))
    return folder / "recipe.json"


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """The folder of a run on two ranks without a fault."""
    go_on(recipe, recipe.parent / "whole")
    return recipe.parent / "whole"


@pytest.fixture(scope="module")
def whole_of_three(recipe: Path) -> Path:
    go_on(recipe, recipe.parent / "whole_of_three", ranks=3)
    return recipe.parent / "whole_of_three"


def run_with(
    fault: str, recipe: Path, run: Path, ranks: int = 2
) -> tuple[subprocess.CompletedProcess, list[str], float]:
    """A run with a fault: how it ended, what it said but for the launcher's own lines, and its seconds."""
    began = time.monotonic()
    done = launch(WORKERS / "faulty_run.py", ranks, str(recipe), "--output", str(run), timeout=500, FAULT=fault)
    return done, (done.stdout + done.stderr).splitlines(), time.monotonic() - began


def go_on(recipe: Path, run: Path, ranks: int = 2) -> int:
    """The same command without a fault, to the end; the step it started at."""
    done = pooled("launcher/run.py", ranks, str(recipe), "--output", str(run))
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (start,) = re.findall(r"starts at step (\d+)", done.stdout)
    return int(start)


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_same_run(run: Path, whole: Path) -> None:
    """Losses, gradient norms, rows and weights bit for bit, and every step once, also in TensorBoard."""
    kept = ("step", "loss", "grad_norm", "lr", "rows", "tokens")
    assert [[row[key] for key in kept] for row in log(run)] == [[row[key] for key in kept] for row in log(whole)]
    a, b = (load_file(folder / STAGE / "export" / "model.safetensors") for folder in (run, whole))
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
    assert board_steps(run) == list(range(1, STEPS + 1))


def board_steps(run: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    return [event.step for event in board.Scalars("language_model/loss")]


@pytest.mark.parametrize("what", ["warn", pytest.param("terminate", marks=FULL)])
def test_a_rank_that_is_asked_to_stop_saves_first(what: str, recipe: Path, whole: Path, tmp_path: Path) -> None:
    """SIGUSR1 or SIGTERM to one of two: both save at the same step, exit code 4; nothing is lost."""
    done, said, _ = run_with(f"{what} 1 {FAULTY_STEP}", recipe, tmp_path / "run")
    assert done.returncode == 4, said[-20:]
    expected = f"stage language_model: asked to stop (SIGTERM or SIGUSR1), saved at step {FAULTY_STEP}; the same"
    assert [line for line in said if "asked to stop" in line] == [f"{expected} command goes on from there"]
    assert "Traceback" not in "\n".join(said)
    assert go_on(recipe, tmp_path / "run") == FAULTY_STEP
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("stall_reading", r"rank 1 \(.+\): no progress for 0.5 minutes, at step 5, waiting for its rows"),
        pytest.param("stall", r"rank 1 \(.+\): no progress for 0.5 minutes, at step 5, computing", marks=FULL),
        pytest.param(
            "other_rows", r"rank 0 \(.+\), rank 1 \(.+\): have not the same rows, before step 5; ", marks=FULL
        ),
        pytest.param(
            "weights", r"rank 0 \(.+\), rank 1 \(.+\): have not the same weights, before step 6; ", marks=FULL
        ),
    ],
)
def test_a_rank_that_stands_still_or_differs_is_named(
    what: str, expected: str, recipe: Path, whole: Path, tmp_path: Path
) -> None:
    done, said, seconds = run_with(f"{what} 1 {FAULTY_STEP}", recipe, tmp_path / "run")
    assert done.returncode == 5, said[-20:]
    assert len([line for line in said if re.match(expected, line)]) == 1, said[-20:]
    assert seconds < 240 and "Traceback" not in "\n".join(said)
    assert go_on(recipe, tmp_path / "run") == 4
    assert_same_run(tmp_path / "run", whole)


@FULL
@pytest.mark.parametrize(
    ("what", "rank", "step", "saved"),
    [
        ("kill", 1, 5, 4),
        ("kill", 0, 5, 4),
        ("kill_saving", 1, 6, 4),
        ("kill_exporting", 1, 8, 8),
        ("kill_exporting", 0, 8, 8),
        ("freeze", 1, 5, 4),
        ("freeze", 0, 5, 4),
    ],
)
def test_a_rank_that_dies_ends_the_others(
    what: str, rank: int, step: int, saved: int, recipe: Path, whole_of_three: Path, tmp_path: Path
) -> None:
    """In a step, in a save or after all steps; the save before it stays, and the run goes on from there."""
    done, said, _ = run_with(f"{what} {rank} {step}", recipe, tmp_path / "run", ranks=3)
    seconds = time.time() - (tmp_path / "run" / "log.jsonl").stat().st_mtime  # since the last step was logged
    assert done.returncode not in (0, 1), said[-20:]
    named = [line for line in said if re.match(rf"rank {rank} \(.+\): (not heard of for|does not answer)", line)]
    assert named and seconds < 60, (seconds, said[-20:])
    print(f"{what} {rank}: all had ended {seconds:.0f} s after the last step")
    assert go_on(recipe, tmp_path / "run", ranks=3) == saved
    assert_same_run(tmp_path / "run", whole_of_three)


@FULL
def test_other_numbers_of_ranks_go_on(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """Begun on two ranks and asked to stop, taken up on one: equal rows, losses to 1e-5."""
    done, said, _ = run_with(f"warn 0 {FAULTY_STEP}", recipe, tmp_path / "run")
    assert done.returncode == 4, said[-20:]
    assert go_on(recipe, tmp_path / "run", ranks=1) == FAULTY_STEP
    for one, other in zip(log(tmp_path / "run"), log(whole), strict=True):
        assert one["rows"] == other["rows"] and one["step"] == other["step"]
        assert abs(one["loss"] - other["loss"]) < 1e-5 * other["loss"]
