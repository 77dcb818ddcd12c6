"""Where a run takes place: what is written into environment.json. Called by launcher/stages.py on rank 0."""

import platform
import subprocess
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from eval.results import installed
from toolkit.collectives import world_size
from toolkit.training.loop import command

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "sentence-transformers", "mteb", "bm25s")
PACKAGES += ("faiss-cpu", "faiss-gpu", "pytrec-eval-terrier", "scipy", "numpy")


def environment() -> dict[str, Any]:
    """Where a run takes place: command, versions, machine; no variable of the environment."""
    return {
        "command": command(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "world_size": world_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"toolkit": f"{version('toolkit')} {_commit()}".strip(), **installed(PACKAGES)},
    }


def _commit() -> str:
    """The checkout's commit, "-dirty" behind it if files differ from it; empty without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return ""
