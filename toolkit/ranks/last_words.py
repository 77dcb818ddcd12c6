"""What ends a run is said once: by rank 0, or by the one rank that knows it; and what signals do to it.

Called by the command lines. torch is imported only to ask another rank: mistakes in a recipe are answered before.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, NoReturn

WAIT_SECONDS = 20
"""How long a rank waits for rank 0 to meet the same problem before it speaks itself."""
SECONDS_TO_SPEAK = 3
"""How long the other ranks stay when rank 0 is about to say what ends the run: its launcher ends it when they end."""
STOPPED = 4
"""Exit code after SIGTERM or SIGUSR1: what can be saved is saved, and the same command goes on."""
KEY, OTHER_KEY = "last words of rank 0", "last words of another rank"
ARRIVED = "all arrived"
"""The key under which rank 0 says that all ranks have met: nothing, or what ends the run."""
_RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # as launchers call it
_PAUSE, _SECONDS_TO_LOOK = 0.2, 1.0
_told = threading.Event()  # this process has said why it ends
_joined = threading.Event()  # this process has met the others of its run
_asked: list[int] = []  # the signals that wait for the end of a step
_in_steps = threading.Event()
_verdict_seconds = 0.0  # see judged_within


class Interrupted(Exception):
    """The run was asked to stop, and has saved where it is; says so in one line."""


def is_first_rank() -> bool:
    """True on the rank that speaks; known from the launcher's variables, before anything is imported."""
    return all(os.environ.get(name, "0") == "0" for name in _RANK)


def say(problem: str) -> None:
    """Print the problem that ends this rank, once for all ranks that have it: on rank 0, to stderr.

    A rank whose problem rank 0 does not meet within WAIT_SECONDS prints it as "rank k: ..." and ends its process with
    exit code 2: the launcher then ends the others, who may wait for it in a collective and say nothing for hours.
    Where rank 0 cannot be asked, the first rank of each machine prints it.
    """
    if is_first_rank():
        tell(problem)
        if store := store_of_first_rank(0):
            store.set(KEY, problem)
            time.sleep(_SECONDS_TO_LOOK)  # the store ends with this process: the others look first
    elif store := store_of_first_rank(WAIT_SECONDS):
        _tell_alone(problem, store)
    elif os.environ.get("LOCAL_RANK", "0") == "0":  # rank 0 has not come, or has said it and gone
        _tell_as_rank(problem, f" ({socket.gethostname()})")
    else:
        time.sleep(SECONDS_TO_SPEAK)


def _tell_alone(problem: str, store: Any) -> None:
    """`say` on another rank; of those with the same problem one speaks. Returns if rank 0 said it or is gone."""
    from torch.distributed import DistError  # torch-free start: a command that ends at once needs none

    deadline = time.monotonic() + WAIT_SECONDS
    try:
        while not store.check([KEY]) and time.monotonic() < deadline:
            time.sleep(_PAUSE)
        if store.check([KEY]) and store.get(KEY).decode() == problem:
            return
        if store.add(problem, 1) == 1:
            _tell_as_rank(problem)
        store.set(OTHER_KEY, "")
    except DistError:
        return
    os._exit(2)  # taking the process group down may need the others


def _tell_as_rank(problem: str, where: str = "") -> None:
    rank = next(value for name in _RANK if (value := os.environ.get(name, "0")) != "0")
    tell("\n".join(f"rank {rank}{where}: {line}" for line in problem.splitlines()))


def end(code: int) -> NoReturn:
    """Leave the process group and end, all output written, without Python's teardown.

    In that, gloo's threads now and then abort a process that is done ("terminate called without an active exception").
    """
    distributed = sys.modules.get("torch.distributed")  # imported only if the recipe was valid
    if distributed is not None and distributed.is_initialized() and code != 1:  # after a crash the others may be gone
        distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def tell(text: str) -> None:
    """Say why this process ends."""
    _told.set()
    notice(text)


def notice(text: str) -> None:
    sys.stderr.write(text + "\n")  # at one go: other processes write to the same terminal
    sys.stderr.flush()


def is_told_by_another() -> bool:
    """True where a rank other than 0 has said what ends the run: an exception met here since is only its echo."""
    from torch.distributed import DistError  # torch-free start: a command that ends at once needs none

    try:
        store = store_of_first_rank(0)
        return store is not None and store.check([OTHER_KEY])
    except DistError:
        return False


