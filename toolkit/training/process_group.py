"""Joining the process group, under a launcher or alone. Called once by the launcher and by test workers."""

import fcntl
import glob
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import distributed
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.utils.cpp_extension import get_default_build_root

from toolkit.collectives import PATIENCE
from toolkit.last_words import OTHER_KEY, notice, store_of_first_rank, tell
from toolkit.recipe import RecipeError
from toolkit.watch import LOST

SECONDS_TO_SAY, SECONDS_TO_ARRIVE = 45, 600
"""After how long missing ranks are named, and given up: nodes with cold disks take minutes to import torch."""
SECONDS_TO_CONNECT = 600
"""For what comes between that and the watch."""
_ARRIVED, _TOLD = "all arrived", "told by another rank"
LONGEST_COMPILE_SECONDS = 120
"""How long a lock is left alone that no process of this machine holds: one of another machine may, in a shared home."""


def start_distributed(check: Callable[[Any], None] | None = None) -> torch.device:
    """Join the process group (a group of one without a launcher) and return this rank's device.

    Args:
        check: called on every rank of several with the store in which they have met, before NCCL or gloo starts.

    Raises:
        RecipeError: if not all ranks are there within SECONDS_TO_ARRIVE.
    """
    cuda = torch.cuda.is_available()
    if not any(name in os.environ for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")):
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = _free_port()
    # where ninja is, which builds DeepSpeed's operations: in a login that pdsh or mpirun makes, .venv is not active
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    if not cuda:
        clear_compiler_locks()
    backend = "nccl" if cuda else "gloo"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with _ended_after(2 * SECONDS_TO_ARRIVE, "the ranks have not met"):
            store, own, ranks = roll_call(), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        with _ended_after(SECONDS_TO_CONNECT, f"{backend} does not connect the ranks"):
            if check is not None:
                check(store)
            device = _own_device()
            distributed.init_process_group(backend, store=store, rank=own, world_size=ranks, timeout=PATIENCE)
            distributed.barrier()
    else:
        device = _own_device()
    deepspeed.init_distributed(backend, timeout=PATIENCE, verbose=False)
    if not cuda:
        _release_shared_memory()
    return device


def _own_device() -> torch.device:
    """This rank's, before NCCL takes the first for all of them."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


@contextmanager
def _ended_after(seconds: float, problem: str) -> Iterator[None]:
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
        RecipeError: with the ranks that have not come, or on the others if they do not find rank 0.
    """
    own, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if own == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # torchrun has opened it
        address, port = place.rsplit(":", 1)
        store = TCPStore(address, int(port), ranks, is_master=True, timeout=PATIENCE, wait_for_workers=False)
    else:
        store, said = store_of_first_rank(SECONDS_TO_SAY), ""
        if store is None:
            said = f"rank {own} ({socket.gethostname()}): finds no rank 0 at {place} for {SECONDS_TO_SAY} s"
            notice(f"{said}; goes on trying for {SECONDS_TO_ARRIVE} s")
            store = store_of_first_rank(SECONDS_TO_ARRIVE)
        if store is None:
            raise RecipeError(
                f"{said}; see that the first node is up, that MASTER_ADDR is its address and that the port is open"
            )
        store.set_timeout(PATIENCE)
    store.set(f"arrived/{own}", socket.gethostname())
    if own == 0:
        store.set(_ARRIVED, _wait_for_all(store, ranks))
    store.wait([_ARRIVED], timedelta(seconds=2 * SECONDS_TO_ARRIVE))
    problem = store.get(_ARRIVED).decode()
    if problem == _TOLD:
        time.sleep(1)  # the store ends with rank 0: the others look first
        os._exit(2)  # as the rank did that has said what is wrong
    if problem:
        raise RecipeError(problem)
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
            if waited > SECONDS_TO_ARRIVE:
                return f"{problem}; see what these nodes say (ssh, .venv, --enable_each_rank_log)"
            if not said:
                notice(f"{problem}; waiting for {SECONDS_TO_ARRIVE} s")
                said = True
        time.sleep(0.2)
    return ""


def _release_shared_memory() -> None:
    """Unlink the 66 MiB a rank that DeepSpeed's CPU collectives share and never unlink, once all have mapped them.

    Every run would leave its part in /dev/shm, which is memory, until the machine restarts.
    """
    distributed.barrier()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{distributed.get_rank()}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def clear_compiler_locks() -> None:
    """Remove the locks of killed compiles of DeepSpeed's operations: every later run would wait on them for ever.

    torch keeps the lock's file open while it compiles, so a lock that no process has open was left behind. Waits for
    one that is younger than LONGEST_COMPILE_SECONDS to be taken away by its owner.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        while _left_behind(lock):
            with (root / "clearing").open("a") as ours:  # one at a time: not the lock of who came before
                fcntl.flock(ours, fcntl.LOCK_EX)
                with suppress(FileNotFoundError):  # its owner was faster
                    if _left_behind(lock) and time.time() - lock.stat().st_mtime > LONGEST_COMPILE_SECONDS:
                        lock.unlink()
            time.sleep(0.2)


def _left_behind(lock: Path) -> bool:
    """Whether the file exists and no process that this user may look into has it open."""
    real = os.path.realpath(lock)
    for opened in glob.iglob("/proc/[0-9]*/fd/*"):
        with suppress(OSError):  # the process has ended, or is another user's
            if os.readlink(opened) == real:
                return False
    return lock.exists()


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
