"""Joining the process group, under a launcher or alone. Called once by the launcher and by test workers."""

import fcntl
import glob
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import distributed
from torch.utils.cpp_extension import get_default_build_root

from toolkit.collectives import PATIENCE
from toolkit.ranks.roll_call import SECONDS_TO_ARRIVE, SECONDS_TO_CONNECT, connect, ended_after, opening, roll_call

LONGEST_COMPILE_SECONDS = 120
"""How long a lock is left alone that no process of this machine holds: one of another machine may, in a shared home."""


def start_distributed(check: Callable[[Any], None] | None = None) -> torch.device:
    """Join the process group (a group of one without a launcher) and return this rank's device.

    Args:
        check: called on every rank of several with the store in which they have met, before NCCL or gloo starts.

    Raises:
        RecipeError: if not all ranks are there within SECONDS_TO_ARRIVE, or the port cannot be opened.
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
        with ended_after(2 * SECONDS_TO_ARRIVE, "the ranks have not met"):
            store = roll_call()
        with ended_after(SECONDS_TO_CONNECT, f"{backend} does not connect the ranks"):
            if check is not None:
                check(store)
            device = _own_device()
            connect(store, backend)
            distributed.barrier()
    else:
        device = _own_device()
    with opening(f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"):  # where there is one rank
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
