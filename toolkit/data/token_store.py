"""Rows of integers on disk, token ids above all: one flat file of ids and one of offsets, memory-mapped when read.

Called by the stores of pairs and of documents.
"""

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np


class TokenWriter:
    """Writes `folder`/`name`.ids as rows come and, where its block ends well, .offsets.npy: 8 bytes a row in memory."""

    def __init__(self, folder: Path, name: str) -> None:
        self._offsets = folder / f"{name}.offsets.npy"
        self._file = (folder / f"{name}.ids").open("wb")
        self._ends = array("q", [0])

    def append(self, row: Sequence[int]) -> None:
        """Add a row of int32; raises OverflowError for a number that is none."""
        self._file.write(np.asarray(row, dtype="<i4").tobytes())
        self._ends.append(self._ends[-1] + len(row))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def ids(self) -> int:
        """Number of ids in all rows."""
        return self._ends[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()
        if kind is None:
            np.save(self._offsets, np.asarray(self._ends, dtype=np.int64), allow_pickle=False)


def write_tokens(folder: Path, name: str, rows: Iterable[list[int]]) -> int:
    """Write `folder`/`name`.ids and .offsets.npy; returns the number of rows. Holds one row at a time."""
    with TokenWriter(folder, name) as writer:
        for row in rows:
            writer.append(row)
    return len(writer)


class TokenRows:
    """Rows of token ids, read when asked for: int32 [length of row i]."""

    def __init__(self, ids: np.ndarray, offsets: np.ndarray) -> None:
        self.ids = ids  # int32 [all tokens]
        self.offsets = offsets  # int64 [rows + 1]

    @classmethod
    def open(cls, folder: Path, name: str) -> Self:
        """Raises FileNotFoundError if the files are not there, ValueError if they do not belong together."""
        offsets = np.load(folder / f"{name}.offsets.npy", mmap_mode="r", allow_pickle=False)
        path = folder / f"{name}.ids"
        if path.stat().st_size != 4 * offsets[-1]:
            raise ValueError(f"{path}: {path.stat().st_size} bytes, not {4 * offsets[-1]}; delete the folder")
        ids = np.memmap(path, dtype="<i4", mode="r") if offsets[-1] else np.zeros(0, dtype="<i4")
        return cls(ids, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """Raises IndexError outside 0 .. len - 1: there is no counting from the end."""
        if row < 0:
            raise IndexError(f"row {row}")
        return self.ids[self.offsets[row] : self.offsets[row + 1]]
