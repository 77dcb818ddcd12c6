"""Who may import whom, read from the source without running it: rooms, circles, imports inside functions."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

from toolkit.methods import TABLE

ROOT = Path(__file__).parent.parent
PACKAGES = ("toolkit", "eval", "launcher")

GROUND = {"toolkit.files", "toolkit.collectives", "toolkit.determinism"}
# What a recipe says: its sections, a method's keys, and the table that tells where those are. Torch is not imported.
SAID = {"toolkit.recipe", "toolkit.methods", "toolkit.methods.keys"}
SAID_OF_METHODS = {"toolkit.recipe", "toolkit.methods.keys", "toolkit.methods.pair_keys"}
TEXTS = GROUND | {"toolkit.recipe", "toolkit.data"}
MODELS = TEXTS | {"toolkit.slicing", "toolkit.ranks", "toolkit.models"}
SEARCH = MODELS | {"toolkit.losses", "toolkit.export", "toolkit.retrieval"}
METHOD_PARTS = ["keys", "method", "shared", "costs", "pairs", "pair_keys", "pair_loss", "passages", "preview"]
METHOD_PARTS += ["objective"]
ONE_METHOD = SEARCH | {"toolkit.prepare"} | {f"toolkit.methods.{name}" for name in METHOD_PARTS}
EVERYTHING = ONE_METHOD | SAID | {"toolkit.checkpoint", "toolkit.training"}

# What of ours each module may import besides its own room; the longest matching name counts.
# "toolkit.methods" stands for the table alone; a method's folder is in nobody's list.
OURS: dict[str, set[str]] = {
    "toolkit.files": set(),
    "toolkit.collectives": set(),
    "toolkit.determinism": set(),
    "toolkit.losses": set(),
    "toolkit.recipe": set(),
    "toolkit.recipe.schema": {"toolkit.recipe", "toolkit.methods"},
    "toolkit.recipe.checks": {"toolkit.recipe", "toolkit.methods"},
    "toolkit.data": GROUND | {"toolkit.recipe"},
    "toolkit.slicing": {"toolkit.collectives", "toolkit.data.tokens"},
    "toolkit.ranks": GROUND | {"toolkit.recipe.errors", "toolkit.slicing"},
    "toolkit.models": {
        *("toolkit.data.tokens", "toolkit.losses", "toolkit.ranks.last_words"),
        *("toolkit.recipe.errors", "toolkit.recipe.models", "toolkit.recipe.context"),
    },
    "toolkit.export": MODELS,
    "toolkit.retrieval": MODELS | {"toolkit.export"},
    "toolkit.prepare": SEARCH,
    "toolkit.prepare.start_settings": SEARCH | {"toolkit.prepare", "toolkit.methods"},  # of a whole recipe
    "toolkit.methods": {"toolkit.methods.keys", "toolkit.methods.method"},  # the types of what it loads late
    **dict.fromkeys((name for name in ONE_METHOD if name.startswith("toolkit.methods.")), ONE_METHOD),
    **dict.fromkeys(TABLE.values(), ONE_METHOD),
    "toolkit.methods.pair_keys": {"toolkit.recipe"},
    **{f"{folder}.keys": SAID_OF_METHODS for folder in TABLE.values()},
    "toolkit.checkpoint": SEARCH | {"toolkit.prepare"},
    "toolkit.training": EVERYTHING,
    "toolkit.mine": SEARCH | {"toolkit.prepare"},
    "toolkit.generate": SEARCH | {"toolkit.prepare"},
    "toolkit": set(),
    "eval": SEARCH,
    "launcher": EVERYTHING | {"eval"},
}

# What of others the modules that must stay light may import besides the standard library.
OTHERS = {
    "toolkit.recipe": {"pydantic", "pydantic_core", "typing_extensions"},
    **{key: {"pydantic"} for key in ("toolkit.methods.keys", "toolkit.methods.pair_keys")},
    **{f"{folder}.keys": {"pydantic"} for folder in TABLE.values()},
    "toolkit.collectives": {"torch"},
    "toolkit.determinism": {"torch", "numpy"},
    "toolkit.slicing": {"torch"},
    "toolkit.losses": {"torch"},
    "toolkit.files": set(),
    "launcher.run": set(),  # but inside its functions
    "toolkit.ranks.last_words": set(),
    "toolkit.ranks.meeting": set(),
    "toolkit.ranks.mpi": set(),
}
DEEPSPEED = {"toolkit.training.engine", "toolkit.ranks.process_group"}

# Functions that may import, each with a comment beside the import on what it saves.
INSIDE = {
    "launcher.run": {"_dry_run", "_run"},
    "toolkit.ranks.last_words": {"_tell_alone", "is_told_by_another", "_client"},
    "toolkit.export.check": {"_plain"},
    "toolkit.generate.__main__": {"main"},
    "toolkit.generate.engines": {"open_engine"},
    "toolkit.generate.estimate": {"token_counter"},
    "toolkit.generate.order": {"find_search", "retriever_of"},
    "toolkit.retrieval.retrievers": {"_sentence_transformer"},
    "toolkit.retrieval.search": {"faiss_module"},
    "toolkit.data.hub": {"hub_dataset", "first_of_hub"},
    "toolkit.data.source_files": {"_hub_splits"},
    "eval.folders": {"_load_hub_layout"},
    "eval.mteb_encoder": {"__init__", "similarity", "similarity_pairwise", "score"},
    "eval.mteb_files": {"write_task", "write_aggregates"},
    "eval.suite_checks": {"check_suite", "check_on_hub", "_check_folder"},
    "eval.suites": {"check_prompts", "find_tasks", "_mteb_tasks"},
}


class Import(NamedTuple):
    name: str  # dotted, with what is taken from the module
    line: int
    function: str  # the innermost one that it stands in; "" at the top of a module


def within(name: str, parents: set[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def imports(tree: ast.AST, function: str = "") -> Iterator[Import]:
    """Everything that is imported anywhere in a module, below `if TYPE_CHECKING` too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                Import(f"{'.' * node.level}{node.module}.{alias.name}", node.lineno, function) for alias in node.names
            )
        inside = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
        yield from imports(node, inside)


