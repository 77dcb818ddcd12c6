"""The embedded corpus: the source files of this Python's own standard library, as training text and as a collection.

Called by the readers of training data and by evaluation. It depends on the Python version: see `summary`.
"""

import ast
import functools
import hashlib
import re
import sys
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from toolkit.data.records import Collection
from toolkit.recipe.errors import RecipeError

STDLIB = Path(sysconfig.get_path("stdlib"))
TESTS_AND_INSTALLED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib-dynload", "__pycache__"}
# Applications and packages that many distributions leave out or ship apart; without them machines agree better.
OFTEN_ABSENT = {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo"}
MACHINE_MADE = re.compile(r"auto-?generated|generated from '|do not edit", re.IGNORECASE)
SHORTEST_QUERY = 4  # words

Split = Literal["train", "dev", "test"]
Scope = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Documented(NamedTuple):
    """A function or class with a docstring: its query is the docstring's first paragraph."""

    id: str
    query: str
    code: str


class Corpus(NamedTuple):
    training: tuple[tuple[str, str], ...]  # (file name, source without dev and test docstrings)
    documented: tuple[Documented, ...]


def training_files(folder: Path = STDLIB) -> list[tuple[str, str]]:
    """(name, source) of every file, without the docstrings of the dev and test splits; sorted by name."""
    return list(_read(folder).training)


def collection(split: Split, folder: Path = STDLIB) -> Collection:
    """Retrieval from docstring to code.

    Documents, the same in every split: each documented function or class with its own docstring and those inside it
    removed. Queries: first paragraphs of the split's docstrings, at least 4 words long and found only once (for dev and
    test: nowhere in the training text either, be it in a comment or a string).
    """
    documented = _read(folder).documented
    asked = _queries(folder)[split]
    return Collection(
        name=f"stdlib:{split}",
        documents={item.id: item.code for item in documented},
        queries={f"q:{item.id}": item.query for item in asked},
        qrels={f"q:{item.id}": {item.id: 1} for item in asked},
    )


@functools.cache
def summary(folder: Path = STDLIB) -> Mapping[str, int | str]:
    """Python version, numbers of files, documents and queries per split, and a digest of all text."""
    corpus = _read(folder)
    text = repr((corpus.training, corpus.documented))
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "files": len(corpus.training),
        "documents": len(corpus.documented),
        **{f"{split}_queries": len(collection(split, folder).queries) for split in ("train", "dev", "test")},
        "digest": hashlib.sha256(text.encode()).hexdigest()[:16],
    }


def split_of(paragraph: str) -> Split:
    """train (75 %), dev (10 %) or test (15 %) by a hash of the paragraph's words; equal paragraphs stay together."""
    hundredth = int.from_bytes(hashlib.blake2b(_key(paragraph).encode(), digest_size=8).digest(), "little") % 100
    return "train" if hundredth < 75 else "dev" if hundredth < 85 else "test"


@functools.cache
def _queries(folder: Path) -> dict[Split, list[Documented]]:
    corpus = _read(folder)
    seen = Counter(_key(item.query) for item in corpus.documented)
    training = _key(" ".join(source for _, source in corpus.training))
    queries: dict[Split, list[Documented]] = {"train": [], "dev": [], "test": []}
    for item in corpus.documented:
        split = split_of(item.query)
        fit = seen[_key(item.query)] == 1 and len(item.query.split()) >= SHORTEST_QUERY
        if fit and (split == "train" or _key(item.query) not in training):
            queries[split].append(item)
    return queries


def _key(paragraph: str) -> str:
    return " ".join(paragraph.casefold().split())


# --------------------------------------------------------------------------- files


def _source_files(folder: Path) -> Iterator[tuple[str, str, ast.Module]]:
    """(name, source, tree) of the library's hand-written files that this Python can parse; line ends are newlines."""
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        parts = path.relative_to(folder).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or parts[0] in OFTEN_ABSENT or TESTS_AND_INSTALLED & set(parts):
            continue
        try:
            with tokenize.open(path) as file:
                source = file.read()
            tree = parse(source)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # not Python of this version, as Python itself finds
        if not MACHINE_MADE.search(source[:600]):
            yield path.relative_to(folder).as_posix(), source, tree


def parse(source: str) -> ast.Module:
    """The syntax tree of a source text, without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the library's own strings are no concern of the user
        return ast.parse(source)


@functools.cache
def _read(folder: Path) -> Corpus:
    training: list[tuple[str, str]] = []
    documented: list[Documented] = []
    for name, source, tree in _source_files(folder):
        lines = source.encode().split(b"\n")  # ast counts columns in UTF-8 bytes and lines by newline
        found = list(_docstrings(tree))
        training.append((name, _without([d for d in found if split_of(d.paragraph) != "train"], lines, 1, len(lines))))
        for own in found:
            if isinstance(own.scope, ast.Module) or not own.paragraph:
                continue
            first = min([own.scope.lineno, *(decorator.lineno for decorator in own.scope.decorator_list)])
            last = _last_line(own.scope)
            inside = [d for d in found if first <= d.statement.lineno <= last]
            code = _unindented(_without(inside, lines, first, last))
            documented.append(Documented(f"{name}:{own.path}:{own.scope.lineno}", own.paragraph, code))
    if not training:
        raise RecipeError(f"data: this Python has no source files of its standard library at {folder}; install them")
    return Corpus(tuple(training), tuple(documented))


# --------------------------------------------------------------------------- docstrings


class Docstring(NamedTuple):
    path: str  # dotted path of its scope; empty for the module
    scope: Scope
    statement: ast.Expr
    paragraph: str  # the first one, its white space made single spaces


def _docstrings(node: ast.AST, path: str = "") -> Iterator[Docstring]:
    """Every docstring below a node, in the order of the source."""
    if isinstance(node, Scope) and node.body and isinstance(node.body[0], ast.Expr):
        text = ast.get_docstring(node)
        if text is not None:
            paragraph = " ".join(re.split(r"\n\s*\n", text.strip())[0].split())
            yield Docstring(path, node, node.body[0], paragraph)
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _docstrings(child, f"{path}.{child.name}".lstrip(".") if named else path)


def _last_line(node: ast.stmt) -> int:
    assert node.end_lineno is not None  # ast.parse always sets it
    return node.end_lineno


def _unindented(code: str) -> str:
    """Moved left by the first line's indent; lines of a string that stand further left stay where they are."""
    indent = code[: len(code) - len(code.lstrip())]
    return "\n".join(line.removeprefix(indent) for line in code.split("\n"))


def _without(docstrings: list[Docstring], lines: list[bytes], first: int, last: int) -> str:
    """Lines first..last (from 1, inclusive) without some docstrings; a body left empty becomes `pass`."""
    kept = lines[first - 1 : last]
    for docstring in reversed(docstrings):  # from the bottom, so that line numbers above stay true
        statement = docstring.statement
        top, bottom = statement.lineno - first, _last_line(statement) - first
        before, after = kept[top][: statement.col_offset], kept[bottom][statement.end_col_offset :]
        if len(docstring.scope.body) == 1 and not isinstance(docstring.scope, ast.Module):
            rest = before + b"pass" + after
        else:
            rest = before + re.sub(rb"^\s*;\s*", b"", after)
        if not rest.strip():  # the blank lines that set the docstring apart go with it
            while bottom + 1 < len(kept) and not kept[bottom + 1].strip():
                bottom += 1
        kept[top : bottom + 1] = [rest] if rest.strip() else []
    return b"\n".join(kept).decode()
