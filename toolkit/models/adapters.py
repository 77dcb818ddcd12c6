"""An adapter's folder put on a model: keys of another model class are mapped, and all that does not fit is said.

Called by backbone and --dry-run. PEFT itself drops weights without a place, and leaves modules without weights as new.
"""

import copy
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from peft import LoraConfig, PeftConfig, PeftModel, PeftType, TaskType, get_peft_model, get_peft_model_state_dict
from peft import set_peft_model_state_dict as set_weights
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from toolkit.models.formats import ADAPTER_CONFIG, ADAPTER_WEIGHTS, pickled_adapter, warn_once

PEFT_PREFIX = "base_model.model."
# Settings of a LoRA that the recipe's `lora` section says, that its modules show, or that decide nothing.
SAID = {"r", "lora_alpha", "lora_dropout", "target_modules", "layers_to_transform", "layers_pattern", "exclude_modules"}
SAID |= {"task_type", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "auto_mapping"}
SAID |= {"init_lora_weights", "runtime_config", "modules_to_save"}
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # of A and B; others change the base model too


class LoraSettings(Protocol):
    """What the recipe's `lora` section says of an adapter."""

    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def targets(self) -> list[str]: ...


class Contents(NamedTuple):
    """What the weights file of an adapter holds, under the names of the model that it is put on."""

    shapes: dict[str, tuple[int, ...]]  # by names as PEFT would write them for this model
    names: dict[str, str]  # those -> the file's own
    left_out: list[str]  # the file's names of what belongs to a head, which the model does not have


def with_adapter(model: nn.Module, folder: Path) -> PeftModel:
    """A headless model with the adapter of a folder beside its weights, frozen; the vectors are those of PEFT on the
    class that the adapter was trained on.

    Raises:
        ValueError: one line, if anything in the folder does not fit the model, or would be left out.
    """
    config = read_config(folder)
    found = _wrapped(model, _for_model(model, config, folder), folder)
    fill(found, folder)
    return found


def check_fit(model: nn.Module, folder: Path) -> None:
    """Raise ValueError as with_adapter; `model` is without weights (on the meta device), and is changed."""
    found = _wrapped(model, _for_model(model, read_config(folder), folder), folder)
    _check_fit(found, _contents(found.get_base_model(), folder), folder)


def check_continued(model: nn.Module, folder: Path, lora: LoraSettings | None) -> None:
    """Raise ValueError unless the adapter of a folder is one that `lora` describes, and fits the model.

    `model` is without weights (on the meta device), and is changed.
    """
    config = check_settings(folder, lora)
    contents = _contents(model, folder)
    found = _wrapped(model, _for_model(model, config, folder), folder)
    _check_fit(found, contents, folder)
    if others := [contents.names[name] for name in contents.shapes if ".lora_" not in name]:
        raise ValueError(
            f"{folder}: the adapter brings {_some(others, 'weight')} of the model itself, which a lora section does "
            f"not say; {_merge_line(folder)}"
        )
    modules = {name for name, module in found.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)}
    names = sorted({name.rsplit(".", 1)[-1] for name in modules})
    plain = {name for name, module in found.get_base_model().named_modules() if _is_linear(module)}
    if any(name not in modules for name in plain if name.rsplit(".", 1)[-1] in names):
        raise ValueError(
            f"{folder}: the adapter sits on {_some(sorted(modules), 'module')}, not on all that are named "
            f"{', '.join(names)}, which is more than a lora section says; {_merge_line(folder)}"
        )
    if lora is None or names != sorted(set(lora.targets)):
        _refuse(folder, config, names, lora)


def check_settings(folder: Path, lora: LoraSettings | None) -> LoraConfig:
    """The config of an adapter to go on with; ValueError if its settings alone show that it is none of `lora`."""
    config = read_config(folder)
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise ValueError(f"{folder}: holds an adapter of type {config.peft_type}; only LoRA adapters can be continued")
    usual, own = LoraConfig().to_dict(), config.to_dict()
    beyond = [key for key, value in own.items() if key not in SAID and value != usual[key]]
    if beyond:
        described = ", ".join(f"{key} {own[key]!r}" for key in beyond[:3])
        raise ValueError(
            f"{folder}: the adapter has {described}, which a lora section does not say; {_merge_line(folder)}"
        )
    targets = config.target_modules
    listed = None if isinstance(targets, str) or targets is None else sorted(targets)
    if lora is None or (config.r, float(config.lora_alpha)) != (lora.rank, float(lora.alpha)):
        _refuse(folder, config, listed or [str(targets)], lora)
    return config


