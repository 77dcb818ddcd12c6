"""Graded rows of the embedded corpus, made without a model: what stands near a function stands in for relevance.

Called by the reader of graded rows.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from toolkit.data.stdlib_corpus import STDLIB, collection


class Related(NamedTuple):
    """A training docstring with code by grade: 3 its own, 2 of its class, 1 of its module, 0 of another module."""

    query_id: str
    query: str
    codes: list[tuple[str, str, float]]  # (id, code, grade), the highest first; no code twice


def related_code(folder: Path = STDLIB) -> tuple[list[Related], int]:
    """Graded rows of three or four grades, and how many docstrings are left out, since no code is near theirs.

    Grade 2 is another documented function or class of the same class. Grade 1 is of the same module, of another class,
    and neither inside the other. A row lacks one of them if there is none; which one it is, is a function of the ids.
    """
    _, documents, queries, qrels = collection("train", folder)
    modules: dict[str, list[str]] = defaultdict(list)
    for name in documents:
        modules[name.split(":")[0]].append(name)
    every, rows = list(documents), []
    for query, own in ((query, next(iter(grades))) for query, grades in qrels.items()):
        module = own.split(":")[0]
        siblings, others = _near(own, modules[module])
        far = (name for name in _from(every, own) if not name.startswith(f"{module}:"))
        codes = [(own, documents[own], 3.0)]
        for names, grade in ((_from(siblings, own), 2.0), (_from(others, own), 1.0), (far, 0.0)):
            met = [code for _, code, _ in codes]
            codes += islice(((name, documents[name], grade) for name in names if documents[name] not in met), 1)
        if len(codes) > 2 and codes[-1][2] == 0:
            rows.append(Related(query, queries[query], codes))
    return rows, len(queries) - len(rows)


def _near(own: str, module: Sequence[str]) -> tuple[list[str], list[str]]:
    """(Names of the same class, names of the same module that have nothing to do with it)."""
    path = own.split(":")[1]
    owner = path.rpartition(".")[0]
    siblings, others = [], []
    for name in module:
        other = name.split(":")[1]
        if name == own or _inside(other, path) or _inside(path, other) or other == path:
            continue
        if owner and other.rpartition(".")[0] == owner:
            siblings.append(name)
        elif not owner or not _inside(other, owner):
            others.append(name)
    return siblings, others


def _inside(path: str, outer: str) -> bool:
    return path.startswith(f"{outer}.")


def _from(names: Sequence[str], own: str) -> Iterator[str]:
    """All names in a circle, from the one that the id chooses."""
    first = int.from_bytes(hashlib.blake2b(own.encode(), digest_size=8).digest(), "little")
    return (names[(first + step) % len(names)] for step in range(len(names)))
