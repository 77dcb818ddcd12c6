"""The tiny recipe with keys changed, and the lines of the error that loading it raises. Used by the recipe tests."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from toolkit.recipe.errors import RecipeError
from toolkit.recipe.schema import load_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
TINY = json.loads((RECIPES / "tiny" / "revela.json").read_text())
MISSING = type("MISSING", (), {})  # its name is the same in every process, which pytest-xdist needs
BUILD = "stages.0.start.build"
LM_START = "stages.1.objective.language_model.start"
START_FIX = 'write "previous", {"hub": "<model id>"}, {"folder": "<path>"} or {"build": {...}}'


def write(folder: Path, content: Any) -> Path:
    path = folder / "r.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def changed(*changes: tuple[str, Any]) -> dict[str, Any]:
    """The tiny recipe with keys set, or taken out with MISSING."""
    recipe = copy.deepcopy(TINY)
    for key, value in changes:
        *parents, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
        node: Any = recipe
        for part in parents:
            node = node[part]
        if value is MISSING:
            del node[last]
        else:
            node[last] = value
    return recipe


def problems(folder: Path, content: Any, *overrides: str) -> list[str]:
    """The lines of the error, without the file name that starts each of them."""
    path = write(folder, content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    lines = str(caught.value).split("\n")
    return [line.removeprefix(f"{path}: ") for line in lines]
