"""Graded rows on disk: a query with its passages' token ids and grades, source by source, and batches of their groups.

Called by training (collate); graded_write.py writes them.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from toolkit.data.groups import Passages, in_group, joined
from toolkit.data.text_store import padded
from toolkit.data.token_store import TokenRows
from toolkit.data.tokens import Tokens
from toolkit.recipe.graded import Group

Picks = list[int | None]  # of each source how many passages are drawn at random in each epoch; None: all


class GradedStore:
    """Rows of a folder, memory-mapped: a query, and of each source the passages that it has for it."""

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError if the folder holds no finished store, ValueError if a file of it is damaged."""
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.digest: str = self.meta["digest"]  # of the texts' keys, ids and grades, whatever the tokenizer
        self.examples: list[str] = self.meta["examples"]  # the first passages, without prefix
        self.query, self.passage = TokenRows.open(folder, "query"), TokenRows.open(folder, "passage")
        held, grade = TokenRows.open(folder, "held"), TokenRows.open(folder, "grade")
        self._held, self._grade = held, TokenRows(grade.ids.view("<f4"), grade.offsets)
        names = ("query_of_row", "text_of_held", "order_of_held")
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names]
        self.query_of_row, self._text, self._order = arrays  # int64 [rows], [passages with their ids] and the same
        self._sources: int = self.meta["sources"]
        if len(held) != len(grade) or len(held) != self._sources * len(self):
            raise ValueError(f"{folder}: {len(held)} lists of passages for {len(self)} rows; delete the folder")

    def __len__(self) -> int:
        return len(self.query_of_row)

    def passages(self, row: int) -> tuple[np.ndarray, list[Passages]]:
        """(Numbers of the texts of a row's passages, source after source: int64 [n], the passages of each source)."""
        places = range(row * self._sources, (row + 1) * self._sources)
        held = [self._held[place] for place in places]
        sources = [Passages(self._order[own], self._grade[place]) for own, place in zip(held, places, strict=True)]
        return self._text[np.concatenate(held)], sources

    def group(self, row: int, epoch: int, picks: Picks, group: Group, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(Numbers of the texts, grades) of a row's group in an epoch: int64 and float32 [group.size]."""
        text, sources = self.passages(row)
        draw = (seed, epoch, row)
        there = joined(sources, picks, draw)
        order, grade = (np.concatenate(side)[there] for side in zip(*sources, strict=True))
        places = in_group(Passages(order, grade), group, draw)
        return text[there[places]], grade[places]


class GradedBatch(NamedTuple):
    """Rows of one pool."""

    query: Tokens  # [rows, length]
    passage: Tokens  # [rows * size, length]: a row's group, then that of the next
    grade: Tensor  # float32 [rows, size]


def collate_graded(
    store: GradedStore, rows: np.ndarray, epoch: int, *, picks: Picks, group: Group, seed: int, pad_id: int
) -> GradedBatch:
    """Rows of a pool, all or a rank's part: each row's group is a function of (seed, epoch, row), whoever reads it.

    Args:
        rows: row ids.
        epoch: how often the rows were dealt before.
    """
    groups = [store.group(row, epoch, picks, group, seed) for row in rows.tolist()]
    text, grade = (np.stack(side) for side in zip(*groups, strict=True))
    return GradedBatch(
        query=padded(store.query, store.query_of_row[rows], pad_id),
        passage=padded(store.passage, text.reshape(-1), pad_id),
        grade=torch.from_numpy(grade.astype(np.float32)),
    )
