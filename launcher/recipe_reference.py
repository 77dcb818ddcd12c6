"""Writes recipes/README.md: the shipped recipes and every key of the schema. Called by `make recipes`."""

import json
import os
from pathlib import Path
from typing import Any

from toolkit.recipe import BuildStart, FolderStart, HubStart, Recipe, RevelaObjective, Start, load_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
HEADER = """# Recipes

Generated from the schema (`toolkit/recipe.py`) and the recipes of this folder by `make recipes`; do not edit.

A recipe is one JSON file that says everything a run does. `deepspeed launcher/run.py recipes/NAME.json` runs it,
`python launcher/run.py recipes/NAME.json --dry-run` checks it and prints what follows from it, and
`--set stages.0.optim.lr=2e-4` changes any key. Unknown, missing and mistyped keys are errors, all listed at once.
There is no default for what a study depends on: pool, learning rate, temperature, seed.
"""


def main() -> None:
    target = RECIPES / "README.md"
    part = target.with_suffix(".md.part")
    part.write_text(reference(), encoding="utf-8")
    os.replace(part, target)


def reference() -> str:
    """The whole text of recipes/README.md."""
    return "\n".join([HEADER, *_shipped(), *_keys()])


# --------------------------------------------------------------------------- the recipes of this folder


def _shipped() -> list[str]:
    lines = ["## Shipped recipes", ""]
    lines += ["| recipe | stage | retriever | language model | pool x pools per step | steps | evaluation |"]
    lines += ["|---|---|---|---|---|---|---|"]
    descriptions = []
    for path in sorted(RECIPES.rglob("*.json")):
        recipe, name = load_recipe(path), path.relative_to(RECIPES).as_posix()
        for stage in recipe.stages:
            objective = stage.objective
            model = _start(objective.language_model.start) if isinstance(objective, RevelaObjective) else "the same"
            batch = f"{stage.batch.pool} x {stage.batch.pools_per_step}"
            suites = ", ".join(stage.eval.suites) or "none"
            lines.append(
                f"| [{name}]({name}) | {stage.name} | {_start(stage.start)} | {model} | {batch} | {stage.optim.steps} "
                f"| {suites} |"
            )
        descriptions.append(f"- **{name}**: {recipe.description}")
    return [*lines, "", *descriptions, ""]


def _start(start: Start) -> str:
    match start:
        case HubStart():
            return start.hub
        case FolderStart():
            return start.folder
        case BuildStart():
            return f"built: {start.build.layers} layers of width {start.build.hidden_size}"
        case _:
            return "the stage before"


# --------------------------------------------------------------------------- the keys of the schema


def _keys() -> list[str]:
    schema = Recipe.model_json_schema()
    sections = schema["$defs"] | {"Recipe": schema}
    places: dict[str, list[str]] = {}
    _find_places("Recipe", "", sections, places)
    lines = ["## Keys", "", "`N` stands for the number of a list entry, from 0."]
    for name, paths in places.items():
        about = sections[name].get("description", "")
        where = ", ".join(f"`{path}`" for path in paths) or "the whole file"
        lines += ["", f"### {name}", "", f"{where}. {' '.join(about.split())}".strip(), ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        required = sections[name].get("required", [])
        for key, value in sections[name]["properties"].items():
            default = "required" if key in required else "its defaults" if "$ref" in value else _code(value["default"])
            meaning = value.get("description", "")
            lines.append(f"| `{key}` | {_type(value)} | {default} | {meaning} |")
    return [*lines, ""]


def _find_places(name: str, path: str, sections: dict[str, Any], places: dict[str, list[str]]) -> None:
    """Every path at which a section can stand, sections in the order in which the file writes them."""
    found = places.setdefault(name, [])
    if path and path not in found:
        found.append(path)
    for key, value in sections[name]["properties"].items():
        inside = f"{path}.{key}".lstrip(".") + (".N" if value.get("type") == "array" else "")
        for reference in _references(value):
            _find_places(reference, inside, sections, places)


def _references(value: Any) -> list[str]:
    """Names of the sections that a key's schema points to."""
    if isinstance(value, list):
        return [name for item in value for name in _references(item)]
    if not isinstance(value, dict):
        return []
    own = [value["$ref"].rsplit("/", 1)[-1]] if "$ref" in value else []
    return own + [name for key in ("anyOf", "oneOf", "items") for name in _references(value.get(key))]


def _type(value: dict[str, Any]) -> str:
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "const" in value:
        return _code(value["const"])
    if "enum" in value:
        return " or ".join(_code(item) for item in value["enum"])
    for union in ("anyOf", "oneOf"):
        if union in value:
            return " or ".join(_type(item) for item in value[union])
    if value["type"] == "array":
        return f"list of {_type(value['items'])}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {value[bound]}" for bound, sign in signs.items() if bound in value]
    return " ".join([value["type"], ", ".join(bounds)]).strip()


def _code(value: Any) -> str:
    return f"`{json.dumps(value)}`"


if __name__ == "__main__":
    main()
