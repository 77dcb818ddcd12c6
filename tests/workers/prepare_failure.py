"""Each rank prepares passages from good and from malformed data and reports what it got."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from reported import report

from toolkit.prepare.passages import prepare_passages
from toolkit.recipe.texts import PassagesData


def works(request: Any) -> list[Callable[[], str]]:
    def prepare(folder: str) -> str:
        data = PassagesData.model_validate(
            {"sources": [{"folder": folder}], "passages": {"unit": "lines", "max_words": 5}, "interleave": 1}
        )
        return prepare_passages(data, Path(request["run"])).digest

    return [lambda folder=folder: prepare(folder) for folder in request["folders"]]


report(works)
