"""Whether every rank of a run is alive and gets on: a thread on each rank tells rank 0 where it is, and rank 0 judges.

Called by the launcher around a run. The ranks meet in the store through which torch.distributed found them: no further
port. A rank that died or stands still ends the run on all ranks, within a minute, with its name; nothing is saved then.
"""

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

from torch import distributed

from toolkit import slicing
from toolkit.collectives import barrier, rank, world_size
from toolkit.ranks.last_words import (
    KEY,
    OTHER_KEY,
    WAIT_SECONDS,
    is_told_by_another,
    judged_within,
    store_of_first_rank,
    tell,
)

LOST = 5
"""Exit code of a run that lost a rank, or whose ranks went different ways; the same command goes on."""
BEAT_SECONDS = 2.0
DEAD_SECONDS, TROUBLED_SECONDS, UNHEARD_SECONDS = 20.0, 8.0, 25.0
"""After how long a rank that is not heard of is taken for dead; the second once a collective operation has failed, the
third where it never was heard of.

Where a rank has died the deepspeed launcher kills the others of its node 30 s later: one must have spoken by then.
"""
ASLEEP_SECONDS = 5 * BEAT_SECONDS
"""A thread that did not come round for so long slept, and cannot tell how long others were silent."""
_VERDICT = "watch/verdict"
PHASES = ("waiting for its rows", "comparing them with the other ranks'", "computing", "logging")
WAITING, COMPARING, COMPUTING, LOGGING = PHASES
PACKAGE = str(Path(__file__).parent)


class Status(NamedTuple):
    """What a rank says of itself; its clock is not needed."""

    beat: int = 0
    step: int = 0
    phase: str = ""
    slices: int = 0  # run so far, by which ranks within one step can be told apart
    limit: float = 0.0  # seconds that this phase may take; 0: any number
    where: str = ""  # the line of this package that runs
    troubled: bool = False

    @property
    def progress(self) -> tuple[int, int, int]:
        return self.step, PHASES.index(self.phase) if self.phase in PHASES else 0, self.slices


class Seen(NamedTuple):
    """The last status of a rank, and when (by rank 0's clock) its beat and its progress changed."""

    status: Status
    beat_at: float
    moved_at: float


def seen_now(before: Seen | None, status: Status, now: float) -> Seen:
    if before is None:
        return Seen(status, now, now)
    moved = (status.progress, status.phase) != (before.status.progress, before.status.phase)
    return Seen(
        status,
        now if status.beat != before.status.beat else before.beat_at,
        now if moved or not status.limit else before.moved_at,
    )


def verdict(ranks: list[Seen], hosts: list[str], now: float) -> str:
    """Which rank is dead or stands still, in one line; empty if none is."""
    patience = TROUBLED_SECONDS if any(seen.status.troubled for seen in ranks) else DEAD_SECONDS
    silent = [now - seen.beat_at for seen in ranks]
    lost = [r for r, seen in enumerate(ranks) if silent[r] > (patience if seen.status.beat else UNHEARD_SECONDS)]
    if lost:
        said = f"{_names(lost, hosts)}: not heard of for {silent[lost[0]]:.0f} s: killed, stopped, or its machine is"
        return f"{said} down or cut off; last seen {_place(ranks[lost[0]].status)}; {_ADVICE}"
    if not any(seen.status.limit and now - seen.moved_at > seen.status.limit for seen in ranks):
        return ""
    least = min(seen.status.progress for seen in ranks)  # the others wait for it, and may have been seen to move before
    behind = [r for r, seen in enumerate(ranks) if seen.status.progress == least]
    if not all(ranks[r].status.limit for r in behind):
        return ""
    status = ranks[behind[0]].status
    said = f"{_names(behind, hosts)}: no progress for {status.limit / 60:g} minutes, {_place(status)}"
    return f"{said}; raise guard.stall_minutes if it needs longer; {_ADVICE}"


_ADVICE = "the same command goes on from the last checkpoint, if there is one"


def _names(ranks: list[int], hosts: list[str]) -> str:
    named = ", ".join(f"rank {r} ({hosts[r]})" for r in ranks[:4])
    return named + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")


def _place(status: Status) -> str:
    doing = f"at step {status.step}, {status.phase}" if status.phase else "between steps"
    return f"{doing} ({status.where})" if status.where else doing


class Diverged(Exception):
    """The ranks went different ways; says in one line which, in what."""