def joins() -> None:
    """From now on what is at MASTER_ADDR and MASTER_PORT is this run's."""
    _joined.set()


def has_joined() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return _joined.is_set() or (distributed is not None and distributed.is_initialized())


def uses_agent_store() -> bool:
    """True under torchrun, whose own process opens the port."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def is_port(text: str) -> bool:
    return text.isdecimal() and 0 < int(text) < 2**16


def store_of_first_rank(seconds: float) -> Any:
    """A client of the store in which the ranks find each other; None if it is not there within so many seconds.

    Also None if it is another run's, which ended if anything were written there: before rank 0 has opened its own, and
    where all ranks have met without this one, or one in its place.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not address or not is_port(port):
        return None
    if is_first_rank() and not has_joined() and not uses_agent_store():
        return None
    deadline = time.monotonic() + seconds
    while (store := _client(address, int(port))) is None and time.monotonic() < deadline:
        time.sleep(_PAUSE)
    return store


def _client(address: str, port: int) -> Any:
    if not listens(address, port):
        return None
    # torch-free start: where no rank listens, none is needed
    from torch.distributed import DistError, TCPStore  # pyright: ignore[reportPrivateImportUsage]

    try:
        with nullcontext() if has_joined() else _unheard():
            store = TCPStore(address, port, timeout=timedelta(seconds=WAIT_SECONDS), wait_for_workers=False)
        return None if _is_of_another_run(store) else store
    except DistError:
        return None


@contextmanager
def _unheard() -> Iterator[None]:
    """What is written to stderr goes nowhere: torch's client fills a page at every try with a program of other kind."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _is_of_another_run(store: Any) -> bool:
    if has_joined() or uses_agent_store():
        return False
    own = next(value for name in _RANK if (value := os.environ.get(name, "0")) != "0")
    return store.check([f"arrived/{own}"]) or (store.check([ARRIVED]) and not store.get(ARRIVED))


def listens(address: str, port: int) -> bool:
    """Whether anybody does; the store's own client would log every try."""
    try:
        socket.create_connection((address, port), timeout=2).close()
        return True
    except OSError:
        return False


def end_at_signals() -> None:
    """From now on signals end the process: SIGINT at once (exit code 130), SIGTERM and SIGUSR1 with code STOPPED, at
    once too (but see judged_within) or, within `steps`, when the step is done and saved.

    A thread does it, since the main thread may be waiting for another rank, and since the deepspeed launcher sends
    SIGTERM right behind a Ctrl-C. What was being written counts as unwritten, as after any crash.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)  # in the main thread; the number has gone down the pipe before
    threading.Thread(target=_obey, args=(reading,), name="signals", daemon=True).start()


def judged_within(seconds: float) -> None:
    """From now on somebody finds out within so many seconds that another rank died. The deepspeed launcher then sends
    SIGTERM, so outside `steps` this process ends so much later, unless who has found it ends it before.
    """
    global _verdict_seconds
    _verdict_seconds = seconds


@contextmanager
def steps() -> Iterator[Callable[[], bool]]:
    """The steps of a stage: until it ends, SIGTERM and SIGUSR1 only make the function that it gives true.

    Also after an error, which is to be told first: the launcher sends SIGTERM as soon as another rank has ended.
    """
    _in_steps.set()
    yield lambda: bool(_asked)  # no finally: see above
    _in_steps.clear()
    if _asked:  # after the last step, which is saved
        _end_outside_steps(_asked[0])


def _obey(reading: int) -> None:
    while True:
        number = os.read(reading, 1)[0]
        if number == signal.SIGINT:
            _end_at(number)
        if not _in_steps.is_set():
            _end_outside_steps(number)
        _asked.append(number)


def _end_outside_steps(number: int) -> None:
    if number == signal.SIGUSR1 or _verdict_seconds == 0:
        _end_at(number)
    rank = os.environ["RANK"]
    notice(f"\nrank {rank}: SIGTERM; ends in {_verdict_seconds:g} s, or when another is found dead")
    threading.Timer(_verdict_seconds, _end_at, (number,)).start()


def _end_at(number: int) -> NoReturn:
    if is_first_rank() and not _told.is_set():
        name = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
        tell(f"\n{name}; the same command goes on from the last checkpoint, if there is one")
    os._exit(128 + number if number == signal.SIGINT else STOPPED)
