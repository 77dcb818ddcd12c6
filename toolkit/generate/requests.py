"""What is asked of a language model and what it answers, whichever engine carries it.

Whoever asks draws requests, takes answers as they come and keeps each before it takes the next: an engine may be killed
at any moment. An engine knows nothing of ranks and needs no other rank while it answers. Where several run one model
each, every rank asks its own engine for its share, and keeps the answers in a file of its own.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol


class Request(NamedTuple):
    """One chat of a system text and a user text."""

    name: str  # unique in a run
    system: str  # may be empty
    user: str
    schema: dict[str, Any] | None  # JSON schema of the answer, for engines that can hold a model to it; None: free text
    seed: int  # of the sampling, for engines that take one


class Sampling(NamedTuple):
    """How every answer is drawn."""

    max_tokens: int  # of an answer
    temperature: float  # 0: the likeliest token each time
    top_p: float


class Answer(NamedTuple):
    """What came back for a request."""

    name: str  # of the request
    text: str
    cut: bool  # it ended at max_tokens
    prompt_tokens: int
    tokens: int  # of the answer
    failed: str = ""  # why there is none, in one line: this request alone is at fault (too long, refused); else ""


class Engine(Protocol):
    """Whatever answers chats. A fault of the engine itself (not reachable, unknown model, no key) is a RecipeError."""

    def describe(self) -> dict[str, Any]:
        """What generated.json keeps: the engine, the model asked for, and what it says it is.

        Always with the keys "engine" and "model"; after the answers it may say more than before.
        """
        ...

    def answers(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """Answers as they come, in any order, each once; requests are drawn as there is room for them.

        All requests are answered, but for those that batch files leave to the next start.
        """
        ...
