"""The stream of training batches of one rank: plan -> this rank's rows -> batches, read ahead by one thread.

Called by the training loop. Its position is one integer, the optimizer step.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, Protocol, Self

import numpy as np

from toolkit.determinism import batch_digest

_STEPS_AHEAD = 2
_PATIENCE = 0.1  # seconds between two looks at whether the stream was closed


class Plan(Protocol):
    @property
    def pools_per_epoch(self) -> float: ...

    def pool(self, t: int) -> np.ndarray: ...


# (number of the pool, places in the pool, row ids at these places) -> batch
Collate = Callable[[int, np.ndarray, np.ndarray], Any]


class StepData(NamedTuple):
    step: int
    batches: list[Any]  # one per forward of this rank
    rows: np.ndarray  # ids of all ranks' rows [pools, rows], the same on each
    digest: str  # of these


class Stream:
    """StepData for step = start_step .. num_steps - 1; a pure function of the step, so starting late is resuming.

    Pools of step t are numbers t * pools_per_step onwards. Span "world": every pool is a forward, of which this rank
    has the rank-th of world_size equal slices. Span "rank": this rank has the rank-th of world_size equal runs of whole
    pools, a forward each. Use it as a context manager, or close it: its thread ends then.
    """

    def __init__(
        self,
        plan: Plan,
        collate: Collate,
        *,
        pools_per_step: int,
        span: Literal["rank", "world"],
        rank: int,
        world_size: int,
        start_step: int,
        num_steps: int,
    ) -> None:
        """Raises ValueError if the ranks do not divide what they share (the recipe's check says it with the fix)."""
        shared = len(plan.pool(start_step * pools_per_step)) if span == "world" else pools_per_step
        if shared % world_size:
            raise ValueError(f"{world_size} ranks do not divide {shared} {'rows' if span == 'world' else 'pools'}")
        self._plan, self._collate = plan, collate
        self._pools_per_step, self._span, self._rank, self._world_size = pools_per_step, span, rank, world_size
        self._steps = range(start_step, num_steps)
        self._queue: queue.Queue[StepData | BaseException | None] = queue.Queue(_STEPS_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="stream", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[StepData]:
        return self

    def __next__(self) -> StepData:
        """The next step; raises what went wrong in the thread, here."""
        if self._closed.is_set():
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, StepData):
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def step(self, step: int) -> StepData:
        """The data of one step, read at once."""
        first = step * self._pools_per_step
        numbers = np.arange(first, first + self._pools_per_step)
        pools = np.stack([self._plan.pool(int(t)) for t in numbers])  # [pools, rows]
        places = np.arange(pools.shape[1])
        if self._span == "world":
            places = places[self._share(len(places))]
            own = range(len(numbers))
        else:
            own = range(len(numbers))[self._share(len(numbers))]
        batches = [self._collate(int(numbers[i]), places, pools[i][places]) for i in own]
        return StepData(step, batches, pools, batch_digest(pools))

    def _share(self, total: int) -> slice:
        """This rank's equal part of `total` things in a row."""
        each = total // self._world_size
        return slice(self._rank * each, (self._rank + 1) * each)

    def _read_ahead(self) -> None:
        try:
            for step in self._steps:
                if not self._put(self.step(step)):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: StepData | BaseException | None) -> bool:
        """False if the stream was closed before there was room."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=_PATIENCE)
                return True
            except queue.Full:
                continue
        return False
