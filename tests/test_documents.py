"""The documents: their links lead somewhere, the paths they name exist, and key tables are those of the schema."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from launcher.run import main

ROOT = Path(__file__).parent.parent
METHODS = sorted((ROOT / "docs" / "methods").glob("*.md"))
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
# A word that begins in one of our folders; "start/eval/" is in the folder of a run.
PATH = re.compile(r"(?<![\w./-])(?:toolkit|launcher|eval|tests|recipes|docs)/[\w./-]+")
UNKNOWN = "zzzzzzzz"  # a key near none: its error lists those that there are
# What a section needs before its keys are looked at; of several kinds the one with the most keys.
KIND = {"data.neighbours": {"by": "bm25"}, "data.mine": {"by": "bm25"}}


def parsed(text: str) -> list[Token]:
    """The tokens of a document, those of its lines in place of the lines."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    return [part for token in tokens for part in (token, *(token.children or []))]


@cache
def anchors(text: str) -> set[str]:
    """The fragments of a document's headings, as GitHub names them."""
    tokens = parsed(text)
    titles = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
    seen: Counter[str] = Counter()
    found = set()
    for slug in slugs:
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken_links(document: Path) -> Iterator[str]:
    """Relative links that lead to no file, or to no heading of it."""
    links = [
        token.attrGet("href") for token in parsed(document.read_text(encoding="utf-8")) if token.type == "link_open"
    ]
    for link in map(str, links):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, fragment = unquote(link).partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists():
            yield f"{document.name}: {link} leads to no file"
        elif fragment and fragment not in anchors(target.read_text(encoding="utf-8")):
            yield f"{document.name}: {link} leads to no heading"


def missing_paths(document: Path) -> Iterator[str]:
    """Paths in our folders that do not exist; names in capitals stand for any (recipes/NAME.json)."""
    for path in dict.fromkeys(
        found.group().rstrip(".") for found in PATH.finditer(document.read_text(encoding="utf-8"))
    ):
        if not (ROOT / path).exists() and not Path(path).stem.isupper():
            yield f"{document.name}: {path} does not exist"


def tabled_keys(text: str) -> list[str]:
    """The first column of the table under the heading "Keys"."""
    _, _, section = text.partition("\n## Keys\n")
    tokens = parsed(section.partition("\n## ")[0])
    kinds = [token.type for token in tokens]
    rows = [place for place, pair in enumerate(pairwise(kinds)) if pair == ("tr_open", "td_open")]
    return [tokens[place + 3].content for place in rows]  # after row, cell and line: the first part of the line


def known_keys(method: str, section: str, folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The keys of a section (objective.queue) of a stage of this method, as the error for an unknown one lists them."""
    recipe = json.loads((ROOT / "recipes" / "tiny" / f"{method}.json").read_text(encoding="utf-8"))
    number = next(i for i, stage in enumerate(recipe["stages"]) if stage["objective"]["name"] == method)
    *parents, last = section.split(".")
    node = recipe["stages"][number]
    for part in parents:
        node = node[part]
    own = node.get(last) if isinstance(node.get(last), dict) else {}
    node[last] = own | KIND.get(section, {}) | {UNKNOWN: None}
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["run.py", str(path), "--dry-run"])
    assert main() == 2
    said = capsys.readouterr().err
    found = re.search(rf"stages\.{number}\.{section}\.{UNKNOWN}: unknown key; known: (.+)", said)
    assert found, said
    return set(found.group(1).split(", "))


def differences(keys: list[str], known: Any) -> list[str]:
    """What a table and the schema do not share; `known`: section -> its keys."""
    parents = {key.rpartition(".")[0] for key in keys} | {"objective", "data"}
    there = {f"{section}.{key}" for section in parents for key in known(section)}
    twice = [f"{key}: twice" for key, times in Counter(keys).items() if times > 1]
    unknown = [f"{key}: not in the schema" for key in sorted(set(keys) - there)]
    return [*twice, *unknown, *(f"{key}: not in the table" for key in sorted(there - set(keys)))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(document: Path) -> None:
    assert not list(broken_links(document))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_paths_exist(document: Path) -> None:
    assert not list(missing_paths(document))


@pytest.mark.parametrize("page", METHODS, ids=lambda path: path.stem)
def test_a_page_names_the_keys_of_its_method(page: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    keys = tabled_keys(page.read_text(encoding="utf-8"))
    assert "objective.name" in keys
    assert not differences(keys, lambda section: known_keys(page.stem, section, tmp_path, capsys, monkeypatch))


def test_every_method_has_a_page_and_the_readme_links_to_it() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(METHODS) >= 4
    for page in METHODS:
        assert f"| `{page.stem}` |" in text and f"]({page.relative_to(ROOT).as_posix()})" in text


def test_each_check_is_able_to_fail(tmp_path: Path, capsys, monkeypatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n[a](page.md#a-page) [b](#a-page) [c](https://a.b/c) `[d](not.md)`\n\n"
        "[e](none.md) [f](page.md#none)\n\n"
        "tests/test_documents.py, recipes/NAME.json, a/tests/none.py, `toolkit/none.py`, eval/None.md.\n"
    )
    lost = ["none.md leads to no file", "page.md#none leads to no heading"]
    assert list(broken_links(page)) == [f"page.md: {problem}" for problem in lost]
    missing = [f"page.md: {path} does not exist" for path in ("toolkit/none.py", "eval/None.md")]
    assert list(missing_paths(page)) == missing
    assert anchors("# A b, c\n## What `x` is\n## A b, c\n```\n# no\n```\n") == {"a-b-c", "what-x-is", "a-b-c-1"}
    rows = "| `objective.a` | `b` |\n| `objective.a` | |\n| `data.z` | |\n"
    table = f"\n## Keys\n\n| key | x |\n|---|---|\n{rows}\n## More\n\n| key |\n|---|\n| `data.y` |\n"
    known = {"objective": {"a", "b"}, "data": set()}
    expected = ["objective.a: twice", "data.z: not in the schema", "objective.b: not in the table"]
    assert differences(tabled_keys(table), known.__getitem__) == expected
    keys = known_keys("recontriever", "objective.queue", tmp_path, capsys, monkeypatch)
    assert keys == {"size", "momentum", "dtype"}