def may_import(module: str, name: str) -> bool:
    """Whether a module may import a name of ours."""
    layer = max((room for room in OURS if within(module, {room})), key=len)
    if layer != module and within(name, {layer}):  # a module of the same room
        return True
    if name.startswith("toolkit.methods."):  # the table, by a function of it, or one of the modules that are named
        target = ".".join(name.split(".")[:3])
        in_table = target not in MODULES
        return target in OURS[layer] if not in_table else "toolkit.methods" in OURS[layer]
    return within(name, OURS[layer])


def violations(module: str, source: str) -> list[str]:
    found = []
    comments = source.splitlines()
    for name, line, function in imports(ast.parse(source)):
        top = name.split(".")[0]
        light = max((room for room in OTHERS if within(module, {room})), key=len, default=None)
        if name == "eval" or name.startswith("."):
            found.append(f"{module}: write `from eval.x import y`, and no relative imports ({name})")
        elif top in PACKAGES and not may_import(module, name):
            found.append(f"{module} must not import {name}")
        elif top == "deepspeed" and module not in DEEPSPEED:
            found.append(f"{module} must not import deepspeed")
        elif top not in PACKAGES and top not in sys.stdlib_module_names and light is not None:
            inside = module in INSIDE and function in INSIDE[module]
            if top not in OTHERS[light] and not inside:
                found.append(f"{module} must not import {top}")
        if function and function not in INSIDE.get(module, set()):
            found.append(f"{module}: {function} imports {name}; import it at the top, or say here what that saves")
        elif function and not _is_explained(comments, line):
            found.append(f"{module}: line {line} lacks a comment on what the import inside {function} saves")
    return found


