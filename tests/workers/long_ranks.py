"""Each rank waits for work of rank 0 that tells it now and then that it goes on, and reports what it got."""

from collections.abc import Callable
from typing import Any

from reported import report

from toolkit.collectives import RankZeroFailed, rank
from toolkit.ranks import together
from toolkit.recipe.errors import RecipeError

together.SECONDS_BETWEEN = -1.0  # every sign is passed on


def works(request: Any) -> list[Callable[[], Any]]:
    called: list[int] = []

    def done(still: Callable[[], None]) -> list[int]:
        for number in range(request["signs"]):
            still()
            called.append(number)
        return called

    def refused(still: Callable[[], None]) -> None:
        still()
        raise ValueError("no")

    def broken(still: Callable[[], None]) -> None:
        still()
        raise KeyError("broken")

    def told() -> str:
        try:
            together.together_for_long(broken)
        except (KeyError, RankZeroFailed) as error:
            raise RecipeError(type(error).__name__) from None
        return "nothing"

    return [
        lambda: together.together_for_long(done),
        lambda: together.together_for_long(refused),
        told,
        lambda: [together.together(lambda: "after"), rank(), len(called)],
    ]


report(works)
