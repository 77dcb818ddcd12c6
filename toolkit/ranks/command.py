"""How a command that runs on several ranks ends. Called by eval.run and toolkit.mine."""

import os
import time
from collections.abc import Callable

from toolkit.collectives import RankZeroFailed
from toolkit.ranks.last_words import SECONDS_TO_SPEAK, is_told_by_another, say
from toolkit.ranks.meeting import check_place
from toolkit.ranks.mpi import adopt_mpi_ranks
from toolkit.recipe.errors import RecipeError


def exit_code(work: Callable[[], None]) -> int:
    """0 once `work` is done, or 2 after one line that says what is wrong, told by one rank."""
    try:
        adopt_mpi_ranks()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            check_place()
        work()
    except RankZeroFailed:  # rank 0 says why; the launcher ends it when this rank ends
        time.sleep(SECONDS_TO_SPEAK)
        return 2
    except (RecipeError, ValueError, ImportError, OSError) as error:
        say(f"error: {_line(error)}")
        return 2
    except Exception:
        if is_told_by_another():
            os._exit(2)  # as that rank did: the process group is broken
        raise
    return 0


def _line(error: Exception) -> str:
    """What went wrong; the path first where the file system refused something."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; mend it, or name another place"
    return str(error)
