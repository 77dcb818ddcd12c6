"""Evaluate BM25 on a suite that the last rank finds damaged, then on one that it cannot read; every rank reports."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from reported import report

from eval import evaluate as evaluation
from eval.tasks import Task


def works(request: Any) -> list[Callable[[], Any]]:
    last = dist.get_rank() == dist.get_world_size() - 1

    def unreadable(name: str) -> Iterable[Task]:
        if last:
            raise ValueError(f"{name}: cannot be read")
        return read(name)

    def evaluate(suite: str) -> dict[str, dict[str, float]]:
        return evaluation.evaluate_bm25([suite], Path(request["output"]))

    def evaluate_unreadable() -> dict[str, dict[str, float]]:
        evaluation.load_suite = unreadable
        return evaluate(request["whole"])

    read = evaluation.load_suite
    return [
        lambda: evaluate(request["damaged"] if last else request["whole"]),
        evaluate_unreadable,
    ]


report(works)
