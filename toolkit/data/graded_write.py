"""Graded rows of several sources -> one store: rows of the same query put together, every distinct text tokenised once.

Called by prepare_graded.
"""

import hashlib
import json
import struct
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np

from toolkit.data.faults import RowFault, Skipped, leave_out
from toolkit.data.graded import Picks
from toolkit.data.graded_records import GradedRow, Passage
from toolkit.data.groups import RELEVANT, Passages, joined, lacks
from toolkit.data.text_store import DOCUMENT, QUERY, Encode, Texts
from toolkit.data.token_store import TokenRows, TokenWriter
from toolkit.recipe.errors import one_line
from toolkit.recipe.graded import Group

_EXAMPLES = 8
_GRADES = 10  # at most are told one by one

Join = Literal["query_id", "query_text"] | None


class How(NamedTuple):
    """How rows are put together, and what each of them must have."""

    join: Join
    picks: Picks  # of each source
    group: Group
    prefixes: tuple[str, str]  # of queries, of passages


class _Queries:
    """The rows of the store as they come: a query each, which sources may share."""

    def __init__(self, texts: Texts, how: How) -> None:
        self.text = array("q")  # number of each row's text
        self.id: list[str] = []  # of each row; empty where rows are not joined by it
        self.where: list[str] = []  # its first place
        self._texts, self._join, self._prefix = texts, how.join, how.prefixes[0]
        self._rows: dict[str, int] = {}

    def row(self, row: GradedRow) -> int:
        """Number of the row that a source's row belongs to; RowFault for one that does not say so."""
        number = self._texts.number(self._prefix, row.query)
        if self._join == "query_id" and row.query_id is None:
            fix = 'give every row one, or set data.join to "query_text"'
            raise RowFault("without query id", f"{row.where}: no query_id; {fix}")
        key = row.query_id if self._join == "query_id" else row.query if self._join == "query_text" else None
        known = None if key is None else self._rows.get(key)
        if known is None:
            known = len(self.text)
            self.text.append(number)
            self.id.append(row.query_id or "" if self._join == "query_id" else "")
            self.where.append(row.where)
            if key is not None:
                self._rows[key] = known
        elif self.text[known] != number:
            other = f"query {one_line(repr(key), 60)} has another text in {self.where[known]}"
            fix = 'ids must mean the same in all sources; mend them, or set data.join to "query_text"'
            raise RowFault("of a query with another text", f"{row.where}: {other}; {fix}")
        return known

    def key(self, row: int) -> int:
        """Key of a row's text."""
        return self._texts.keys[self.text[row]]

    def order(self) -> list[int]:
        """Rows sorted by their ids where they are joined by them, else as they came."""
        return sorted(range(len(self.text)), key=lambda row: (self.id[row], row))


class _Held:
    """Distinct passages, each an id and a text: the numbers that rows hold; some 550 bytes of each in memory.

    Ids of one folder or dataset mean the same in all sources that read it, and nothing elsewhere. A passage without an
    id is known by its text.
    """

    def __init__(self, texts: Texts, prefix: str) -> None:
        self.text = array("q")  # number of each one's text
        self.examples: list[str] = []  # the first texts
        self._texts, self._prefix = texts, prefix
        self._ids: list[tuple[str, int]] = []  # (id, whose)
        self._numbers: dict[tuple[str, int, int], int] = {}

    def number(self, passage: Passage, whose: int) -> int:
        """`whose`: the first source whose ids mean the same."""
        name, text, _ = passage
        key = (text, -1, 0) if name is None else (name, whose, hash(text))  # another text with it is one in 2^64
        number = self._numbers.get(key)
        return self._add(key, text) if number is None else number

    def _add(self, key: tuple[str, int, int], text: str) -> int:
        number = self._numbers[key] = len(self.text)
        self.text.append(self._texts.number(self._prefix, text))
        self._ids.append(key[:2])
        if len(self.examples) < _EXAMPLES and text not in self.examples:
            self.examples.append(text)
        return number

    def keys(self) -> np.ndarray:
        """Key of each one's text: int64 [passages]."""
        return np.asarray(self._texts.keys, dtype=np.int64)[np.asarray(self.text, dtype=np.int64)]

    def order(self) -> np.ndarray:
        """Place of each one's id among all ids: int64 [passages]; equal ids have the same."""
        places = {named: place for place, named in enumerate(sorted(set(self._ids)))}
        return np.fromiter((places[named] for named in self._ids), dtype=np.int64, count=len(self._ids))


class _Part:
    """What one source says, on disk as it came: passages of its rows, each of which belongs to a row of the store."""

    def __init__(self, folder: Path, row_of: array) -> None:
        grade = TokenRows.open(folder, "grade")
        self._held, self._grade = TokenRows.open(folder, "held"), TokenRows(grade.ids.view("<f4"), grade.offsets)
        rows = np.asarray(row_of, dtype=np.int64)
        self._places = np.argsort(rows, kind="stable")
        self._rows = rows[self._places]

    def passages(self, row: int, order: np.ndarray) -> tuple[bool, np.ndarray, np.ndarray, int]:
        """Whether the source knows a row's query, the numbers of its passages, none twice, and their grades; and how
        many other grades it has for them."""
        first, last = np.searchsorted(self._rows, (row, row + 1))
        places = self._places[first:last].tolist()
        if not places:
            return False, np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32), 0
        held = np.concatenate([self._held[place] for place in places])
        grade = np.concatenate([self._grade[place] for place in places])
        once, other = _joined_all([Passages(order[held], grade)])
        return True, held[once], grade[once], other


