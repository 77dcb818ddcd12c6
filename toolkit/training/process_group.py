"""Joining the process group, under a launcher or alone. Called once by the launcher and by test workers."""

import os
import socket
import time
from contextlib import suppress
from pathlib import Path

import deepspeed
import torch
from torch.utils.cpp_extension import get_default_build_root

from toolkit.collectives import PATIENCE
from toolkit.recipe import RecipeError

LONGEST_COMPILE_SECONDS = 600


def start_distributed() -> torch.device:
    """Join the process group (a group of one without a launcher) and return this rank's device."""
    cuda = torch.cuda.is_available()
    if not any(name in os.environ for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")):
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = _free_port()
    if not cuda:
        check_compiler_locks()
    deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=PATIENCE, verbose=False)
    if not cuda:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def check_compiler_locks() -> None:
    """A killed compile of a DeepSpeed operation leaves a lock on which every later run would wait for ever.

    Raises:
        RecipeError: naming a lock that is older than any compile takes.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        with suppress(FileNotFoundError):  # another rank's compile may end at this moment
            if time.time() - lock.stat().st_mtime > LONGEST_COMPILE_SECONDS:
                raise RecipeError(f"{lock}: was left behind by a compile that was killed; remove this file")


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
