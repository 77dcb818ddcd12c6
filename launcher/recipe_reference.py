"""Writes recipes/README.md: which recipe for what, each with its figures and sources, and every key of the schema.

Called by `make recipes`.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from toolkit.methods import TABLE, keys_of
from toolkit.recipe.models import BuildStart, FolderStart, HubStart, Start
from toolkit.recipe.schema import Figures, Recipe, load_recipe
from toolkit.recipe.stage import Stage

RECIPES = Path(__file__).parent.parent / "recipes"
HEADER = """# Recipes

Generated from the schema (`toolkit/recipe/` and each method's `keys.py`) and the recipes of this folder by
`make recipes`; do not edit.

A recipe is one JSON file that says everything a run does. `deepspeed launcher/run.py recipes/NAME.json` runs it,
`python launcher/run.py recipes/NAME.json --dry-run` checks it and prints what follows from it, and
`--set stages.0.optim.lr=2e-4` changes any key. Unknown, missing and mistyped keys are errors, all listed at once.
There is no default for what a study depends on: pool, learning rate, temperature, seed. `description`, `hardware`,
`memory`, `time` and `sources` decide nothing; a recipe of your own needs none of them.
"""


def main() -> None:
    target = RECIPES / "README.md"
    part = target.with_suffix(".md.part")
    part.write_text(reference(), encoding="utf-8")
    os.replace(part, target)


def reference() -> str:
    """The whole text of recipes/README.md."""
    recipes = {path.relative_to(RECIPES).as_posix(): load_recipe(path) for path in sorted(RECIPES.rglob("*.json"))}
    return "\n".join([HEADER, *_which_for_what(recipes), *_shipped(recipes), *_keys()])


# --------------------------------------------------------------------------- the recipes of this folder


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with its mark."""
    return re.split(r"(?<=[.!?])\s+", text.strip())


def named_values(recipe: Recipe, key: str) -> list[Any]:
    """What a key of `sources` names, as JSON: of the recipe, or of each stage that has the key; nothing for a group."""
    whole = recipe.model_dump(mode="json")
    places = [_walk(root, key.split(".")) for root in (whole, *whole["stages"])]
    return [value for found in places for value in found]


def _walk(value: Any, path: list[str]) -> list[Any]:
    """The value at a path as the only entry, or none."""
    for part in path:
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return []
    return [value]


def _which_for_what(recipes: dict[str, Recipe]) -> list[str]:
    lines = ["## Which recipe for what", ""]
    lines += ["Each figure says what it rests on: a paper, a measurement with this toolkit, or an estimate.", ""]
    lines += ["| recipe | for what | retriever | method | hardware | time | memory |", "|---|---|---|---|---|---|---|"]
    for name, recipe in recipes.items():
        starts = [_start(stage.start) for stage in recipe.stages if stage.start != "previous"]
        methods = [stage.objective.name for stage in recipe.stages]
        figures = " | ".join(map(_figures, (recipe.hardware, recipe.time, recipe.memory)))
        lines.append(
            f"| [{name}]({name}) | {sentences(recipe.description)[0]} | {_each_once(starts)} | {_each_once(methods)} "
            f"| {figures} |"
        )
    return [*lines, ""]


def _each_once(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))


def _figures(figures: Figures | None) -> str:
    """Every figure with its kind, e.g. `measured: 2 GB`."""
    if figures is None:
        return ""
    return "; ".join(f"{kind}: {text}" for kind, text in figures if text is not None)


def _shipped(recipes: dict[str, Recipe]) -> list[str]:
    lines = ["## Shipped recipes"]
    for name, recipe in recipes.items():
        lines += ["", f"### {name}", "", recipe.description, ""]
        lines += ["| stage | retriever | other models | pool x pools per step | steps | evaluation |"]
        lines += ["|---|---|---|---|---|---|", *map(_stage, recipe.stages), ""]
        for about, figures in (("Hardware", recipe.hardware), ("Memory", recipe.memory), ("Time", recipe.time)):
            lines.append(f"- {about}, {_figures(figures)}.")
        lines += ["", "Where its values are from:", "", *_sources(recipe)]
    return [*lines, ""]


