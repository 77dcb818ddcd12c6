"""Every rank asks a model of its own for its share of the requests, and reports the answers."""

from collections.abc import Callable
from typing import Any

import torch
from reported import report

from toolkit.collectives import rank, world_size
from toolkit.generate.local_model import local_engine
from toolkit.generate.requests import Request, Sampling


def works(request: Any) -> list[Callable[[], Any]]:
    engine = local_engine(request["model"], Sampling(*request["sampling"]), torch.device("cpu"))
    share = [Request(*one) for one in request["requests"]][rank() :: world_size()]
    return [lambda: list(engine.answers(share))]


report(works)
