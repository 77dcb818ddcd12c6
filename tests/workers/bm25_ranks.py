"""Every rank scores BM25 on a suite and reports the scores."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reported import report

from eval.evaluate import evaluate_bm25


def works(request: Any) -> list[Callable[[], str]]:
    return [lambda: json.dumps(evaluate_bm25([request["suite"]], Path(request["output"])))]


report(works)
