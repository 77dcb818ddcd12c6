"""Files of a model folder before it is loaded: weights in safetensors only, and how others become that.

Called by whatever names a folder with a model or an adapter.
"""

import json
import shlex
from functools import cache
from pathlib import Path

from toolkit.last_words import is_first_rank, notice

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


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


def _line(folder: Path, found: str, code: str) -> str:
    return (
        f"{folder}: holds its weights as {found}, which can run code when it is read; convert it to safetensors where "
        f"you trust it: python -c {shlex.quote(code)}"
    )


def _architecture(folder: Path) -> str:
    """The class that config.json names: a language model's head is to be kept."""
    try:
        (name,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    except (OSError, ValueError, KeyError, TypeError):
        return "AutoModel"
    return name if isinstance(name, str) and name.isidentifier() else "AutoModel"


@cache
def warn_once(line: str) -> None:
    """Print a line to stderr, once a process and on the first rank only."""
    if is_first_rank():
        notice(line)
