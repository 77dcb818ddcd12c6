"""A line now and then from work that takes long, so that nobody takes it for dead. Called by what prepares data."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from toolkit.collectives import rank

SECONDS = 20.0  # between two lines


@contextmanager
def telling(seconds: float = SECONDS) -> Iterator[Callable[[str], None]]:
    """Says, every so many seconds on rank 0, what the work in the block is at; the block gives it by calling the value.

    The line comes from a thread: also while the work is in one long operation that lets other threads run.
    """
    begun, text, done = time.monotonic(), "", threading.Event()

    def set_text(new: str) -> None:
        nonlocal text
        text = new

    def tell() -> None:
        while not done.wait(seconds):
            if text:
                print(f"{text} ({time.monotonic() - begun:,.0f} s)", flush=True)

    if rank() != 0:
        yield set_text
        return
    teller = threading.Thread(target=tell, name="telling", daemon=True)
    teller.start()
    try:
        yield set_text
    finally:
        done.set()
        teller.join()
