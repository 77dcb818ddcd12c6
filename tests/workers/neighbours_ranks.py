"""Each rank prepares bundles of neighbours for some stages and reports what it got."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reported import report

from toolkit.prepare.models import ModelSource
from toolkit.prepare.neighbours import prepare_bundles
from toolkit.prepare.passages import prepare_passages
from toolkit.recipe.schema import stage_type


def works(request: Any) -> list[Callable[[], str]]:
    run, model = Path(request["run"]), ModelSource(Path(request["model"]), "model")

    def prepare(raw: dict[str, Any]) -> str:
        stage = stage_type(raw["objective"]["name"]).model_validate_json(json.dumps(raw))
        return json.dumps(prepare_bundles(stage, prepare_passages(stage.data, run), model, run, "cpu").tolist())

    return [lambda raw=raw: prepare(raw) for raw in request["stages"]]


report(works)
