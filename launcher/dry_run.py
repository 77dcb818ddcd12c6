"""What --dry-run prints: the derived numbers of a stage, without torch.distributed, a GPU or any weights."""

import json
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    RepositoryNotFoundError,
)
from transformers import PretrainedConfig

from launcher.ahead import Ahead, look_ahead
from launcher.dry_data import data_lines
from toolkit.files import expanded
from toolkit.methods import keys_of
from toolkit.models.adapters import check_continued, check_settings
from toolkit.models.backbone import llama_config, on_meta, read_config
from toolkit.models.formats import pickled_model
from toolkit.models.places import TOKENIZER_FILES, base_of_adapter, holds_bare_adapter, hub_problem
from toolkit.models.vocabulary import model_tokenizer
from toolkit.prepare.start_settings import Unresolved, resolve_stage
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.models import BuildStart, FolderStart, HubStart, Start
from toolkit.recipe.schema import Recipe
from toolkit.training.deepspeed_config import ds_config
from toolkit.training.numbers import derived, parameter_counts, render


def dry_run(recipe: Recipe, only: int | None, world_size: int) -> str:
    """What follows from a recipe and the data it names, of stage `only` or (None) of all.

    Raises:
        RecipeError: with every problem found, one a line.
    """
    stages = list(range(len(recipe.stages))) if only is None else [only]
    found = look_ahead(recipe, dry=True, stages=stages)
    problems, blocks = list(found.problems), []
    for index in stages:
        try:
            blocks.append(describe(recipe, index, world_size, found))
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(problems))
    said = [*found.said, *(f"warning: {line}" for line in found.warnings)]
    said += [f"not checked: {line}" for line in found.unchecked]
    return "".join(f"{line}\n" for line in said) + "\n".join(blocks)


def describe(recipe: Recipe, index: int, world_size: int, found: Ahead) -> str:
    """Derived numbers, data, parameter counts and DeepSpeed configuration of a stage on `world_size` ranks."""
    encoder, notes = [], []
    try:
        recipe, encoder, notes = resolve_stage(recipe, index)
    except Unresolved as error:
        encoder = [("encoder", f"not resolved: {error}")]
    except ValueError as error:
        raise RecipeError(f"stage {index} {recipe.stages[index].name}: {error}") from None
    stage = recipe.stages[index]
    rows = [*derived(stage, world_size), *encoder, *data_lines(recipe, index, found)]
    try:
        rows += [(name.replace("_", " "), f"{count:,}") for name, count in stage_parameters(recipe, index).items()]
    except Unresolved as error:
        rows.append(("parameters", f"not resolved: {error}"))
    except ValueError as error:
        raise RecipeError(f"stage {index} {stage.name}: {error}") from None
    config = json.dumps(ds_config(stage, world_size), indent=2)
    lines = [f"stage {index} {stage.name}: {stage.objective.name}", render(rows), *notes]
    return "\n".join([*lines, "  DeepSpeed configuration", config, ""])


def stage_parameters(recipe: Recipe, index: int) -> dict[str, int]:
    """Parameter counts of a stage's models from their configs.

    Raises:
        Unresolved: if a config is on a hub that gives it to nobody here.
        RecipeError, ValueError: if a model is not there, not supported, or does not fit the recipe.
    """
    stage = recipe.stages[index]
    models = keys_of(stage.objective.name).models(stage)
    return parameter_counts(stage, {model.name: _config(recipe, index, model.start) for model in models})


def _config(recipe: Recipe, index: int, start: Start) -> PretrainedConfig:
    """The config a stage starts from; `previous` is that of the stage before."""
    match start:
        case BuildStart():
            return llama_config(start.build.model_dump(), bos_id=0, eos_id=1, pad_id=1)
        case FolderStart():
            folder = expanded(start.folder)
            if start is recipe.stages[index].start and holds_bare_adapter(folder):
                check_settings(folder, recipe.stages[index].lora)
                base = base_of_adapter(folder)
                start = FolderStart(folder=base) if Path(base).is_absolute() else HubStart(hub=base)
                config = _config(recipe, index, start)
                check_continued(on_meta(config, causal=False), folder, recipe.stages[index].lora)
                return config
            if not (folder / "config.json").is_file():
                raise RecipeError(f"stages.{index}: {folder} holds no config.json; name a folder with a model")
            return _local_config(folder)
        case HubStart():
            try:
                path = hf_hub_download(start.hub, "config.json")
            except (HFValidationError, RepositoryNotFoundError) as error:
                if not isinstance(error, GatedRepoError):
                    raise RecipeError(f"stages.{index}: {start.hub}: {hub_problem(start.hub, error)}") from None
                raise Unresolved(f"{start.hub}: {hub_problem(start.hub, error)}") from None
            except (OSError, ValueError, HTTPError) as error:
                raise Unresolved(f"{start.hub}: {hub_problem(start.hub, error)}") from None
            return _config_beside_tokenizer(Path(path).parent)
        case "previous":
            return _config(recipe, index - 1, recipe.stages[index - 1].start)


def _local_config(folder: Path) -> PretrainedConfig:
    """The config of a model folder; ValueError where its weights are in no safetensors, or its tokenizer is
    another's."""
    if problem := pickled_model(folder):
        raise ValueError(problem)
    return _config_beside_tokenizer(folder)


def _config_beside_tokenizer(folder: Path) -> PretrainedConfig:
    """The config of a folder; ValueError where a tokenizer lies beside it that is another model's."""
    config = read_config(folder)
    if any((folder / file).is_file() for file in TOKENIZER_FILES):
        model_tokenizer(folder, config)
    return config
