"""Garbage for property tests, the same in every run, and what every refusal of it looks like."""

import json
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st

from toolkit.recipe.errors import RecipeError

T = TypeVar("T")


def examples(count: int) -> settings:
    """So many examples, the same in every run; nothing is kept on disk."""
    return settings(derandomize=True, deadline=None, database=None, max_examples=count)


# Any character: controls, line ends of every kind and halves of surrogate pairs among them.
TEXT = st.text(st.characters(exclude_categories=()), max_size=8)
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([10**30, -(10**400), 2**63, 0.0, -0.0]))
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, TEXT, st.sampled_from(["", " ", "a", "b c", "\0", "\ufeff"]))
DEEP = st.sampled_from([[[[[["a"]]]]], {"a": {"a": {"a": 1}}}])
VALUES = st.recursive(
    st.one_of(PLAIN, DEEP),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
# What no JSON value is written as: syntax errors, other encodings, numbers and nesting beyond what is read.
SYNTAX = [b"", b"\0", b"\r", b"\n", b"\r\n", b"\t", b"{", b"}", b"[", b'"', b"NaN", b"-Infinity", b"1e999", b"\\ud800"]
ENCODINGS = [
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\xe9",
    b"\x1f\x8b",
    "\u2028".encode(),
    '{"text": "a"}'.encode("utf-16"),
]
BROKEN = st.sampled_from([*SYNTAX, *ENCODINGS, b"[" * 3000, b"9" * 5000, b'{"text": "a", "text": 1}'])
PIECES = st.one_of(BROKEN, st.binary(max_size=6))


def rows(keys: Iterable[str], **plausible: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Rows with some of the keys: mostly objects whose values are plausible or anything, sometimes anything."""
    values = {key: st.one_of(plausible.get(key, st.just("a b")), VALUES) for key in keys}
    return st.one_of(st.fixed_dictionaries({}, optional=values), st.fixed_dictionaries(values), VALUES)


def line(value: Any) -> bytes:
    """A row as a line of JSON without its end, as Python writes it: NaN and halves of surrogate pairs too."""
    return json.dumps(value).encode()


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file with one to three pieces cut out, and others or none put in their places."""
    data = whole
    for _ in range(draw(st.integers(1, 3))):
        first = draw(st.integers(0, len(data)))
        last = draw(st.one_of(st.integers(first, min(len(data), first + 30)), st.just(len(data))))
        data = data[:first] + draw(PIECES) + data[last:]
    return data


def outcome(work: Callable[[], T]) -> T | str:
    """What `work` gives, or the text of its RecipeError, each problem on one printable line; anything else fails."""
    try:
        return work()
    except RecipeError as error:
        text = str(error)
        lines = text.split("\n")
        assert all(line.strip() and line.isprintable() for line in lines), lines
        assert all(len(line) < 2000 for line in lines) and "Traceback" not in text
        return text
