"""Rows of a source that cannot be used: an error each, or left out and counted, as the recipe's data.faulty_rows says.

Called by the readers of records, pairs and BEIR folders, and by what prepares a stage's data, which keeps the counts.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

from toolkit.recipe.errors import RecipeError, one_line

Record = TypeVar("Record")

_FIRST = 3  # rows of each kind that are told one by one
_FILE = "skipped.json"


class RowFault(RecipeError):
    """A row that cannot be used: one line with place and fix; `kind` is what it is counted as."""

    def __init__(self, kind: str, line: str) -> None:
        super().__init__(one_line(line))
        self.kind = kind


class Skipped:
    """Rows that were left out: how many of each kind, and the lines of the first few."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.first: dict[str, list[str]] = {}  # kind -> at most _FIRST lines
        self.last = ""

    def add(self, fault: RowFault) -> None:
        self.kinds[fault.kind] += 1
        self.last = str(fault)
        lines = self.first.setdefault(fault.kind, [])
        if len(lines) < _FIRST:
            lines.append(str(fault))


def skipping(faulty_rows: Literal["refuse", "skip"]) -> Skipped | None:
    """Where the faulty rows of a stage are counted; None where the first of them is an error."""
    return Skipped() if faulty_rows == "skip" else None


def leave_out(fault: RowFault, skipped: Skipped | None) -> None:
    """Count a row that cannot be used; raises the fault where none may be left out (None)."""
    if skipped is None:
        raise fault
    skipped.add(fault)


def some_usable(records: Iterable[Record], name: str, skipped: Skipped | None) -> Iterator[Record]:
    """The records of a source or file; RecipeError at its end if rows were left out and none of use was among them.

    `name` is its name on one line.
    """
    before = 0 if skipped is None else skipped.kinds.total()
    found = False
    for record in records:
        found = True
        yield record
    if skipped is not None and not found and (left_out := skipped.kinds.total() - before):
        raise RecipeError(f"{name}: no row can be used, {left_out:,} are faulty; mend them, the last: {skipped.last}")


def listed(names: Iterable[object]) -> str:
    """The first ten of some names for an error, however many and however long they are."""
    names = list(names)
    more = [f"{len(names) - 10:,} more"] if len(names) > 10 else []
    return ", ".join([*(one_line(name, 40) for name in names[:10]), *more]) or "none"


def _counted(kinds: Counter[str]) -> str:
    """The kinds, the most frequent first."""
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())


# --------------------------------------------------------------------------- beside what was prepared


def keep_skipped(skipped: Skipped | None, folder: Path) -> None:
    """Write the counts into a folder of prepared data; nothing if no row was left out."""
    if skipped is not None and skipped.kinds:
        text = json.dumps({"kinds": skipped.kinds, "first": skipped.first}, indent=2)
        (folder / _FILE).write_text(text + "\n", encoding="utf-8")


def say_skipped(folder: Path) -> None:
    """Print what `keep_skipped` wrote: every run that uses the folder says what is not in it.

    Raises:
        RecipeError: for a damaged file.
    """
    path = folder / _FILE
    if not path.is_file():
        return
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        kinds, lines = Counter(kept["kinds"]), [line for lines in kept["first"].values() for line in lines]
        told = f"data: faulty rows skipped: {kinds.total():,} ({_counted(kinds)}); the first of each kind:"
        print("\n  ".join([told, *lines]), flush=True)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{folder}: is damaged ({_FILE}: {error}); delete it, and it is made again") from None
