"""Evaluate BM25 with a cache, with one that cannot be written, then on a suite that the last rank finds damaged, then
on one that it cannot read; every rank reports. Of the first: how many indices it made, and all scores.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from reported import report

from eval import evaluate as evaluation
from eval.tasks import Task
from toolkit.retrieval import bm25


def works(request: Any) -> list[Callable[[], Any]]:
    last = dist.get_rank() == dist.get_world_size() - 1

    def unreadable(name: str) -> Iterable[Task]:
        if last:
            raise ValueError(f"{name}: cannot be read")
        return read(name)

    def evaluate(suite: str, output: str = "output", cache: Path | None = None) -> dict[str, dict[str, float]]:
        return evaluation.evaluate_bm25([suite], Path(request[output]), cache=cache)

    def evaluate_cached() -> list[Any]:
        made: list[bool] = []
        build = bm25._index
        bm25._index = lambda words, code: made.append(code) or build(words, code)
        return [evaluate(request["whole"], "output_cached", Path(request["cache"])), len(made)]

    def evaluate_unreadable() -> dict[str, dict[str, float]]:
        evaluation.load_suite = unreadable
        return evaluate(request["whole"])

    read = evaluation.load_suite
    return [
        evaluate_cached,
        lambda: evaluate(request["whole"], cache=Path(request["no_folder"])),
        lambda: evaluate(request["damaged"] if last else request["whole"]),
        evaluate_unreadable,
    ]


report(works)
