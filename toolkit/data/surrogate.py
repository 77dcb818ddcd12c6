"""What another model says of the texts of pairs: its vectors on disk, in the order of the texts' numbers.

Written by surrogate_vectors; read by clustering and, a pool at a time, by the batches of a filter.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from toolkit.data.pair_records import PairRecord
from toolkit.data.pairs import PairStore
from toolkit.data.text_store import DOCUMENT, QUERY, text_key
from toolkit.files import sha256

Side = Literal["query", "document"]
_CHANGED = "the rows are not those that were prepared: a file changed meanwhile; start again"


class SurrogateVectors(NamedTuple):
    """Memory maps, whose rows are the texts of a PairStore by their numbers."""

    query: np.ndarray  # fp16 [the store's query texts, dim]
    document: np.ndarray  # fp16 [the store's document texts, dim]
    digest: str = ""  # of both

    @classmethod
    def open(cls, folder: Path, store: PairStore) -> "SurrogateVectors":
        """Raises FileNotFoundError if the folder is not finished, ValueError if a file is damaged or of other pairs."""
        dim, digests = _meta(folder)
        arrays = [np.load(folder / f"{side}.npy", mmap_mode="r", allow_pickle=False) for side in ("query", "document")]
        found = [len(array) for array in arrays]
        if found != [len(store.query), len(store.document)]:
            problem = f"it has vectors of other pairs: {found[0]:,} queries and {found[1]:,} documents, not"
            raise ValueError(f"{problem} {len(store.query):,} and {len(store.document):,}")
        if any(array.dtype != np.float16 or array.shape[1:] != (dim,) for array in arrays):
            raise ValueError(f"its arrays are not fp16 of {dim} dimensions")
        return cls(*arrays, digest=" ".join(digests.values()))

    def of_rows(self, store: PairStore, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of the queries and of the first positives of rows: fp32 [rows, dim] each."""
        first = store.positives.ids[store.positives.offsets[rows]]
        query, document = self.query[store.query_of_row[rows]], self.document[first]
        return query.astype(np.float32), document.astype(np.float32)


def check_vectors(folder: Path) -> None:
    """Raise ValueError if the arrays in a folder are not those that were written; reads all of them."""
    for side, digest in _meta(folder)[1].items():
        if sha256(folder / f"{side}.npy") != digest:
            raise ValueError(f"{side}.npy is not as it was written")


def _meta(folder: Path) -> tuple[int, dict[str, str]]:
    """Dimensions, and the digest of each array."""
    meta: Any = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    try:
        return meta["dim"], {side: meta["sha256"][side] for side in ("query", "document")}
    except (KeyError, TypeError):
        raise ValueError("meta.json lacks dim or sha256") from None


def store_texts(store: PairStore, records: Iterable[PairRecord], side: Side) -> Iterator[str]:
    """The texts of one side without their prefixes, by their numbers; holds one row.

    Args:
        records: the rows that the store was made of, of all sources.

    Raises:
        ValueError: if they are others.
    """
    keys, person = (store.query_key, QUERY) if side == "query" else (store.document_key, DOCUMENT)
    following = row = 0
    for row, record in enumerate(records, 1):
        if row > len(store):
            raise ValueError(_CHANGED)
        for number, text in _numbered(store, row - 1, record, side):
            if number == following:  # its first place: texts are numbered as they come
                if text_key(text, person) != keys[number]:
                    raise ValueError(_CHANGED)
                yield text
                following += 1
    if (row, following) != (len(store), len(keys)):
        raise ValueError(_CHANGED)


def _numbered(store: PairStore, row: int, record: PairRecord, side: Side) -> Iterator[tuple[int, str]]:
    """(number, text) of the texts of one side of a row, in the order in which they were numbered."""
    if side == "query":
        yield int(store.query_of_row[row]), record.query
        return
    own = dict.fromkeys(record.positives)
    others = [text for text in dict.fromkeys(record.negatives) if text not in own]
    numbers = [*store.positives[row].tolist(), *store.negatives[row].tolist()]
    if len(numbers) != len(own) + len(others):
        raise ValueError(_CHANGED)
    yield from zip(numbers, chain(own, others), strict=True)
