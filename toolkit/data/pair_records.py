"""Sources of a recipe -> checked rows of a query with its positives and hard negatives, in constant memory.

Called by prepare (training data of the contrastive objective). A malformed row is a RecipeError with place and fix.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from toolkit.recipe import FolderSource, HubSource, StdlibSource

PairSource = HubSource | FolderSource | StdlibSource


class PairRecord(NamedTuple):
    """One row of a source of pairs."""

    query: str
    positives: list[str]  # at least one, none empty
    negatives: list[str]  # may be empty
    weight: float  # above 0; 1.0 unless the source names a column


def read_pairs(source: PairSource, counts: Counter[str]) -> Iterator[PairRecord]:
    """Rows of one source, in order; adds to counts["rows"], ["empty"] (no query or positive) and ["missing"] (beir).

    Raises:
        RecipeError: for a malformed row (where, what, fix), unknown columns, missing files, no access to the hub.
    """
    raise NotImplementedError


def pair_fingerprint(source: PairSource) -> list[Any]:
    """What tells that a source has changed, without reading it: names, sizes and times of files, hub ids, a digest."""
    raise NotImplementedError


def content_hash(source: PairSource) -> str:
    """32 hex digits of a source's content: the bytes of its files, the hub's own fingerprint, the corpus's digest."""
    raise NotImplementedError
