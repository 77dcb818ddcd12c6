"""Work that one rank does for all: what it cannot read is told by all of them. Called by everything that prepares."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from toolkit.collectives import first_of_any_rank, on_rank_zero
from toolkit.recipe.errors import RecipeError

Store = TypeVar("Store")


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

    def outcome() -> list[Any]:
        try:
            return [work(), None]
        except (RecipeError, ValueError, ImportError) as error:
            return [None, str(error)]
        except OSError as error:
            place = error.filename or "the disk"
            return [None, f"{place}: cannot be used ({error.strerror}); mend it, or choose another --output"]

    result, problem = on_rank_zero(outcome)
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
