"""launcher/run.py with a training loop that fails on the ranks named by FAILING, or on all of them."""

import os

from launcher import run
from toolkit.collectives import barrier, rank
from toolkit.ranks import last_words
from toolkit.training import loop

FAILING = [int(number) for number in os.environ["FAILING"].split()]


def train_stage(*_: object) -> None:
    if rank() in FAILING:
        raise ValueError("the model is damaged")
    barrier()  # as any collective of a step: waits for the others


loop.train_stage = train_stage  # pyright: ignore[reportAttributeAccessIssue]
last_words.WAIT_SECONDS = 3  # pyright: ignore[reportConstantRedefinition]
last_words.end(run.main())
