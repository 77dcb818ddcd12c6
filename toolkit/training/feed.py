"""What a stage is before it trains: its place in the run, its models on disk, its rows. Called by the training loop."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from toolkit.data.faults import skipping
from toolkit.methods import keys_of, method_of
from toolkit.methods.method import Feed, Models, StageRun
from toolkit.models.places import ModelSource
from toolkit.prepare.build import build_start
from toolkit.prepare.models import resolve_model
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.models import BuildStart
from toolkit.recipe.schema import Recipe, data_seed, stage_folder


def stage_run(recipe: Recipe, index: int, run: Path, device: torch.device | str) -> StageRun:
    """Stage `index` of a recipe in a run folder, with all that its steps need to know of the others."""
    before = stage_folder(run, recipe, index - 1) if index else None
    folder = stage_folder(run, recipe, index)
    return StageRun(index, recipe.stages[index], recipe.seed, data_seed(recipe, index), run, folder, before, device)


def find_models(run: StageRun) -> Models:
    """Local folders of a stage's models; built, downloaded or the export of the stage before.

    Raises:
        RecipeError: for a model that is not there or cannot be read, the same on every rank.
    """
    keys = keys_of(run.stage.objective.name).models(run.stage)
    found: list[ModelSource] = []
    for model in keys:
        built = _build(run) if isinstance(model.start, BuildStart) else None
        kind = "lm" if model.causal else "encoder"
        found.append(resolve_model(model.start, previous=run.before, previous_kind=kind, built=built))
    return Models(found[0], {model.name: source for model, source in zip(keys[1:], found[1:], strict=True)})


def _build(run: StageRun) -> Path:
    start, data, name = run.stage.start, run.stage.data, run.stage.objective.name
    texts = method_of(name).training_text
    assert isinstance(start, BuildStart) and texts is not None  # the recipe's checks

    def read() -> Iterator[str]:
        return texts(data, Counter(), skipping(data.faulty_rows))

    return build_start(start.build, data, read, name, run.seed, run.run)


def open_feed(run: StageRun, models: Models, tokenizer: Any) -> Feed:
    """The rows of a stage, a function of the recipe alone; their order follows its data_seed.

    Args:
        tokenizer: the retriever's.

    Raises:
        RecipeError: for data that is malformed, empty or too small, the same on every rank.
    """
    try:
        return method_of(run.stage.objective.name).open_feed(run, models, tokenizer)
    except RecipeError as error:
        at_a_key = str(error).startswith(("data.", "batch.", "encoder.", "objective."))
        raise RecipeError(f"stages.{run.number}.{error}" if at_a_key else str(error)) from None