def write_graded(
    sources: Sequence[tuple[int, Iterable[GradedRow]]], how: How, encode: Encode, folder: Path, skipped: Skipped | None
) -> dict[str, Any]:
    """Write rows into an existing folder; returns what is in meta.json, which comes last.

    Rows joined by query id are sorted by it, others stand as they came. Passages stay on disk, not in memory.

    Args:
        sources: of each the first one whose ids mean the same, and its rows.
        encode: token ids of texts that have their prefix.
        skipped: where rows are counted that name no query, or have too few passages; None: the first is an error.
    """
    with ExitStack() as files:
        work = Path(files.enter_context(TemporaryDirectory(dir=folder)))
        writers = [files.enter_context(TokenWriter(folder, name)) for name in ("query", "passage")]
        asked, texts = Texts(writers[0], QUERY, encode), Texts(writers[1], DOCUMENT, encode)
        queries, held, parts = _Queries(asked, how), _Held(texts, how.prefixes[1]), []
        for number, (whose, rows) in enumerate(sources):
            part = work / str(number)
            part.mkdir()
            parts.append(_Part(part, _write_part(rows, whose, queries, held, part, skipped)))
        asked.flush()
        texts.flush()
        meta = _put_together(queries, held, parts, how, folder, skipped)
    meta |= {"queries": len(asked.keys), "passages": len(texts.keys), "tokens": sum(writer.ids for writer in writers)}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return meta


def _write_part(
    rows: Iterable[GradedRow], whose: int, queries: _Queries, held: _Held, folder: Path, skipped: Skipped | None
) -> array:
    """Write what a source says as it comes; returns the row of the store of each of its rows."""
    row_of = array("q")
    with TokenWriter(folder, "held") as numbers, TokenWriter(folder, "grade") as grades:
        for row in rows:
            try:
                number = queries.row(row)
            except RowFault as fault:
                leave_out(fault, skipped)
                continue
            row_of.append(number)
            numbers.append([held.number(passage, whose) for passage in row.passages])
            grades.append(np.asarray([passage.grade for passage in row.passages], dtype="<f4").view("<i4").tolist())
    return row_of


def _put_together(
    queries: _Queries, held: _Held, parts: list[_Part], how: How, folder: Path, skipped: Skipped | None
) -> dict[str, Any]:
    """Write each row's passages, source after source; returns counts of them."""
    order, text = held.order(), np.asarray(held.text, dtype=np.int64)
    keys = held.keys()
    digest, tally, grades = hashlib.blake2b(digest_size=8), Counter[str](), Counter[float]()
    kept, known_to = array("q"), [0] * len(parts)
    with TokenWriter(folder, "held") as numbers, TokenWriter(folder, "grade") as bits:
        for row in queries.order():
            known, of_source, grade, other = zip(*(part.passages(row, order) for part in parts), strict=True)
            sources = [Passages(order[own], its) for own, its in zip(of_source, grade, strict=True)]
            if lack := lacks(sources, how.picks, how.group):
                leave_out(RowFault("of too few passages", f"{queries.where[row]}: {lack}"), skipped)
                continue
            for own, its in zip(of_source, grade, strict=True):
                numbers.append(own.tolist())
                bits.append(its.view("<i4").tolist())
                digest.update(struct.pack("<q", len(own)) + keys[own].tobytes() + order[own].tobytes() + its.tobytes())
            kept.append(queries.text[row])
            digest.update(struct.pack("<q", queries.key(row)))
            known_to = [count + there for count, there in zip(known_to, known, strict=True)]
            tally.update(_told(sources, text[np.concatenate(of_source)], how))
            tally["regraded"] += sum(other)
            tally["known"] += all(known)
            grades.update(np.concatenate(grade).tolist())
        graded = numbers.ids
    for name, values in {"query_of_row": kept, "text_of_held": text, "order_of_held": order}.items():
        np.save(folder / f"{name}.npy", np.asarray(values, dtype=np.int64), allow_pickle=False)
    return {
        "rows": len(kept),
        "sources": len(parts),
        "known_to": known_to,
        "graded": graded,
        "grades": _grades(grades),
        "told": tally,
        "examples": held.examples,
        "digest": digest.hexdigest(),
    }


def _told(sources: list[Passages], text: np.ndarray, how: How) -> dict[str, int]:
    """What is to be said of a row: whether all sources know it, whether its passages are repeated, and so on."""
    every, regraded = _joined_all(sources)
    grade = np.concatenate([source.grade for source in sources])[every]
    unread = 0
    if how.group.by == "positive_first":
        unread = int(((grade >= RELEVANT) & (grade < grade.max())).sum())
    elif how.group.by != "random" and not any(how.picks):
        unread = max(0, len(every) - how.group.size)
    return {
        "shared": all(len(source.order) for source in sources),
        "repeated": bool(lacks(sources, how.picks, how.group.model_copy(update={"few": "refuse"}))),
        "twice": len(np.unique(text[every])) < len(every),
        "unread": unread,
        "regraded": regraded,
    }


def _joined_all(sources: list[Passages]) -> tuple[np.ndarray, int]:
    """Places as `joined` gives them if nothing is picked, and how many passages stand with another grade before."""
    every = joined(sources, [None] * len(sources), (0, 0, 0))
    order, grade = (np.concatenate(side) for side in zip(*sources, strict=True))
    if len(every) == len(order):
        return every, 0
    last = dict(zip(order.tolist(), grade.tolist(), strict=True))
    return every, sum(last[name] != its for name, its in zip(order.tolist(), grade.tolist(), strict=True))


def _grades(counts: Counter[float]) -> str:
    """How many passages have which grade; of many grades the lowest and the highest."""
    if len(counts) > _GRADES:
        return f"{len(counts):,} different ones, {min(counts):g} to {max(counts):g}"
    return ", ".join(f"{grade:g}: {count:,}" for grade, count in sorted(counts.items(), reverse=True))
