"""Each rank prepares crops from good and from bad data and reports what it got."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from reported import report

from toolkit.methods.recontriever.prepared import prepare_crops
from toolkit.recipe.texts import TextsData


def works(request: Any) -> list[Callable[[], str]]:
    def prepare(folder: str, tokenizer: str) -> str:
        data = TextsData.model_validate({"sources": [{"folder": folder}]})
        return prepare_crops(data, Path(tokenizer), Path(request["run"])).digest

    return [lambda case=case: prepare(*case) for case in request["cases"]]


report(works)
