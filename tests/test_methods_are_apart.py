"""Nobody else knows a method: its name, its objective's class and its own keys stand in its folder and in the table."""

import ast
import re
from collections.abc import Collection
from pathlib import Path

import pytest
from pydantic import BaseModel

import toolkit.methods.keys
from toolkit.methods import TABLE

ROOT = Path(__file__).parent.parent
# The file of losses, named as the literature names them, and the same word about losses are no method's name; nor is
# that of a paper, in capitals, whose batches are for every method on pairs.
LOSSES = re.compile(r"toolkit\.losses\.contrastive|contrastive loss|(?-i:\bCDE\b)", re.IGNORECASE)


def folder_of(name: str) -> Path:
    return ROOT / TABLE[name].replace(".", "/")


def classes(folder: Path, base: str) -> set[str]:
    """Names of the classes of a folder's modules that are a direct subclass of `base`."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in folder.rglob("*.py")]
    found = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {node.name for node in found if base in [b.id for b in node.bases if isinstance(b, ast.Name)]}


def fields(path: Path) -> set[str]:
    """Names of the annotated fields of all classes of a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    found = [node.target for body in bodies for node in body if isinstance(node, ast.AnnAssign)]
    return {target.id for target in found if isinstance(target, ast.Name)}


SHARED_KEYS = set().union(*(fields(path) for path in (ROOT / "toolkit" / "recipe").glob("*.py")))
# What the methods on pairs share, their keys among it, which nobody else knows.
OF_PAIRS = [ROOT / "toolkit" / "methods" / name for name in ("pair_keys.py", "pair_loss.py", "pairs.py")]
PAIR_KEYS = fields(OF_PAIRS[0]) - SHARED_KEYS
KEYS = set().union(*(fields(folder_of(name) / "keys.py") for name in TABLE), PAIR_KEYS) - SHARED_KEYS
OBJECTIVES = set().union(*(classes(folder_of(name), "Objective") for name in TABLE))
NAMED = re.compile("|".join([*TABLE, *(rf"\b{name}\b" for name in sorted(OBJECTIVES))]), re.IGNORECASE)


def knows(source: str, allowed: Collection[str] = ()) -> list[str]:
    """Lines of a module that name a method, an objective's class, or a key that one method alone has."""
    found = []
    of_sections = re.compile(rf"\b(?:objective|data)\.(?:{'|'.join(sorted(KEYS - set(allowed)))})\b")
    for number, line in enumerate(source.splitlines(), 1):
        text = LOSSES.sub("", line).replace("language model", "")
        if NAMED.search(text) or of_sections.search(text):
            found.append(f"{number}: {line.strip()}")
    return found


def test_no_module_outside_its_folder_knows_a_method():
    own = [folder_of(name) for name in TABLE]
    table = ROOT / "toolkit" / "methods" / "__init__.py"
    paths = [path for package in ("toolkit", "launcher", "eval") for path in sorted((ROOT / package).rglob("*.py"))]
    others = [path for path in paths if path != table and not any(path.is_relative_to(folder) for folder in own)]
    found = []
    for path in others:
        lines = knows(path.read_text(encoding="utf-8"), PAIR_KEYS if path in OF_PAIRS else ())
        found += [f"{path.relative_to(ROOT)}:{line}" for line in lines]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        'if stage.objective.name == "revela":',
        "from toolkit.methods.contrastive.objective import Contrastive",
        "# ReContriever draws crops here",
        "def f(language_model): ...",
        "isinstance(objective, LanguageModel)",
        "tau = stage.objective.temperature",
        'yield f"{at}.data.crops", "is missing"',
        '"""Rows of the contrastive objective."""',
    ],
)
def test_what_names_a_method_is_found(source):
    assert knows(source)


def test_plain_words_are_no_names():
    assert {"temperature", "crops", "near_duplicates"} <= KEYS and "Revela" in OBJECTIVES
    assert not SHARED_KEYS & KEYS and issubclass(toolkit.methods.keys.Section, BaseModel)
    for line in ("a language model with its head", "from toolkit.losses.contrastive import info_nce", "data.sources"):
        assert knows(line) == []
