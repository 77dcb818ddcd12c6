"""docs/architecture.md: its tree names every module, each with the first sentence of the module's docstring.

`UPDATE_DOCS=1 pytest tests/test_architecture.py` writes the tree anew, after a module came, went or changed its words.
"""

import ast
import os
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("toolkit", "launcher", "eval")
PAGE = ROOT / "docs" / "architecture.md"
TREE = re.compile(r"(?<=<!-- tree -->\n```\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)
SENTENCE = re.compile(r".*?\.(?=\s+[A-Z`]|$)")  # ends at a full stop before a capital: not inside "run.py" or "e.g. x"
WIDTH = 30  # of the names


def caption(path: Path) -> str:
    """The first sentence of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    found = SENTENCE.match(" ".join(text.partition("\n\n")[0].split()))
    return found.group().removesuffix(".") if found else ""


def tree(folder: Path, depth: int = 0) -> list[str]:
    """A line for a package and each of its modules, packages last."""
    lines = [_line(f"{folder.name}/", folder / "__init__.py", depth)]
    modules = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    lines += [_line(path.name, path, depth + 1) for path in modules]
    for below in sorted(path.parent for path in folder.glob("*/__init__.py")):
        lines += tree(below, depth + 1)
    return lines


def _line(name: str, path: Path, depth: int) -> str:
    return f"{'  ' * depth + name:<{WIDTH}} {caption(path)}"


def test_the_tree_is_that_of_the_source() -> None:
    expected = "\n".join(line for package in PACKAGES for line in tree(ROOT / package)) + "\n"
    text = PAGE.read_text(encoding="utf-8")
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(TREE.sub(lambda _: expected, text), encoding="utf-8")
        text = PAGE.read_text(encoding="utf-8")
    found = TREE.findall(text)
    assert found == [expected], "UPDATE_DOCS=1 pytest tests/test_architecture.py writes the tree anew"


def test_every_module_has_a_caption() -> None:
    modules = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(modules) > 100
    assert [path for path in modules if not caption(path)] == []


def test_a_caption_is_the_first_sentence(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    for text, expected in {
        '"""Reads run.py and log.jsonl. Called by none."""': "Reads run.py and log.jsonl",
        '"""One\ntwo, as in `a.b`.\n\nThree."""': "One two, as in `a.b`",
        "x = 1": "",
    }.items():
        path.write_text(text)
        assert caption(path) == expected
