"""Each rank mines negatives for the data of some stages and reports where they are, or what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reported import report

from toolkit.prepare.negatives import with_negatives
from toolkit.recipe.pairs import PairsData


def works(request: Any) -> list[Callable[[], str]]:
    run, export = Path(request["run"]), Path(request["export"])

    def prepare(raw: dict[str, Any]) -> str:
        data = with_negatives(PairsData.model_validate_json(json.dumps(raw)), export, run, 0, "cpu")
        return json.dumps([source.model_dump(mode="json") for source in data.sources])

    return [lambda raw=raw: prepare(raw) for raw in request["data"]]


report(works)
