"""Weights in the files of a model folder: in safetensors only, and how others become that; those of its model only.

Called by whatever names or loads a folder with a model or an adapter.
"""

import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import safe_open

from toolkit.ranks.last_words import is_first_rank, notice

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONTEXT_WEIGHTS = "context.safetensors"  # of a contextual retriever: all that is no backbone's


def pickled_model(folder: Path) -> str:
    """What is wrong with a folder that has weights in pytorch_model*.bin alone, and the fix, in one line; or empty."""
    if any(folder.glob("*.safetensors")) or not any(folder.glob("pytorch_model*.bin")):
        return ""
    place = json.dumps(str(folder))
    code = (
        f"from transformers import {_architecture(folder)} as M; "
        f"M.from_pretrained({place}, use_safetensors=False).save_pretrained({place})"
    )
    return _line(folder, "pytorch_model*.bin", code)


def lacks_weights(folder: Path) -> str:
    """As pickled_model, and also where there are no weights at all, as after a download that leaves pickles out."""
    if any(folder.glob("*.safetensors")):
        return ""
    return pickled_model(folder) or (
        f"{folder}: holds no weights in safetensors (*.safetensors); add them; a pytorch_model.bin becomes that by "
        "from_pretrained(FOLDER, use_safetensors=False).save_pretrained(FOLDER), where you trust it"
    )


def pickled_adapter(folder: Path) -> str:
    """The same of an adapter whose weights are in adapter_model.bin."""
    if (folder / ADAPTER_WEIGHTS).is_file() or not (folder / "adapter_model.bin").is_file():
        return ""
    code = (
        "from safetensors.torch import save_file; import torch; "
        f'w = torch.load({json.dumps(str(folder / "adapter_model.bin"))}, "cpu", weights_only=True); '
        f"save_file({{k: v.clone().contiguous() for k, v in w.items()}}, {json.dumps(str(folder / ADAPTER_WEIGHTS))})"
    )
    return _line(folder, "adapter_model.bin", code)


def check_report(model: Any, report: dict[str, Any], folder: str | Path) -> None:
    """Raise ValueError unless a file has the model's weights; those of a head or pooling layer may be more or less.

    `report` is that of from_pretrained (output_loading_info) with ignore_mismatched_sizes.
    """
    base = model.base_model
    parts, buffers, prefix = dict(base.named_children()), dict(base.named_buffers()), f"{model.base_model_prefix}."
    unexpected = {key: key.removeprefix(prefix) for key in sorted(report["unexpected_keys"])}
    config_fix = "put back the config.json that belongs to these weights"
    cases = (
        (
            [key for key, path in unexpected.items() if path.split(".")[0] in parts and path not in buffers],
            "holds {} weights that have no place in a {} of its config.json",
            config_fix,
        ),
        (
            sorted(f"{key} {[*found]} in place of {[*wanted]}" for key, found, wanted in report["mismatched_keys"]),
            "holds {} weights in other shapes than a {} of its config.json",
            config_fix,
        ),
        (
            sorted(key for key in report["missing_keys"] if not key.startswith("pooler.")),  # they would be random
            "lacks {} weights of a {}",
            "name a folder that holds the whole model",
        ),
    )
    for keys, problem, fix in cases:
        if keys:
            named = f"{problem.format(len(keys), type(model).__name__)} ({', '.join(keys[:3])})"
            raise ValueError(f"{folder}: the weights file {named}; {fix}")


def say_own_class(model: Any, auto: str, folder: str | Path) -> None:
    """Say once that config.json names a class of its own for `auto` ("AutoModel"), whose code is not run."""
    named = model.config.to_dict().get("auto_map")
    if isinstance(named, dict) and (own := named.get(auto)):
        what = "vectors" if auto == "AutoModel" else "predictions"
        warn_once(
            f"warning: {folder}: config.json names a class of its own ({own}), whose code is not run; the standard "
            f"{type(model).__name__} is used, so check that its {what} are those published"
        )


def say_decoder(model: Any, folder: Path) -> None:
    """Say once that the weights of a folder hold a decoder, where the model is an encoder without one (T5)."""
    if model.config.model_type != "t5":
        return
    left_out = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            left_out += sum(name.startswith(("decoder.", "lm_head.")) for name in file.keys())  # noqa: SIM118 (no mapping)
    if left_out:
        warn_once(f"note: {folder}: {left_out} weights of a decoder are left out; the encoder alone is read")


def _line(folder: Path, found: str, code: str) -> str:
    return (
        f"{folder}: holds its weights as {found}, which can run code when it is read; convert it to safetensors where "
        f"you trust it: python -c {shlex.quote(code)}"
    )


def _architecture(folder: Path) -> str:
    """The class that config.json names if it has a head, which is to be kept; others may be none of transformers'."""
    try:
        (name,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    except (OSError, ValueError, KeyError, TypeError):
        return "AutoModel"
    kept = isinstance(name, str) and name.isidentifier() and re.search("For[A-Z]|LMHead", name)
    return name if kept else "AutoModel"


@cache
def warn_once(line: str) -> None:
    """Print a line to stderr, once a process and on the first rank only."""
    if is_first_rank():
        notice(line)