def fill(model: PeftModel, folder: Path) -> None:
    """Load the weights of an adapter into a model that has places for them; ValueError in one line unless all fit."""
    contents = _contents(model.get_base_model(), folder)
    _check_fit(model, contents, folder)
    if contents.left_out:
        warn_once(
            f"warning: {folder}: {_some(contents.left_out, 'weight')} of the adapter belong to a head that a retriever "
            "does not have; they change no vector"
        )
    weights = load_file(folder / ADAPTER_WEIGHTS)
    report = set_weights(model, {name: weights[own] for name, own in contents.names.items()})
    wrong = [*report.unexpected_keys, *(key for key in report.missing_keys if ".default" in key)]
    assert not wrong, wrong  # _check_fit has looked


def read_config(folder: Path) -> PeftConfig:
    """The adapter_config.json of a folder; raises ValueError if it cannot be read, or says what is not known here."""
    path = folder / ADAPTER_CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys that are not known, which are looked at here
            config = PeftConfig.from_pretrained(str(folder))
        given = {key for key, value in raw.items() if value}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read ({_reason(error)}); name the folder of an adapter") from None
    unknown = sorted(given - config.to_dict().keys())
    if unknown:
        raise ValueError(f"{path}: {', '.join(unknown[:3])} are not known to the installed peft; install a newer one")
    if config.is_prompt_learning:
        raise ValueError(f"{folder}: holds an adapter of type {config.peft_type}, which adds tokens; LoRA can be read")
    if isinstance(config, LoraConfig) and config.init_lora_weights not in PLAIN_STARTS:
        raise ValueError(
            f"{path}: init_lora_weights {config.init_lora_weights!r} changes the base model too; write the adapter "
            "again by save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    return config


# --------------------------------------------------------------------------- names


def _contents(model: nn.Module, folder: Path) -> Contents:
    own = _read_shapes(folder)
    prefix = _prefix(model)
    headed, of_headed = _has_head(model), _is_of_headed(own, prefix)
    shapes, names, left_out = {}, {}, []
    for name, shape in own.items():
        path = name.removeprefix(PEFT_PREFIX).replace(".default.", ".")  # of a state_dict() that was saved as it is
        if of_headed and not headed:
            if not path.startswith(prefix) or _is_pooler(model, path.removeprefix(prefix)):
                left_out.append(name)
                continue
            path = path.removeprefix(prefix)
        elif headed and not of_headed:
            path = prefix + path
        elif not headed and _is_pooler(model, path):
            left_out.append(name)
            continue
        shapes[PEFT_PREFIX + path], names[PEFT_PREFIX + path] = shape, name
    return Contents(shapes, names, left_out)


def _for_model(model: nn.Module, config: PeftConfig, folder: Path) -> PeftConfig:
    """The config under the names of the model: those of a class with a head begin with one more word, or one less."""
    config = copy.deepcopy(config)
    config.task_type = TaskType.CAUSAL_LM if _has_head(model) else TaskType.FEATURE_EXTRACTION
    config.inference_mode = True
    config.base_model_name_or_path = None  # else PEFT warns where the base has moved
    prefix, headed = _prefix(model), _has_head(model)
    of_headed = _is_of_headed(_read_shapes(folder), prefix)
    settings: Any = config
    modules = dict(model.named_modules())
    saved = [name.removeprefix(prefix) for name in settings.modules_to_save or ()]
    saved = [name for name in saved if any(module.endswith(name) for module in modules)]  # not of a head
    settings.modules_to_save = saved or None
    if headed == of_headed or settings.target_modules == "all-linear":
        return config
    theirs = {
        name: prefix + name if of_headed else name.removeprefix(prefix)
        for name in modules
        if name and (of_headed or name.startswith(prefix))
    }
    found = [name for name in theirs if check_target_module_exists(config, theirs[name])]
    if not found:
        return config  # PEFT says that nothing matches
    if isinstance(config, LoraConfig):
        for key in ("rank_pattern", "alpha_pattern"):
            old = getattr(settings, key)
            chosen = {name: get_pattern_key(old.keys(), theirs[name]) for name in found}
            setattr(settings, key, {name: old[pattern] for name, pattern in chosen.items() if pattern in old})
        settings.layers_to_transform = settings.layers_pattern = None
        tokens = settings.trainable_token_indices
        if isinstance(tokens, dict):
            settings.trainable_token_indices = {name.removeprefix(prefix): rows for name, rows in tokens.items()}
    settings.target_modules, settings.exclude_modules = set(found), None
    return config


def _prefix(model: Any) -> str:
    """What names of the model's weights begin with in a class that adds a head: "model.", "bert."."""
    return f"{model.base_model_prefix}."


def _has_head(model: Any) -> bool:
    return model.base_model_prefix in dict(model.named_children())


def _is_of_headed(names: Iterable[str], prefix: str) -> bool:
    return any(name.removeprefix(PEFT_PREFIX).startswith(prefix) for name in names)


def _is_pooler(model: Any, path: str) -> bool:
    """Whether a weight is of the layer on the first token that published encoders have, and retrievers do not read."""
    return path.startswith("pooler.") and "pooler.dense" not in dict(model.named_modules())


# --------------------------------------------------------------------------- what fits


def _wrapped(model: nn.Module, config: PeftConfig, folder: Path) -> PeftModel:
    try:
        return get_peft_model(model, config, autocast_adapter_dtype=False)  # pyright: ignore
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError, NotImplementedError, ImportError) as error:
        raise ValueError(
            f"{folder}: the adapter cannot be put on a {type(model).__name__} ({_reason(error)}); name the base that "
            "it was trained on"
        ) from None


