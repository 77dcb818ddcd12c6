"""The command toolkit.generate with an engine of the test on every rank; see tests/generate/test_passages_ranks.py.

An argument --fail makes rank 1 fail at its third request; the others are the command's.
"""

import sys
from pathlib import Path

from scripted_engine import ScriptedEngine, right

from toolkit.collectives import rank
from toolkit.generate import order, passages
from toolkit.generate.__main__ import main
from toolkit.generate.requests import Request
from toolkit.ranks import last_words
from toolkit.recipe.errors import RecipeError

arguments = [argument for argument in sys.argv[1:] if argument != "--fail"]
fails = len(arguments) + 1 < len(sys.argv)
asked: list[str] = []


def answer(request: Request) -> str:
    asked.append(request.name)
    if fails and rank() == 1 and len(asked) == 3:
        raise RecipeError("the device of this rank is gone; look after it")
    with Path(arguments[arguments.index("--output") + 1] + f".asked_{rank()}").open("a") as file:
        file.write(request.name.split("/")[0] + "\n")
    return right(request)


order.RESAMPLES = 99
last_words.WAIT_SECONDS = 1
passages.open_engine = lambda *_: ScriptedEngine(answer)
last_words.end(main(arguments))
