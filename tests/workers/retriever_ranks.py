"""Each rank loads retrievers by names, in a folder of its own, and reports what it got."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from reported import report

from toolkit.recipe.evaluation import EvalSettings
from toolkit.retrieval.retrievers import load_any


def works(request: Any) -> list[Callable[[], str]]:
    def load(name: str) -> str:
        settings = EvalSettings.model_validate({"pooling": "eos", "normalize": True, "max_tokens": 24})
        load_any(name, None, settings, torch.device("cpu"))
        return "loaded"

    os.chdir(request["places"][dist.get_rank()])
    return [lambda name=name: load(name) for name in request["names"]]


report(works)