def _stage(stage: Stage) -> str:
    models = keys_of(stage.objective.name).models(stage)
    others = [f"{model.name}: {_start(model.start)}" for model in models[1:]]
    batch = f"{stage.batch.pool} x {stage.batch.pools_per_step}"
    suites = ", ".join(stage.eval.suites) or "none"
    return (
        f"| {stage.name} | {_start(stage.start)} | {', '.join(others) or 'none'} | {batch} | {stage.optim.steps} "
        f"| {suites} |"
    )


def _sources(recipe: Recipe) -> list[str]:
    """A line for each source, with the keys whose values are from there."""
    keys: dict[str, list[str]] = {}
    for key, source in recipe.sources.items():
        keys.setdefault(source, []).append(_named(recipe, key))
    return [f"- {', '.join(named)}. {source[0].upper()}{source[1:]}." for source, named in keys.items()]


def _named(recipe: Recipe, key: str) -> str:
    """A key with its values where they are short; a group of keys as it is."""
    values = named_values(recipe, key)
    short = [_code(value) for value in values if not isinstance(value, dict) and len(json.dumps(value)) <= 40]
    told = f"`{key}`" if values else key
    return f"{told} = {_each_once(short)}" if short else told


def _start(start: Start) -> str:
    match start:
        case HubStart():
            return start.hub
        case FolderStart():
            return start.folder
        case BuildStart():
            layers = f"{start.build.layers} layer{'s' if start.build.layers > 1 else ''}"
            return f"built: {layers} of width {start.build.hidden_size}"
        case _:
            return "the stage before"


# --------------------------------------------------------------------------- the keys of the schema


OF_THE_METHOD = "of its method"  # what stands in the schema of a stage where a method's section goes


def _keys() -> list[str]:
    """Every section of the schema: those of all stages, of several methods, and of one method alone."""
    schema = Recipe.model_json_schema()
    sections = _plain_names(schema["$defs"] | {"Recipe": schema})
    places: dict[str, list[str]] = {}
    _find_places("Recipe", "", sections, places)
    common = list(places)
    users: dict[str, list[str]] = {}
    for name in TABLE:
        keys, own = keys_of(name), {}
        for key, section in (("objective", keys.objective), ("data", keys.data)):
            schema = section.model_json_schema()
            sections |= schema.get("$defs", {}) | {section.__name__: schema}
            _find_places(section.__name__, f"stages.N.{key}", sections, own)
        for section, paths in own.items():
            users.setdefault(section, []).append(name)
            known = places.setdefault(section, [])
            known += [path for path in paths if path not in known]
    lines = ["## Keys", "", "`N` stands for the number of a list entry, from 0."]
    for section in common:
        lines += _section(section, sections[section], places[section])
    shared = [section for section, names in users.items() if len(names) > 1 and section not in common]
    lines += ["", "## Keys of several methods"]
    for section in shared:
        lines += _section(section, sections[section], places[section], users[section])
    for name in TABLE:
        lines += ["", f"## Keys of {name}"]
        for section in (section for section, names in users.items() if names == [name] and section not in common):
            lines += _section(section, sections[section], places[section])
    return [*lines, ""]


def _plain_names(sections: dict[str, Any]) -> dict[str, Any]:
    """The sections with that of a stage, which is of any method, under a plain name."""
    return json.loads(json.dumps(sections).replace("Stage_Any_Any_", "Stage"))


def _section(name: str, section: dict[str, Any], paths: list[str], users: Iterable[str] = ()) -> list[str]:
    """The heading and the table of a section's keys."""
    about = " ".join(section.get("description", "").split())
    where = ", ".join(f"`{path}`" for path in paths) or "the whole file"
    of = f" of {', '.join(users)}" if users else ""
    lines = ["", f"### {name}", "", f"{where}{of}. {about}".strip(), ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    required = section.get("required", [])
    for key, value in section["properties"].items():
        default = "required" if key in required else "its defaults" if "$ref" in value else _code(value["default"])
        lines.append(f"| `{key}` | {_type(value)} | {default} | {value.get('description', '')} |")
    return lines


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
    if "type" not in value:
        return OF_THE_METHOD
    if value["type"] == "array":
        return f"list of {_type(value['items'])}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {value[bound]}" for bound, sign in signs.items() if bound in value]
    return " ".join([value["type"], ", ".join(bounds)]).strip()


def _code(value: Any) -> str:
    return f"`{json.dumps(value)}`"


if __name__ == "__main__":
    main()