class Watch:
    """Use it as a context manager around all that a run does on several ranks; alone, a process watches itself."""

    def __init__(self) -> None:
        self._status = Status()  # the main thread's to change, as is the next
        self._troubled = False
        self._beats = 0
        self._own = self._status  # as last said
        self._answered = self._judged = time.monotonic()  # when the store last did; when rank 0 last looked
        self._ended = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._beat, name="watch", daemon=True)
        self._store: Any = None
        self.hosts = [socket.gethostname()]
        if world_size() > 1:
            self._store = store_of_first_rank(WAIT_SECONDS)
            if self._store is None:
                raise RuntimeError(f"rank {rank()} no longer finds the store of rank 0")
            arrived = [f"arrived/{r}" for r in range(world_size())]  # by toolkit.ranks.process_group
            self.hosts = [host.decode() for host in self._store.multi_get(arrived)]
            for r in range(world_size() if rank() == 0 else 0):
                self._store.compare_set(f"watch/{r}", "", json.dumps(Status()))  # unless it has spoken already
        self._seen: list[Seen | None] = [None] * world_size()

    def at(self, step: int, phase: str, minutes: float) -> None:
        """The main thread begins a phase of a step, which may take so many minutes (0: any number)."""
        self._status = Status(step=step, phase=phase, limit=60 * minutes)

    def leave_steps(self) -> None:
        """What follows is no longer counted as standing still."""
        self._status = Status(step=self._status.step)

    def __enter__(self) -> Self:
        self._say()
        self._answered = time.monotonic()
        self._thread.start()
        if self._store is not None:
            judged_within(DEAD_SECONDS + 2 * BEAT_SECONDS)
        if rank() != 0:
            threading.Thread(target=self._listen, name="listen", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError) and _is_of_a_collective(error) and not is_told_by_another():
            self._troubled = True
            self._thread.join(3 * TROUBLED_SECONDS)  # a rank that died is named, and this process ends there
        self._ended.set()
        self._thread.join()
        if error is None:
            barrier()  # rank 0 takes the store with it

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                self._say()
                if rank() == 0:
                    self._judge()
                elif self._store is not None:
                    self._follow()
                self._answered = time.monotonic()
            except RuntimeError as error:  # the store is gone, and rank 0 with it
                if self._ended.wait(BEAT_SECONDS):
                    return
                if rank() == 0:
                    reason = " ".join(str(error).split())[:200]
                    tell(f"rank 0 ({self.hosts[0]}): can no longer watch the others: {reason}")
                    os._exit(LOST)
                self._first_rank_is_gone()

    def _follow(self) -> None:
        """End with the others: after rank 0's verdict, or after what another rank, or rank 0, has said."""
        if self._store.check([_VERDICT]):
            os._exit(LOST)
        told = self._store.check([OTHER_KEY]) or self._store.check([KEY])
        if told and not self._ended.wait(3 * BEAT_SECONDS):  # this rank does not know it by itself
            os._exit(2)

    def _listen(self) -> None:
        """Beside `_beat`, which waits for ever where rank 0 is frozen: the store's own timeouts do, too."""
        looked = time.monotonic()
        while not self._ended.wait(BEAT_SECONDS):
            looked, before = time.monotonic(), looked
            if looked - before > ASLEEP_SECONDS:
                self._answered = looked
            if looked - self._answered > DEAD_SECONDS:
                self._first_rank_is_gone()

    def _say(self) -> None:
        self._beats += 1
        self._own = self._status._replace(
            beat=self._beats,
            slices=slicing.slices_run,
            where=_line(sys._current_frames().get(self._main or 0)),
            troubled=self._troubled,
        )
        if self._store is not None:
            self._store.set(f"watch/{rank()}", json.dumps(self._own))

    def _judge(self) -> None:
        now, before = time.monotonic(), self._judged
        self._judged = now
        keys = [f"watch/{r}" for r in range(world_size())]
        said = [Status(*json.loads(text)) for text in self._store.multi_get(keys)] if self._store else [self._own]
        self._seen = [seen_now(before, status, now) for before, status in zip(self._seen, said, strict=True)]
        if now - before > ASLEEP_SECONDS:  # the whole job was suspended, or this process had no time: count anew
            self._seen = [seen and seen._replace(beat_at=now, moved_at=now) for seen in self._seen]
        if self._store is not None and self._store.check([OTHER_KEY]):
            os._exit(2)  # as the rank did that has said what is wrong
        problem = verdict([seen for seen in self._seen if seen is not None], self.hosts, now)
        if problem:
            tell(f"\n{problem}")  # a progress bar may stand on the line
            if self._store is not None:
                self._store.set(_VERDICT, problem)
                time.sleep(2 * BEAT_SECONDS)  # the store ends with this process: the others look first
            os._exit(LOST)

    def _first_rank_is_gone(self) -> None:
        """Said once on every machine, by the rank that is first to take a name there."""
        with socket.socket(socket.AF_UNIX) as name:
            with suppress(OSError):  # another rank has it, for as long as it lives
                name.bind(f"\0toolkit {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")
                said = f"rank 0 ({self.hosts[0]}): does not answer rank {rank()} ({self.hosts[rank()]}), which is"
                tell(f"\n{said} {_place(self._own)}: killed, stopped, or its machine is down or cut off; {_ADVICE}")
                time.sleep(2 * BEAT_SECONDS)  # until the others have noticed, too
            os._exit(LOST)


def _line(frame: FrameType | None) -> str:
    """The innermost line of this package in a stack."""
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


def _is_of_a_collective(error: RuntimeError) -> bool:
    """Whether another rank may be the cause: errors of NCCL have types of their own, gloo's name it."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error).lower()
