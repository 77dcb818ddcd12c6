"""What would end a run later, found before it starts: data, columns, suites, splits and hub ids, all at once.

Called by launcher/stages.py before the first stage and by --dry-run.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from eval.contexts import check_context
from eval.suite_checks import HubData, NotKnown, check_on_hub, check_suite
from eval.suites import check_prompts, expand
from toolkit.data.first_look import Look
from toolkit.data.hub import Unreachable, reachable
from toolkit.methods import method_of
from toolkit.methods.method import Method
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.schema import Recipe
from toolkit.recipe.sources import HubSource, Source, source_name

_NO_NETWORK = "the hub cannot be reached"


class Ahead(NamedTuple):
    """What was found. Each line names the place in the recipe, but for `said`."""

    problems: list[str]
    unchecked: list[str]  # what only the hub could tell
    warnings: list[str]
    said: list[str]  # which columns of each source are used, each line once
    looks: dict[tuple[int, int], Look]  # (stage, source) -> its first rows; without those that have a problem


def look_ahead(recipe: Recipe, dry: bool, stages: Collection[int] | None = None) -> Ahead:
    """Look at the first rows of every source of the stages that are to be run, and for every suite.

    Args:
        dry: what the hub would have to tell is left unchecked where it cannot be reached; else that is a problem,
            unless the local cache has it.
        stages: the numbers of those; None: all.
    """
    found = Ahead([], [], [], [], {})
    known: dict[str, Look | RecipeError] = {}
    for index in range(len(recipe.stages)) if stages is None else stages:
        stage = recipe.stages[index]
        data, method = stage.data, method_of(stage.objective.name)
        settings = f"{stage.objective.name} {data.model_dump_json(exclude={'sources'})}"
        for number, source in enumerate(data.sources):
            key = f"{source.model_dump_json()} {settings}"
            if key not in known:
                known[key] = _look(source, data, method, dry)
            at, seen = f"stages.{index}.data.sources.{number}", known[key]
            if isinstance(seen, Look):
                found.looks[index, number] = seen
                found.said.extend(line for line in [f"data: {seen.line}"] if seen.line and line not in found.said)
            else:
                _add(found, at, seen, dry)
        looks = {n: found.looks[index, n] for n in range(len(data.sources)) if (index, n) in found.looks}
        for is_problem, line in method.warn(data, looks):
            (found.problems if is_problem else found.warnings).append(f"stages.{index}.{line}")
    _check_suites(found, recipe, dry)
    return found


def _add(found: Ahead, at: str, error: RecipeError, dry: bool) -> None:
    """A problem at a key of the recipe; what only the hub could tell is none in a dry run."""
    line = f"{at}: {str(error).removeprefix('data.sources: ')}"
    if isinstance(error, NotKnown) and not dry:
        found.warnings.append(f"{line}; the run ends there if it cannot")
    else:
        left = isinstance(error, NotKnown) or (dry and isinstance(error, Unreachable))
        (found.unchecked if left else found.problems).append(line)


# --------------------------------------------------------------------------- sources


def _look(source: Source, data: Any, method: Method, dry: bool) -> Look | RecipeError:
    if dry and isinstance(source, HubSource) and not reachable():
        return Unreachable(f"{source_name(source)}: {_NO_NETWORK}")
    try:
        return method.look(source, data)
    except RecipeError as error:
        return error


# --------------------------------------------------------------------------- suites


def _check_suites(found: Ahead, recipe: Recipe, dry: bool) -> None:
    named = [suite for stage in recipe.stages for suite in stage.eval.suites]
    outcome: dict[str, list[RecipeError]] = {}
    for index, stage in enumerate(recipe.stages):
        at = f"stages.{index}.eval"
        if (error := _problem(check_context, stage.eval)) is not None:
            found.problems.append(f"stages.{index}.{error}")
        for number, suite in enumerate(stage.eval.suites):
            if suite not in outcome:
                cut_off = any(isinstance(error, Unreachable) for errors in outcome.values() for error in errors)
                outcome[suite] = _suite_problems(suite, named, dry or cut_off)
            for error in outcome[suite]:
                _add(found, f"{at}.suites.{number}", error, dry)
        if not any(outcome[suite] for suite in stage.eval.suites):
            error = _problem(check_prompts, stage.eval.prompts, expand(stage.eval.suites, named))
            if error is not None:
                found.problems.append(f"{at}.{str(error).removeprefix('suite ')}")


def _suite_problems(suite: str, named: list[str], quick: bool) -> list[RecipeError]:
    """What is wrong with a suite; `quick`: nothing is asked where the hub cannot be reached, which takes a while."""
    data: dict[HubData, None] = {}

    def find() -> None:
        for name in expand([suite], named):
            data.update(dict.fromkeys(check_suite(name)))

    error = _problem(find)
    problems = [] if error is None else [error]
    if data and quick and not reachable():
        first = next(iter(data)).name
        count = f"{len(data):,} datasets, the first of them {first}" if len(data) > 1 else f"dataset {first}"
        return [*problems, Unreachable(f"{suite}: {count}: {_NO_NETWORK}")]
    for each in data:
        error = _problem(check_on_hub, each)
        problems += [] if error is None else [error]
        if isinstance(error, Unreachable):
            break
    return problems


def _problem(check: Callable[..., object], *arguments: object) -> RecipeError | None:
    try:
        check(*arguments)
    except RecipeError as error:
        return error
    return None