def _is_explained(lines: list[str], line: int) -> bool:
    """Whether an import or the block of imports and comments that it ends has a comment (not one for pyright)."""
    number = line - 1
    while number >= 0 and lines[number].strip().startswith(("from ", "import ", "#")):
        comment = lines[number].partition("#")[2].strip()
        if comment and not comment.startswith("pyright:"):
            return True
        number -= 1
    return False


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {module_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
MODULES = set(SOURCES)


def graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> the modules that it imports, at its top or inside a function, and what the table loads late."""
    edges: dict[str, set[str]] = {}
    for module, source in sources.items():
        edges[module] = set()
        for name, _, _ in imports(ast.parse(source)):
            target = next((part for part in (name, name.rpartition(".")[0]) if part in sources), module)
            edges[module] |= {target} - {module}
    late = {f"{folder}.{part}" for folder in TABLE.values() for part in ("keys", "method")}
    edges.setdefault("toolkit.methods", set()).update(late & sources.keys())
    return edges


def room_of(module: str) -> str:
    """A package, or a module that stands alone; what a recipe says is one room, wherever its sections stand."""
    if within(module, {"toolkit.recipe"}) or module == "toolkit.methods" or module.endswith((".keys", ".pair_keys")):
        return "what a recipe says"
    parts = module.split(".")
    if parts[0] != "toolkit":
        return parts[0]
    return ".".join(parts[:3]) if within(module, set(TABLE.values())) else ".".join(parts[:2])


def rooms(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """Room -> the rooms that it imports; what the table loads late, by name, is no import."""
    found: dict[str, set[str]] = {}
    for module, targets in edges.items():
        if module != "toolkit.methods":
            found.setdefault(room_of(module), set()).update(room_of(name) for name in targets)
    return {room: targets - {room} for room, targets in found.items()}


def circle(edges: dict[str, set[str]]) -> list[str]:
    """A circle of imports, empty if there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_module_imports_only_what_its_layer_may():
    found = [line for module, path in SOURCES.items() for line in violations(module, path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_no_circle_of_imports():
    """Neither of modules, counting imports inside functions and for types alone, nor of rooms."""
    edges = graph({module: path.read_text(encoding="utf-8") for module, path in SOURCES.items()})
    assert circle(edges) == []
    assert circle(rooms(edges)) == []


def test_the_list_of_functions_that_import_holds_no_other():
    for module, functions in INSIDE.items():
        found = {each.function for each in imports(ast.parse(SOURCES[module].read_text(encoding="utf-8")))} - {""}
        assert found == functions, module
    for module in DEEPSPEED:
        assert "deepspeed" in {each.name for each in imports(ast.parse(SOURCES[module].read_text(encoding="utf-8")))}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("toolkit.recipe.schema", "import torch"),
        ("toolkit.recipe.models", "from toolkit.collectives import rank"),
        ("toolkit.recipe.models", "from toolkit.methods import keys_of"),
        ("toolkit.methods.keys", "import numpy"),
        ("toolkit.methods.keys", "from toolkit.recipe.schema import Recipe\nimport torch"),
        ("toolkit.methods.revela.keys", "import torch"),
        ("toolkit.methods.revela.keys", "from toolkit.methods.shared import encode"),
        ("toolkit.methods.revela.keys", "from toolkit.methods.contrastive.keys import KEYS"),
        ("toolkit.methods.revela.objective", "from toolkit.methods.contrastive.objective import Contrastive"),
        ("toolkit.methods.revela.objective", "import deepspeed.zero"),
        ("toolkit.methods.revela.objective", "from toolkit.training.loop import train_stage"),
        ("toolkit.methods.shared", "from toolkit.methods.revela.objective import Revela"),
        ("toolkit.methods.shared", "from toolkit.methods import method_of"),
        ("toolkit.collectives", "import numpy"),
        ("toolkit.slicing", "from toolkit.models.encoder import Encoder"),
        ("toolkit.losses.contrastive", "from toolkit import collectives"),
        ("toolkit.data.spans", "from toolkit.models.encoder import Encoder"),
        ("toolkit.models.encoder", "from toolkit.data.spans import cut"),
        ("toolkit.models.encoder", "from toolkit import collectives"),
        ("toolkit.export.write", "from toolkit.retrieval.embed import encode"),
        ("toolkit.export.write", "import deepspeed"),
        ("toolkit.retrieval.embed", "from toolkit.prepare.models import resolve_model"),
        ("toolkit.retrieval.embed", "from toolkit.methods.objective import Objective"),
        ("toolkit.prepare.pairs", "from toolkit.methods import keys_of"),
        ("toolkit.training.loop", "from toolkit.methods.revela.objective import Revela"),
        ("toolkit.training.loop", "from eval.evaluate import evaluate"),
        ("toolkit.training.loop", "from .checkpoint import save"),
        ("toolkit.export.write", "from launcher.run import main"),
        ("eval.evaluate", "from toolkit.training.loop import train_stage"),
        ("eval.evaluate", "from toolkit.methods.objective import Objective"),
        ("eval.evaluate", "from toolkit.methods import method_of"),
        ("launcher.stages", "import eval"),
        ("launcher.stages", "from deepspeed import initialize"),
        ("launcher.stages", "from toolkit.methods.revela.keys import KEYS"),
        ("launcher.run", "import torch"),
        ("launcher.run", "def _run():\n    from toolkit.ranks.watch import Watch"),
        ("launcher.stages", "def f():\n    from eval.evaluate import evaluate  # takes seconds"),
    ],
)
def test_each_rule_is_able_to_fail(module, source):
    assert violations(module, source)


def test_circles_are_found():
    edges = graph({"eval.a": "def f():\n    from eval.b import x", "eval.b": "import eval.a"})
    assert set(circle(edges)) == {"eval.a", "eval.b"}
    apart = {"toolkit.data.a": "import toolkit.models.b", "toolkit.models.b": ""}
    apart["toolkit.models.c"] = "import toolkit.data.a"
    assert circle(graph(apart)) == [] and circle(rooms(graph(apart)))
    late = {"toolkit.methods": "", "toolkit.methods.revela.keys": "import toolkit.recipe.schema"}
    late["toolkit.recipe.schema"] = "from toolkit import methods"
    assert circle(graph(late))
