"""A whole recipe: a seed and stages, each with the sections of its method; how it is read, checked and resolved.

Called by the launcher and by everything that reads settings. Imports pydantic and nothing heavier, never torch.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union

from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, create_model, field_validator
from pydantic_core import PydanticCustomError

from toolkit import methods
from toolkit.recipe.checks import cross_checks
from toolkit.recipe.errors import RecipeError, did_you_mean, explain, one_line, override, read_json
from toolkit.recipe.section import Name, Natural, Section, Text
from toolkit.recipe.stage import Stage


class Figures(Section):
    """A figure as text, under what it rests on, e.g. {"measured": "2 GB a rank with 2 ranks"}; at least one of them."""

    paper: Text | None = Field(None, description="As a paper reports it.")
    measured: Text | None = Field(None, description="As measured with this toolkit.")
    estimate: Text | None = Field(None, description="Worked out, not measured.")


class Recipe(Section):
    name: Name = Field(description="Folder name of the run below runs/.")
    description: str = Field("", description="What it is, and when one takes it; two sentences at most.")
    hardware: Figures | None = Field(
        None, description="Machine it is for or was run on; like memory, time and sources it decides nothing."
    )
    memory: Figures | None = Field(None, description="Memory it needs.")
    time: Figures | None = Field(None, description="How long it takes.")
    sources: dict[Text, Text] = Field(
        {},
        description="Where values are from: a key of the recipe or of its stages (optim.lr, stages.1.optim.lr), or a "
        "group in words (every other value) -> the paper with its arXiv id, or the reason.",
    )
    seed: Natural = Field(description="Seed of weights, data order and dropout.")
    stages: list[Stage[Any, Any]]

    def digest(self, last: int | None = None) -> str:
        """16 hex digits of what decides the weights after stage `last` (all stages if None): seed and stages."""
        stages = self.stages if last is None else self.stages[: last + 1]
        kept = [
            stage.model_dump(mode="json", exclude={"description", "eval", "save", "guard", "export"})
            for stage in stages
        ]
        return hashlib.sha256(json.dumps([self.seed, kept]).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The resolved recipe, every default written out."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def recipe_type() -> type[Recipe]:
    """The schema with a kind of stage for each method of the table."""
    return _recipe_type(tuple(methods.TABLE))


def stage_type(method: str) -> type[Stage[Any, Any]]:
    """The schema of a stage of a method."""
    keys = methods.keys_of(method)
    return Stage[keys.objective, keys.data]


@functools.cache
def _recipe_type(names: tuple[str, ...]) -> type[Recipe]:
    kinds = [Annotated[stage_type(name), Tag(name)] for name in names]
    kinds.append(Annotated[Stage[_NoMethod, Any], Tag(_NO_METHOD)])
    stage = Annotated[Union[tuple(kinds)], Discriminator(_method)]  # noqa: UP007
    fields: Any = {"stages": (Annotated[list[stage], Field(min_length=1)], ...)}
    return create_model("Recipe", __base__=Recipe, **fields)


_NO_METHOD = "no method"


class _NoMethod(Section, extra="ignore"):
    """Stands for the objective of a stage that names no method; the stage's other sections are checked all the same."""

    name: Any

    @field_validator("name")
    @classmethod
    def _is_unknown(cls, name: Any) -> Any:
        hint, _ = did_you_mean(str(name), list(methods.TABLE))
        raise PydanticCustomError(
            "no_method", "{problem}", {"problem": f"{one_line(repr(name), 60)} is unknown; {hint}"}
        )


def _method(stage: Any) -> str | None:
    """Which kind of stage a value is."""
    if isinstance(stage, Stage):
        return stage.objective.name
    if not isinstance(stage, dict):
        return None
    objective = stage.get("objective")
    name = objective.get("name") if isinstance(objective, dict) else None
    return name if isinstance(name, str) and name in methods.TABLE else _NO_METHOD


def _owners(section: type[BaseModel], key: str) -> list[str]:
    """The methods whose section has a key that this one, which stands in its place, has not."""
    kinds = [(name, (keys.objective, keys.data)) for name in methods.TABLE for keys in [methods.keys_of(name)]]
    places = {place for _, sections in kinds for place, own in enumerate(sections) if own is section}
    return [name for name, sections in kinds if any(key in sections[place].model_fields for place in places)]


def load_recipe(path: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: JSON file.
        overrides: `key.path=value` strings; the value is JSON, or a plain string when it is not valid JSON.

    Raises:
        RecipeError: with every problem found, one a line, path and fix each.
    """
    path = Path(path)
    raw = read_json(path)
    override(raw, overrides)
    schema = recipe_type()
    try:
        recipe = schema.model_validate(raw)
        recipe.to_json().encode()
    except ValidationError as error:
        told = explain(schema, error, _owners)
        raise RecipeError("\n".join(one_line(f"{path}: {line}") for line in told)) from None
    except UnicodeEncodeError as error:
        broken = f"{error.object[error.start]!r} is half a character (a lone surrogate); write the whole one"
        raise RecipeError(one_line(f"{path}: {broken}")) from None
    problems = [*_empty_figures(recipe), *cross_checks(recipe.stages)]
    if problems:
        raise RecipeError("\n".join(one_line(f"{path}: {where}: {what}") for where, what in problems))
    return recipe


def _empty_figures(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for key, figures in (("hardware", recipe.hardware), ("memory", recipe.memory), ("time", recipe.time)):
        if figures is not None and not (figures.paper or figures.measured or figures.estimate):
            yield key, "says nothing; write at least one of paper, measured and estimate, or leave it out"


def stage_folder(run: Path, recipe: Recipe, index: int) -> Path:
    """The folder of a stage below the run folder."""
    return run / f"stage_{index}_{recipe.stages[index].name}"


def data_seed(recipe: Recipe, index: int) -> int:
    """The seed of stage `index`'s order of data: the recipe's, plus one for each stage that it goes on from.

    Stages from the same kind of start see the same data in the same order, so that they can be compared; a stage from
    "previous" does not see its predecessor's order again.
    """
    return data_seed(recipe, index - 1) + 1 if recipe.stages[index].start == "previous" else recipe.seed
