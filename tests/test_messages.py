"""Every message of the toolkit that names a key, a file, a module or a flag names one that there is."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from toolkit.methods import TABLE
from toolkit.recipe.schema import Recipe, stage_type

ROOT = Path(__file__).parent.parent
PACKAGES = ("toolkit", "eval", "launcher")
HOLE = "{}"  # a value of an f-string
FILE_ENDS = ("json", "jsonl", "parquet", "tsv", "npy", "md", "html", "safetensors", "bin", "py", "gz", "yaml", "model")
# What has a method's name or a file's in front of a dot and is no key of a recipe.
NO_KEYS = {
    "encoder.backbone": "the beginning of weights' names",
    "eval.run": "the command eval.run",
}

STAGE_KEYS = sorted({key for name in TABLE for key in stage_type(name).model_fields} - {"name", "description"})
KEY = re.compile(rf"(?<![\w./])(?:stages\.(?:\d+|{{}})\.)?((?:{'|'.join(STAGE_KEYS)})(?:\.(?:\w+|{{}}))+)")
PATH = re.compile(rf"(?<![\w./-])((?:{'|'.join(PACKAGES)}|recipes|tests|docs)/[\w./]+\.\w+)")
MODULE = re.compile(rf"(?:python -m |--module )((?:{'|'.join(PACKAGES)})(?:\.\w+)*)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]+")
OF_OTHERS = {  # deepspeed's and git's
    "--num_gpus", "--master_addr", "--master_port", "--hostfile", "--module", "--local_rank", "--enable_each_rank_log",
    "--always", "--dirty",
}  # fmt: skip


def texts(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every string that is no docstring; values of f-strings are holes, joined strings are one."""
    tree = ast.parse(source)
    documents = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (documents | inside):
            yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
            yield node.lineno, "".join(map(str, parts))


def sections(annotation: Any) -> set[type[BaseModel]]:
    """The sections that can stand at an annotation, in lists and unions too."""
    if isinstance(annotation, type) and not get_args(annotation):
        return {annotation} if issubclass(annotation, BaseModel) else set()
    return {section for part in get_args(annotation) for section in sections(part)}


def is_key(path: str, method: str | None) -> bool:
    """Whether a path below a stage is one of the schema: of a method, or of any (None)."""
    inside: set[type[BaseModel]] = {stage_type(name) for name in ([method] if method else TABLE)}
    for part in path.split("."):
        if part.isdecimal():
            continue
        named = [(field.alias or name, field) for section in inside for name, field in section.model_fields.items()]
        fields = [field for name, field in named if part in (name, HOLE)]
        below = {section for field in fields for section in sections(field.annotation)}
        if part == HOLE:  # a key, or the number of an entry
            inside |= below
        elif fields:
            inside = below
        else:
            return False
    return True


def wrong_names(module: str, source: str, flags: set[str]) -> list[str]:
    """What the messages of a module name that is not there."""
    found = []
    method = next((name for name, package in TABLE.items() if module.startswith(f"{package}.")), None)
    for line, text in texts(source):
        for path in (match[1] for match in KEY.finditer(text)):
            known = path in NO_KEYS or path.rsplit(".", 1)[-1] in FILE_ENDS
            if not known and not is_key(path, method):
                found.append(f"{module}:{line}: no key {path}")
        for path in (match[1] for match in PATH.finditer(text)):
            if not path.split("/")[-1].split(".")[0].isupper() and not (ROOT / path).exists():
                found.append(f"{module}:{line}: no file {path}")
        for name in (match[1] for match in MODULE.finditer(text)):
            if importlib.util.find_spec(name) is None:
                found.append(f"{module}:{line}: no module {name}")
        found += [f"{module}:{line}: no flag {flag}" for flag in FLAG.findall(text) if flag not in flags]
    return found


def sources() -> dict[str, str]:
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.read_text("utf-8")
        for path in paths
    }


def flags_of(every: dict[str, str]) -> set[str]:
    """The flags that the command lines define."""
    made = (
        node
        for source in every.values()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
    )
    named = (part.value for node in made for part in node.args if isinstance(part, ast.Constant))
    return {name for name in named if isinstance(name, str) and name.startswith("--")} | OF_OTHERS


def test_messages_name_what_there_is() -> None:
    every = sources()
    flags = flags_of(every)
    found = [line for module, source in every.items() for line in wrong_names(module, source, flags)]
    assert not found, "\n".join(found)
    named = [match[1] for source in every.values() for _, text in texts(source) for match in KEY.finditer(text)]
    assert len(named) > 60 and len(set(named)) > 35  # they are looked at


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("toolkit.data.pairs", 'raise ValueError("data.negativs: set it to 0")'),
        ("toolkit.data.pairs", 'raise ValueError(f"data.sources.{number}.limits: lower it")'),
        ("toolkit.methods.contrastive.method", 'raise ValueError("raise data.crops.max_ratio")'),  # another method's
        ("launcher.run", 'print(f"stages.{index}.batch.pools is too small")'),
        ("launcher.run", 'print("see toolkit/recipe.py")'),
        ("launcher.run", 'print("run python -m toolkit.prepare_pairs")'),
        ("launcher.run", 'print("use --outputs")'),
    ],
)
def test_a_wrong_name_is_found(module: str, source: str) -> None:
    assert len(wrong_names(module, source, {"--output"})) == 1


def test_right_names_are_let_through() -> None:
    source = 'print(f"stages.{n}.data.sources.{i}.limit, data.{key} and optim.lr, see recipes/NAME.json; --output")'
    assert wrong_names("launcher.run", source, {"--output"}) == []
    assert Recipe.model_fields.keys() >= {"stages", "seed"}
