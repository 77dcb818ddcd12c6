"""When requests that fail one by one are a fault of the whole run: the model's context is too short for all of them.

Called by the engines, around what they answer.
"""

import re
from collections.abc import Generator, Iterator
from contextlib import closing

from toolkit.generate.requests import Answer
from toolkit.recipe.errors import RecipeError

TOO_LONG = "too long for the model's context"
"""How `failed` begins where prompt and answer together do not fit."""
IN_A_ROW = 20
"""So many failures before the first success end the run: nobody wants to learn after 500,000 queries that none fits."""
SHORTER = "lower --max-tokens, use a template or examples of fewer words, or give the model a longer context"

_CONTEXT = re.compile(r"context.?(length|size|window)|longer than the model|max_tokens must be at least 1", re.I)


def is_too_long(text: str) -> bool:
    """Whether a server's error says that prompt and answer do not fit into the context."""
    return _CONTEXT.search(text) is not None


class FirstFailures:
    """Holds failed answers back until the first good one; an engine keeps one for all that it answers."""

    def __init__(self, where: str, succeeded: bool) -> None:
        """`where` names the engine at the beginning of an error; `succeeded`: an earlier start had a good answer."""
        self._where, self._succeeded = where, succeeded

    def passed_on(self, answers: Generator[Answer]) -> Iterator[Answer]:
        """The same answers.

        Raises:
            RecipeError: once IN_A_ROW failed before the first success, or if all there were failed.
        """
        held: list[Answer] = []
        with closing(answers):  # at once, if whoever takes them stops
            for answer in answers:
                if answer.failed and not self._succeeded:
                    held.append(answer)
                    if len(held) >= IN_A_ROW:
                        raise self._error(held)
                    continue
                self._succeeded = True
                yield from (*held, answer)
                held = []
        if held:
            raise self._error(held)

    def _error(self, held: list[Answer]) -> RecipeError:
        reason = held[0].failed
        fix = SHORTER if reason.startswith(TOO_LONG) else "mend what it says; what was finished is kept"
        return RecipeError(f"{self._where}: not one of {len(held)} requests is answered; the first: {reason}; {fix}")
