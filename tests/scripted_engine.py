"""An engine in the test's own process: its answers are a function of the request. Used by the tests of generation."""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from toolkit.generate.requests import Answer, Request

WORDS = ("amber", "basalt", "cedar", "delta", "ember", "fjord", "granite", "harbor", "island", "kelp", "lagoon")


def passage(query_id: str, grade: int, attempt: int = 0) -> str:
    """A passage that the gate lets through, different from those of other grades, queries and attempts."""
    drawn = random.Random(f"{query_id} {grade} {attempt}")
    return f"{query_id} level {'abcd'[grade]} " + " ".join(
        f"{drawn.choice(WORDS)}{drawn.randrange(1000)}" for _ in range(12 + grade)
    )


def right(request: Request) -> str:
    """The answer of a model that does as it is told, in both forms."""
    query_id, what, attempt = request.name.rsplit("/", 2)
    if what == "all":
        return json.dumps({f"grade_{grade}": passage(query_id, grade, int(attempt)) for grade in (3, 2, 1, 0)})
    return passage(query_id, int(what), int(attempt))


class ScriptedEngine:
    """Holds `room` requests at a time and answers the one that came last."""

    def __init__(
        self, answer: Callable[[Request], str | Answer] = right, model: str = "scripted", room: int = 3
    ) -> None:
        self.asked: list[Request] = []
        self._answer, self._model, self._room = answer, model, room

    def describe(self) -> dict[str, Any]:
        return {"engine": "scripted", "model": self._model}

    def answers(self, requests: Iterable[Request]) -> Iterator[Answer]:
        drawn, held = iter(requests), list[Request]()
        while True:
            while len(held) < self._room and (request := next(drawn, None)) is not None:
                self.asked.append(request)
                held.append(request)
            if not held:
                return
            yield self._reply(held.pop())

    def _reply(self, request: Request) -> Answer:
        reply = self._answer(request)
        if isinstance(reply, Answer):
            return reply
        return Answer(request.name, reply, False, len(request.system + request.user) // 4, len(reply) // 4)