def _check_fit(model: PeftModel, contents: Contents, folder: Path) -> None:
    """Raise ValueError unless the file has exactly the weights that PEFT would write for the model, in its shapes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a bias of B is taken for a shard
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    wanted = {name: tuple(weight.shape) for name, weight in state.items()}
    # An embedding that the adapter was trained with may be there whole: PEFT then takes it in place of the base's.
    there = {name: tuple(weight.shape) for name, weight in model.state_dict().items()} | wanted
    homeless = [contents.names[name] for name in contents.shapes if name not in there]
    empty = sorted({_module(name) for name in wanted if name not in contents.shapes})
    problems = []
    if homeless:
        problems.append(f"{_some(homeless, 'weight')} find no module in the model")
    if empty:
        problems.append(f"{_some(empty, 'module')} that {ADAPTER_CONFIG} names have no weights in {ADAPTER_WEIGHTS}")
    wrong = [
        f"{contents.names[name]} {list(shape)} in place of {list(there[name])}"
        for name, shape in contents.shapes.items()
        if name in there and shape != there[name]
    ]
    if wrong:
        problems.append(f"{_some(wrong, 'weight')} have another shape")
    if problems:
        raise ValueError(
            f"{folder}: the adapter does not fit a {type(model.get_base_model()).__name__}: {'; '.join(problems)}; "
            "name the base that it was trained on, or put the whole adapter back"
        )


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    path = folder / ADAPTER_WEIGHTS
    if problem := pickled_adapter(folder):
        raise ValueError(problem)
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({_reason(error)}); put the adapter's weights back") from None


def _module(name: str) -> str:
    """The module of a weight: "layers.0.mlp.up_proj" of "base_model.model.layers.0.mlp.up_proj.lora_A.weight"."""
    return name.removeprefix(PEFT_PREFIX).split(".lora_")[0].removesuffix(".weight").removesuffix(".base_layer.bias")


def _some(names: list[str], one: str) -> str:
    """A count and up to three of the names: "5 modules (a, b, c, ...)"."""
    shown = ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])
    return f"{len(names)} {one}{'s' * (len(names) > 1)} ({shown})"


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module.base_layer if isinstance(module, BaseTunerLayer) else module, nn.Linear)


# --------------------------------------------------------------------------- what a recipe says


def _refuse(folder: Path, config: LoraConfig, targets: list[str], lora: LoraSettings | None) -> None:
    here = "is null" if lora is None else f"has {_lora_line(lora.rank, lora.alpha, lora.targets)}"
    there = _lora_line(config.r, config.lora_alpha, targets)
    merged = f"name {folder}/merged (full weights)" if (folder / "merged").is_dir() else _merge_line(folder)
    raise ValueError(f"{folder}: holds an adapter, and the stage's lora {here}; {merged}, or set lora to {there}")


def _merge_line(folder: Path) -> str:
    return f"add {folder.name} to its base by peft's merge_and_unload() and start from those full weights"


def _lora_line(rank: int, alpha: float, targets: list[str]) -> str:
    return f"rank {rank}, alpha {float(alpha):g}, targets {', '.join(sorted(set(targets)))}"
