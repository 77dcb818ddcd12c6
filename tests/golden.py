"""Golden losses of the tiny recipes: what each step of a run logged, on a library of made-up source files.

`UPDATE_GOLDEN=1 pytest tests/launcher/test_tiny_recipes.py` writes them anew, after a change that is meant to change
numbers.
"""

import json
import os
import platform
import random
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent / "fixtures" / "golden"
KEYS = ("stage", "step", "loss", "grad_norm", "tokens", "rows")
ELSEWHERE = 2e-4  # relative: other processors and versions of torch order their sums in other ways

NOUNS = "queue task reader frame record lock stream signal handler buffer token socket level filter format".split()  # noqa: SIM905
VERBS = "open close read write parse cancel wait flush emit merge split append lower check resume".split()  # noqa: SIM905
ENDS = ["once it is ready", "or raise an error", "without waiting", "in order", "from the left", "as one line"]


def write_library(folder: Path) -> Path:
    """Two packages of 24 modules of documented functions, the same everywhere; named as packages that Python has."""
    draw = random.Random(5)
    for package in ("asyncio", "logging"):
        (folder / package).mkdir(parents=True)
        for module in range(12):
            functions = [_function(draw, f"{package}_{module}_{number}") for number in range(9)]
            text = f'"""Functions of {package}, part {module}."""\n\nimport os\n\n\n' + "\n\n\n".join(functions) + "\n"
            (folder / package / f"{draw.choice(NOUNS)}_{module}.py").write_text(text, encoding="utf-8")
    return folder


def _function(draw: random.Random, tail: str) -> str:
    verb, noun, other = draw.choice(VERBS), draw.choice(NOUNS), draw.choice(NOUNS)
    lines = [f"def {verb}_{noun}_{tail}({noun}, {other}_count=None):"]
    lines.append(f'    """{verb.capitalize()} the {noun} of each {other} {draw.choice(ENDS)}, number {tail}."""')
    for _ in range(draw.randrange(3, 12)):
        left, right = draw.choice(NOUNS), draw.choice(NOUNS)
        lines.append(f"    {left}_{draw.choice(VERBS)} = {noun}.{draw.choice(VERBS)}({right!r}, {other}_count)")
    return "\n".join([*lines, f"    return {noun}.{verb}({draw.randrange(100)})"])


def _machine() -> dict[str, str]:
    processor = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "processor": processor.partition(":")[2].strip() or platform.machine(),
        "capability": capability,
        "torch": torch.__version__.partition("+")[0],
    }


def check_golden(name: str, run: Path) -> None:
    """The log of a run is the one that was recorded: to the bit on the same processor and torch, else within 2e-4."""
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [{key: line[key] for key in KEYS} for line in logged]
    path = FOLDER / f"{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(f"    {json.dumps(step)}" for step in steps)
        path.write_text(f'{{\n  "machine": {json.dumps(_machine())},\n  "steps": [\n{lines}\n  ]\n}}\n')
    golden: dict[str, Any] = json.loads(path.read_text())
    if golden["machine"] == _machine():
        assert steps == golden["steps"]
        return
    for step, recorded in zip(steps, golden["steps"], strict=True):
        for key, value in recorded.items():
            near = isinstance(value, float)
            assert step[key] == (pytest.approx(value, rel=ELSEWHERE) if near else value), (name, recorded, key)
