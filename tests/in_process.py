"""A run of one small stage in the test's own process. Used by the tests of the launcher and of faults."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import run_python
from recipe_changes import changed

from eval import report
from launcher import run as launcher
from toolkit.export import check as export_check
from toolkit.training import loop


def one_stage(folder: Path, *changes: tuple[str, Any]) -> dict[str, Any]:
    """The first stage of the tiny recipe on a folder of 12 short documents."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    lines = [json.dumps({"text": "\n".join(f"def f{i}_{j}(x): return x" for j in range(6))}) for i in range(12)]
    (data / "documents.jsonl").write_text("\n".join(lines) + "\n")
    recipe = changed(
        ("stages.0.data.sources", [{"folder": str(data)}]),
        ("stages.0.optim.steps", 1),
        ("stages.0.export.merged", False),
    )
    recipe["stages"] = recipe["stages"][:1]
    for key, value in changes:
        *parents, last = key.split(".")
        node: Any = recipe
        for part in parents:
            node = node[int(part)] if part.isdecimal() else node[part]
        node[last] = value
    return recipe


def start(
    folder: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, *options: str, checked: bool = False
) -> int:
    """launcher/run.py in this process, without plots, which take longer than all else.

    Exports are `checked` in a process of the pool instead of a fresh one (see test_export_check, test_end_to_end).
    """
    for name in ("_plot_scores", "_plot_training"):
        monkeypatch.setattr(report, name, lambda *_: [])
    if checked:
        monkeypatch.setattr(export_check, "subprocess", SimpleNamespace(run=_in_pool))
    else:
        monkeypatch.setattr(loop, "check_export", lambda *_: {})
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    monkeypatch.setattr(sys, "argv", ["run.py", str(path), "--output", str(folder / "run"), *options])
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if not torch.distributed.is_initialized():
            monkeypatch.delenv(name, raising=False)
    return launcher.main()


def _in_pool(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess:
    assert command[:2] == [sys.executable, "-m"] and not {"RANK", "WORLD_SIZE"} & env.keys()
    assert command[2] in ("toolkit.export.check", "toolkit.retrieval.sentence_module")
    return run_python(*command[1:], **env)


def files_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
