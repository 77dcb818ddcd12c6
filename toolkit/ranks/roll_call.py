"""The ranks of a run find each other, under any launcher: who is missing is said, and another run is not joined.

Called by training (toolkit.ranks.process_group) and by the commands that run on several ranks.
"""

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed import DistNetworkError, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from toolkit.collectives import PATIENCE
from toolkit.ranks.last_words import (
    ARRIVED,
    OTHER_KEY,
    joins,
    listens,
    notice,
    store_of_first_rank,
    tell,
    uses_agent_store,
)
from toolkit.ranks.meeting import cannot_be_opened
from toolkit.ranks.watch import LOST
from toolkit.recipe.errors import RecipeError

SECONDS_TO_SAY, SECONDS_TO_ARRIVE = 45, 600
"""After how long missing ranks are named, and given up: nodes with cold disks take minutes to import torch."""
SECONDS_TO_CONNECT = 600
"""For what comes between that and the watch."""
_TOLD = "told by another rank"


def join_ranks() -> torch.device:
    """Join the process group that a launcher started, if there is one; returns this rank's device.

    Raises:
        RecipeError: see `roll_call`.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with ended_after(2 * SECONDS_TO_ARRIVE, "the ranks have not met"):
            store = roll_call()
        connect(store, "nccl" if cuda else "gloo")
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def connect(store: Any, backend: str) -> None:
    """Make the process group of the ranks that have met in a store."""
    own, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    distributed.init_process_group(backend, store=store, rank=own, world_size=ranks, timeout=PATIENCE)


@contextmanager
def ended_after(seconds: float, problem: str) -> Iterator[None]:
    """End this process, which nobody watches yet, if the block takes longer: a store whose process is frozen keeps its
    clients for ever. Said once on every machine.
    """

    def end() -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            said = f"rank {os.environ['RANK']} ({socket.gethostname()}): {problem} within {seconds:g} s: one is"
            tell(f"{said} stopped, or cut off; see what the other nodes say, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME")
        os._exit(LOST)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def roll_call() -> Any:
    """The store in which the ranks meet, once all are there: who is missing is said within a minute.

    Each rank leaves the name of its host there, as "arrived/<rank>".

    Raises:
        RecipeError: with the ranks that have not come, if rank 0 cannot open the port, or on the others if they do not
            find rank 0, or another run in its place.
    """
    own, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if own > 0 or uses_agent_store():
        store = _found(own, address, port)
    else:
        with opening(f"{address}:{port}"):
            store = TCPStore(address, port, ranks, is_master=True, timeout=PATIENCE, wait_for_workers=False)
    joins()
    store.set(f"arrived/{own}", socket.gethostname())
    if own == 0:
        store.set(ARRIVED, _wait_for_all(store, ranks))
    store.wait([ARRIVED], timedelta(seconds=2 * SECONDS_TO_ARRIVE))
    problem = store.get(ARRIVED).decode()
    if problem == _TOLD:
        time.sleep(1)  # the store ends with rank 0: the others look first
        os._exit(2)  # as the rank did that has said what is wrong
    if problem:
        raise RecipeError(problem)
    return store


@contextmanager
def opening(place: str) -> Iterator[None]:
    """RecipeError where torch cannot open the port of this place."""
    try:
        yield
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error) and "EACCES" not in str(error):
            raise
        raise RecipeError(cannot_be_opened(place, str(error))) from None


def _found(own: int, address: str, port: int) -> Any:
    """The store that rank 0 has opened."""
    store, place = store_of_first_rank(SECONDS_TO_SAY), f"{address}:{port}"
    said = f"rank {own} ({socket.gethostname()}): finds no rank 0 at {place} for {SECONDS_TO_SAY} s"
    if store is None:
        answers = listens(address, port)  # another program, or rank 0 just now
        if not answers:
            notice(f"{said}; goes on trying for {SECONDS_TO_ARRIVE} s")
        store = store_of_first_rank(0 if answers else SECONDS_TO_ARRIVE)
    if store is None:
        advice = "see that the first node is up, that MASTER_ADDR is its address and that the port is open"
        raise RecipeError(cannot_be_opened(place, "EADDRINUSE") if listens(address, port) else f"{said}; {advice}")
    store.set_timeout(PATIENCE)
    return store


def _wait_for_all(store: Any, ranks: int) -> str:
    """Why the run ends here; empty once all ranks are there."""
    began, said = time.monotonic(), False
    while missing := [rank for rank in range(ranks) if not store.check([f"arrived/{rank}"])]:
        if store.check([OTHER_KEY]):
            return _TOLD
        waited = time.monotonic() - began
        if waited > SECONDS_TO_SAY:
            there = Counter(store.get(f"arrived/{r}").decode() for r in range(ranks) if r not in missing)
            hosts = ", ".join(f"{host} ({count})" for host, count in there.items())
            named = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            problem = f"{len(missing)} of {ranks} ranks have not come for {waited:.0f} s: {named}; there are {hosts}"
            if said and waited > SECONDS_TO_ARRIVE:
                return f"{problem}; see what these nodes say (ssh, .venv, --enable_each_rank_log)"
            if not said:
                notice(f"{problem}; waiting for {SECONDS_TO_ARRIVE} s")
                said = True
        time.sleep(0.2)
    return ""
