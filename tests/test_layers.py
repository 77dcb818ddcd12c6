"""Who may import whom: the layers of the toolkit, read from the source without running it."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("toolkit", "eval", "launcher")
LIGHT = {"toolkit.recipe", "toolkit.files", "toolkit.collectives", "toolkit.determinism"}
ABOVE_MODELS = LIGHT | {f"toolkit.{name}" for name in ("models", "data", "vectors", "embed", "search", "bm25", "words")}

# What of ours each module may import; the longest matching name counts.
OURS = {
    "toolkit.recipe": {"toolkit.recipe_errors", "toolkit.recipe_checks"},
    "toolkit.recipe_checks": {"toolkit.recipe"},
    "toolkit.recipe_errors": set(),
    "toolkit.files": set(),
    "toolkit.collectives": set(),
    "toolkit.determinism": set(),
    "toolkit.slicing": {"toolkit.collectives", "toolkit.data.tokens"},
    "toolkit.losses": set(),
    "toolkit.data": LIGHT | {"toolkit.data"},
    "toolkit.models": {"toolkit.models", "toolkit.data.tokens", "toolkit.losses", "toolkit.last_words"},
    "toolkit.objectives": LIGHT
    | {"toolkit.objectives", "toolkit.models", "toolkit.losses", "toolkit.slicing", "toolkit.data"},
    "toolkit.vectors": LIGHT,
    "toolkit.embed": ABOVE_MODELS,
    "toolkit.search": ABOVE_MODELS,
    "toolkit.bm25": ABOVE_MODELS,
    "toolkit.words": LIGHT,
    "toolkit.prepare": ABOVE_MODELS | {"toolkit.prepare_sources"},
    "toolkit.prepare_build": ABOVE_MODELS | {"toolkit.prepare", "toolkit.prepare_sources"},
    "toolkit.prepare_sources": ABOVE_MODELS,
    "toolkit.prepare_pairs": ABOVE_MODELS | {"toolkit.prepare", "toolkit.prepare_sources"},
    "toolkit.prepare_crops": ABOVE_MODELS | {"toolkit.prepare", "toolkit.prepare_sources"},
    "toolkit.prepare_neighbours": ABOVE_MODELS | {"toolkit.prepare"},
    "toolkit.mining": ABOVE_MODELS | {"toolkit.prepare", "toolkit.mining_advice"},
    "toolkit.mining_advice": LIGHT | {"toolkit.data"},
    "toolkit.prepare_negatives": ABOVE_MODELS
    | {"toolkit.prepare", "toolkit.prepare_pairs", "toolkit.prepare_sources", "toolkit.mining", "toolkit.export"},
    "toolkit.last_words": set(),
    "toolkit.meeting": {"toolkit.last_words", "toolkit.recipe"},
    "toolkit.roll_call": {f"toolkit.{name}" for name in ("collectives", "last_words", "meeting", "recipe", "watch")},
    "toolkit.watch": {"toolkit.last_words", "toolkit.collectives", "toolkit.slicing"},
    "toolkit": {"toolkit"},
    "eval": ABOVE_MODELS
    | {"eval", "toolkit.command", "toolkit.last_words", "toolkit.prepare", "toolkit.roll_call"}
    | {"toolkit.retrievers", "toolkit.retriever_settings"},
    "launcher": {"toolkit", "eval", "launcher"},
}
# What of others the modules that must stay light may import besides the standard library.
OTHERS = {
    "toolkit.recipe": {"pydantic"},
    "toolkit.recipe_errors": {"pydantic"},
    "toolkit.recipe_checks": set(),
    "toolkit.collectives": {"torch"},
    "toolkit.determinism": {"torch", "numpy"},
    "toolkit.slicing": {"torch"},
    "toolkit.losses": {"torch"},
}
DEEPSPEED = {"toolkit.training", "toolkit.export", "toolkit.verify"}


def within(name: str, parents: set[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def imports(source: str) -> set[str]:
    """Full dotted names of everything imported anywhere in a source text."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names}
    return names


def violations(module: str, source: str) -> list[str]:
    found = []
    layer = max((name for name in OURS if within(module, {name})), key=len)
    for name in sorted(imports(source)):
        top = name.split(".")[0]
        allowed_others = next((allowed for light, allowed in OTHERS.items() if within(module, {light})), None)
        if name == "eval" or name.startswith("."):
            found.append(f"{module}: write `from eval.x import y`, and no relative imports ({name})")
        elif top in PACKAGES:
            own_package = layer.startswith("toolkit.") and module != layer and within(name, {layer})
            if not (within(name, OURS[layer]) or own_package):
                found.append(f"{module} must not import {name}")
        elif top == "deepspeed" and not within(module, DEEPSPEED):
            found.append(f"{module} must not import deepspeed")
        elif allowed_others is not None and top not in allowed_others and top not in sys.stdlib_module_names:
            found.append(f"{module} must not import {top}")
    return found


def test_every_module_imports_only_what_its_layer_may():
    found = []
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found += violations(module, path.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("toolkit.recipe", "import torch"),
        ("toolkit.recipe", "def f():\n    from toolkit.collectives import rank"),
        ("toolkit.collectives", "import numpy"),
        ("toolkit.slicing", "from toolkit.models.encoder import Encoder"),
        ("toolkit.losses.contrastive", "from toolkit import collectives"),
        ("toolkit.data.spans", "from toolkit.models.encoder import Encoder"),
        ("toolkit.models.encoder", "from toolkit.data.spans import cut"),
        ("toolkit.models.encoder", "from toolkit import collectives"),
        ("toolkit.objectives.revela", "import deepspeed.zero"),
        ("toolkit.objectives.revela", "from toolkit.training.loop import train_stage"),
        ("toolkit.vectors", "from toolkit.embed import Retriever"),
        ("toolkit.embed", "from toolkit.objectives import Objective"),
        ("toolkit.training.loop", "from eval.evaluate import evaluate"),
        ("toolkit.export", "from launcher.run import main"),
        ("eval.evaluate", "from toolkit.training.loop import train_stage"),
        ("eval.evaluate", "from toolkit.objectives import Objective"),
        ("launcher.run", "import eval"),
        ("launcher.run", "from deepspeed import initialize"),
        ("toolkit.training.loop", "from .checkpoint import save"),
    ],
)
def test_each_rule_is_able_to_fail(module, source):
    assert len(violations(module, source)) == 1
