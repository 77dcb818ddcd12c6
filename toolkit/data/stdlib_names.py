"""Names and bodies of the embedded corpus' functions and classes, as pairs. Called by the readers of pairs."""

import ast
from collections.abc import Iterator
from pathlib import Path

from toolkit.data.stdlib_corpus import STDLIB, parse, training_files

FEWEST_LINES, MOST_LINES = 4, 60


def named_code(folder: Path = STDLIB) -> Iterator[tuple[str, str]]:
    """(name, code without that name) of every function and class of at least 4 lines in the training files.

    The name is without outer underscores, after that of its class if it has one. The code is its first 60 lines with
    the name taken out of the line that defines it; docstrings of dev and test are not in these files.
    """
    for _, source in training_files(folder):
        yield from _definitions(parse(source), source.split("\n"), "")


def _definitions(node: ast.AST, lines: list[str], owner: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _definitions(child, lines, owner)
            continue
        assert child.end_lineno is not None  # ast.parse always sets it
        code = lines[child.lineno - 1 : child.end_lineno]
        if len(code) >= FEWEST_LINES:
            rest = [code[0].replace(child.name, "", 1), *code[1:MOST_LINES]]
            yield f"{owner} {child.name.strip('_')}".strip(), "\n".join(rest)
        yield from _definitions(child, lines, child.name if isinstance(child, ast.ClassDef) else "")
