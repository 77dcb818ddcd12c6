"""Tasks and an engine: requests are handed over as it has room for them, and further ones follow from the answers.

Called by every kind of generation.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from toolkit.generate.requests import Answer, Engine, Request


class Unanswered(Exception):
    """The engine has ended and left requests without an answer; the number of these is the argument."""


class Task(Protocol):
    """What is asked for one item, and what came of it."""

    record: dict[str, Any] | None
    """What is kept of the item, once it is finished; anything JSON can hold, with its id as `id`."""

    def start(self) -> list[Request]:
        """The first requests."""
        ...

    def take(self, answer: Answer) -> list[Request]:
        """Take an answer to one of the requests; returns those that follow from it."""
        ...


def ask(engine: Engine, tasks: Iterable[Task], heard: Callable[[], None] | None = None) -> Iterator[Task]:
    """The tasks as they are finished, in any order; each is begun only when the engine has room for its requests.

    What follows from an answer is asked before new tasks are begun. An engine ends when no request is left to draw;
    what follows from its last answers is asked in another round.

    Args:
        heard: called for every answer, also where no task is finished by it.

    Raises:
        Unanswered: if the engine ended without an answer to some request.
        RecipeError: what the engine raises.
    """
    asked: dict[str, Task] = {}
    further: deque[Request] = deque()
    fresh = iter(tasks)

    def requests() -> Iterator[Request]:
        while True:
            while further:
                yield further.popleft()
            task = next(fresh, None)
            if task is None:
                return
            first = task.start()
            asked.update((request.name, task) for request in first)
            further.extend(first)

    while True:
        for answer in engine.answers(requests()):
            if heard is not None:
                heard()
            task = asked.pop(answer.name)
            following = task.take(answer)
            asked.update((request.name, task) for request in following)
            further.extend(following)
            if task.record is not None:
                yield task
        if len(asked) > len(further):
            raise Unanswered(len(asked) - len(further))
        if not further:
            return
