"""Each rank prepares bundles of neighbours for some stages and reports what it got."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reported import report

from toolkit.prepare import ModelSource, prepare_passages
from toolkit.prepare_neighbours import prepare_bundles
from toolkit.recipe import Stage


def works(request: Any) -> list[Callable[[], str]]:
    run, model = Path(request["run"]), ModelSource(Path(request["model"]), "model")

    def prepare(raw: dict[str, Any]) -> str:
        stage = Stage.model_validate_json(json.dumps(raw))
        return json.dumps(prepare_bundles(stage, prepare_passages(stage.data, run), model, run, "cpu").tolist())

    return [lambda raw=raw: prepare(raw) for raw in request["stages"]]


report(works)
