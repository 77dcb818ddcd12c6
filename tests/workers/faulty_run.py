"""launcher/run.py in which one rank does something at one step: FAULT="<what> <rank> <step>". For tests/faults."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from launcher import run
from toolkit.checkpoint import states as checkpoint
from toolkit.collectives import rank
from toolkit.data.stream import StepData, Stream
from toolkit.ranks import last_words
from toolkit.training import loop

WHAT, RANK, STEP = os.environ["FAULT"].split()
SIGNALS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "warn": signal.SIGUSR1, "terminate": signal.SIGTERM}
read, train_step, seal, live_vectors = Stream.__next__, loop.train_step, checkpoint._seal, loop.live_vectors


def next_step(stream: Stream) -> StepData:
    """Reads other rows, or for ever."""
    data = read(stream)
    if _is_now(data.step):
        if WHAT == "other_rows":
            return data._replace(digest="0" * 16)
        if WHAT == "stall_reading":
            time.sleep(3600)
    return data


def faulty_step(engine: Any, stage: Any, batches: Any, step: int, *rest: Any) -> dict[str, float]:
    if _is_now(step):
        if WHAT in SIGNALS:
            os.kill(os.getpid(), SIGNALS[WHAT])
            time.sleep(0.3)  # until the thread has it
        elif WHAT == "stall":
            time.sleep(3600)
    values = train_step(engine, stage, batches, step, *rest)
    if _is_now(step) and WHAT == "weights":  # before it they would be made anew from the fp32 ones
        next(p for p in engine.module.parameters() if p.requires_grad).data.mul_(1.01)
    return values


def faulty_seal(aside: Path, files: list[Path]) -> None:
    """The other ranks have written their files by then, or are about to."""
    if WHAT == "kill_saving" and rank() == int(RANK) and aside.name.endswith(f"{int(STEP):08d}"):
        os.kill(os.getpid(), signal.SIGKILL)
    seal(aside, files)


def faulty_export(*of: Any) -> Any:
    """After the steps, the last of which is saved."""
    if WHAT == "kill_exporting" and rank() == int(RANK):
        os.kill(os.getpid(), signal.SIGKILL)
    return live_vectors(*of)


def _is_now(step: int) -> bool:
    return rank() == int(RANK) and step + 1 == int(STEP)


Stream.__next__ = next_step
checkpoint._seal = faulty_seal
loop.live_vectors = faulty_export  # pyright: ignore[reportAttributeAccessIssue]
loop.train_step = faulty_step  # pyright: ignore[reportAttributeAccessIssue]
last_words.end_at_signals()
last_words.end(run.main())
