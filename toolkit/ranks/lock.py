"""One process at a time in a folder. Called on rank 0: by a run for its run folder, by generation for its output."""

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from toolkit.ranks.last_words import notice
from toolkit.recipe.errors import RecipeError

LOCK = ".lock"
SECONDS_TO_FREE = 120
"""How long a file server may keep the lock of a machine that went down."""


def locked(run: Path) -> TextIO:
    """An open file that holds the run folder.

    Raises:
        RecipeError: if a process of this machine holds it, or one of another machine for SECONDS_TO_FREE.
    """
    file = (run / LOCK).open("a+", encoding="utf-8")
    deadline, said = time.monotonic() + SECONDS_TO_FREE, False
    while not _lock(file):
        file.seek(0)
        holder = file.read().strip() or "another run"  # which has not written its name yet
        if holder.endswith(f" on {socket.gethostname()}") or time.monotonic() > deadline:
            raise RecipeError(f"{run}: is in use by {holder}; wait for its end, or end it")
        if not said:
            notice(f"{run}: is in use by {holder}, or was when that machine went down; waits {SECONDS_TO_FREE} s")
            said = True
        time.sleep(0.5)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # a file system without locks
            raise
    return True
