"""Each rank prepares the clusters of some data and reports its pools, or what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reported import report
from surrogates import prepared

from toolkit.data.packing import ClusterPlan
from toolkit.prepare.clusters import prepare_clusters
from toolkit.recipe.pairs import PairsData


def works(request: Any) -> list[Callable[[], str]]:
    run, model = Path(request["run"]), Path(request["model"])

    def pools(raw: dict[str, Any]) -> str:
        data = PairsData.model_validate_json(json.dumps(raw))
        assert data.packing is not None
        found = prepare_clusters(data, prepared(data, model, run), model, run, 0, "cpu")
        plan = ClusterPlan(found, 8, data.packing.walk, data.packing.within or "all", seed=1)
        return json.dumps([plan.pool(t).tolist() for t in range(20)])

    return [lambda raw=raw: pools(raw) for raw in request["data"]]


report(works)
