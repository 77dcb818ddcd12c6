"""Rows of pairs beside the passages to search, and which of those that a search finds may be a row's hard negatives.

Called by mining. Texts are compared without case, white space and Unicode forms, so that no copy of a positive
becomes a negative.
"""

import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from toolkit.data.pair_records import PairRecord
from toolkit.recipe.search import MineSettings

ANCHORS = ("lowest", "mean", "highest")  # the values of MineSettings.positive


class MiningRows(NamedTuple):
    """Rows of one source and the passages that are searched for them."""

    records: list[PairRecord]
    passages: list[str]  # no two of them alike
    positives: list[np.ndarray]  # of each row: its positives as indices of passages
    own: list[list[str]]  # of each row: its own negatives, no two alike and none of them a positive
    excluded: list[np.ndarray]  # of each row: indices of passages that are never mined for it


def plain(text: str) -> str:
    """What two texts share that are the same but for case, white space and Unicode form (NFKC)."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def known_positives(records: Iterable[PairRecord]) -> dict[str, set[str]]:
    """Plain query -> the plain texts of all its positives, over all rows."""
    known: dict[str, set[str]] = {}
    for record in records:
        known.setdefault(plain(record.query), set()).update(map(plain, record.positives))
    return known


def mining_rows(records: list[PairRecord], corpus: Iterable[str], known: dict[str, set[str]]) -> MiningRows:
    """Rows with the passages to search: a corpus and all passages of the rows, each once; empty texts are left out.

    Never mined for a row are the known positives of its query, its own negatives (it has them) and its query's text.

    Args:
        known: from `known_positives` of these and any other rows.
    """
    place: dict[str, int] = {}
    passages: list[str] = []

    def number(text: str) -> int:
        key = plain(text)
        if key not in place:
            place[key] = len(passages)
            passages.append(text)
        return place[key]

    positives = [np.array([number(text) for text in record.positives]) for record in records]
    for text in [*(text for record in records for text in record.negatives), *(text for text in corpus if plain(text))]:
        number(text)
    own, excluded = [], []
    for record in records:
        query = plain(record.query)
        others = {plain(text): text for text in reversed(record.negatives)}  # of copies the first stays
        own.append([text for key, text in reversed(others.items()) if key not in known[query]])
        keys = known[query] | others.keys() | {query}
        excluded.append(np.array(sorted(place[key] for key in keys if key in place)))
    return MiningRows(records, passages, positives, own, excluded)


def anchors(positives: np.ndarray) -> np.ndarray:
    """The scores that limits may count from, in the order of ANCHORS: fp64 [3], of the scores of a row's positives."""
    scores = positives.astype(np.float64)
    return np.array([scores.min(), scores.mean(), scores.max()])


def limits(positive: np.ndarray, settings: MineSettings) -> dict[str, np.ndarray]:
    """Key -> the score above which it leaves a passage out, fp64 [...]; of the keys that are set.

    With s the score of the positive these are s - margin and s - (1 - max_share) |s|: "TopK-MarginPos" and
    "TopK-PercPos" of NV-Retriever (2407.15831, section 3), the latter for a score below zero as far below it.

    Args:
        positive: scores of one positive a row, fp64 [...].
    """
    found = {}
    if settings.max_score is not None:
        found["max_score"] = np.full_like(positive, settings.max_score)
    if settings.margin is not None:
        found["margin"] = positive - settings.margin
    if settings.max_share is not None:
        found["max_share"] = positive - (1 - settings.max_share) * np.abs(positive)
    return found


def lowest_limit(positive: np.ndarray, settings: MineSettings) -> np.ndarray:
    """The score above which a passage is left out: fp64 [...], infinite where no limit is set."""
    return np.minimum.reduce([np.full_like(positive, np.inf), *limits(positive, settings).values()])


def eligible(
    scores: np.ndarray, indices: np.ndarray, excluded: np.ndarray, highest: float, settings: MineSettings
) -> tuple[np.ndarray, np.ndarray, int]:
    """Which places of a ranking may be hard negatives.

    Args:
        scores, indices: [k], best first; index -1 for a place without a passage.
        excluded: indices that never are; they have no rank.
        highest: the highest score that is allowed.

    Returns:
        places int64 in `settings.ranks`, rising; all places of those ranks; and how many places have a rank.
    """
    ranked = np.flatnonzero((indices >= 0) & ~np.isin(indices, excluded))
    first, last = settings.ranks
    window = ranked[first - 1 : last]
    return window[scores[window] <= highest], window, len(ranked)
