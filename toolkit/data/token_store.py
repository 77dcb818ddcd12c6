"""Token ids of many texts on disk: one flat file of ids and one of offsets, memory-mapped when read.

Called by the stores of pairs and of crops.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Self

import numpy as np


def write_tokens(folder: Path, name: str, rows: Iterable[list[int]]) -> int:
    """Write `folder`/`name`.ids and .offsets.npy; returns the number of rows. Holds one row at a time."""
    ends = [0]
    with (folder / f"{name}.ids").open("wb") as file:
        for row in rows:
            np.asarray(row, dtype="<i4").tofile(file)
            ends.append(ends[-1] + len(row))
    np.save(folder / f"{name}.offsets.npy", np.asarray(ends, dtype=np.int64), allow_pickle=False)
    return len(ends) - 1


class TokenRows:
    """Rows of token ids, read when asked for: int32 [length of row i]."""

    def __init__(self, ids: np.ndarray, offsets: np.ndarray) -> None:
        self.ids = ids  # int32 [all tokens]
        self.offsets = offsets  # int64 [rows + 1]

    @classmethod
    def open(cls, folder: Path, name: str) -> Self:
        """Raises FileNotFoundError if the files are not there."""
        offsets = np.load(folder / f"{name}.offsets.npy", mmap_mode="r", allow_pickle=False)
        path = folder / f"{name}.ids"
        ids = np.memmap(path, dtype="<i4", mode="r") if path.stat().st_size else np.zeros(0, dtype="<i4")
        return cls(ids, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.ids[self.offsets[row] : self.offsets[row + 1]]
