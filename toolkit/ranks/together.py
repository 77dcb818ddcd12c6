"""Work that one rank does for all: what it cannot read is told by all of them. Called by everything that prepares."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from toolkit.collectives import first_of_any_rank, on_rank_zero, rank
from toolkit.recipe.errors import RecipeError

Store = TypeVar("Store")

SECONDS_BETWEEN = 60.0  # between two signs of rank 0 that it still works
_STILL = "still"


def on_every_rank(work: Callable[[], Any]) -> Any:
    """What `work` returns, on each rank its own; what one of them cannot read is a RecipeError on all of them."""
    result, problem = None, ""
    try:
        result = work()
    except (RecipeError, ValueError, ImportError, OSError) as error:
        problem = str(error) or type(error).__name__
    problem = first_of_any_rank(problem)
    if problem:
        raise RecipeError(problem)
    return result


def together(work: Callable[[], Any]) -> Any:
    """What `work` returns on rank 0, on every rank; what it cannot read or load is a RecipeError on every rank."""
    return _told(on_rank_zero(lambda: _outcome(work)))


def together_for_long(work: Callable[[Callable[[], None]], Any]) -> Any:
    """`together` for work that may take longer than ranks wait: it calls what it is given now and then."""
    last = time.monotonic()

    def still() -> None:
        nonlocal last
        if time.monotonic() - last > SECONDS_BETWEEN:
            last = time.monotonic()
            on_rank_zero(lambda: _STILL)

    def end() -> Any:
        return answer

    def fail() -> Any:
        raise failure

    answer: Any = None
    failure = BaseException()
    if rank() == 0:
        try:
            answer = _outcome(lambda: work(still))
        except BaseException as error:
            failure = error
            on_rank_zero(fail)
    found = on_rank_zero(end)
    while found == _STILL:
        found = on_rank_zero(end)
    return _told(found)


def _outcome(work: Callable[[], Any]) -> list[Any]:
    """What `work` returns, and what went wrong."""
    try:
        return [work(), None]
    except (RecipeError, ValueError, ImportError) as error:
        return [None, str(error)]
    except OSError as error:
        place = error.filename or "the disk"
        return [None, f"{place}: cannot be used ({error.strerror}); mend it, or choose another --output"]


def _told(outcome: list[Any]) -> Any:
    result, problem = outcome
    if problem is not None:
        raise RecipeError(problem)
    return result


def open_everywhere(folder: Path, open_store: Callable[[Path], Store]) -> Store:
    """What rank 0 stored, opened by each rank; a folder that one of them lacks or cannot read is told by all."""

    def read() -> Store:
        try:
            return open_store(folder)
        except FileNotFoundError:
            node = socket.gethostname()
            raise RecipeError(f"{folder} is not on {node}; put the run folder on a disk that all nodes share") from None
        except ValueError as error:
            raise RecipeError(f"{folder}: is damaged ({error}); delete it, and it is made again") from None

    return on_every_rank(read)
