"""Why rows got no hard negative, and a setting by which they would. Called by toolkit.retrieval.mining."""

from collections.abc import Iterator
from math import ceil, floor
from typing import Any

import numpy as np

from toolkit.data.negatives import ANCHORS, limits, lowest_limit
from toolkit.recipe.search import MineSettings


def why_none(
    positives: np.ndarray, least: np.ndarray, too_high: np.ndarray, ranked: np.ndarray, settings: MineSettings
) -> str:
    """The keys that left rows without a negative, and values by which how many of them would get one.

    Args:
        positives, least, too_high, ranked: of these rows, as in toolkit.retrieval.mining.Mined.
    """
    first, last = settings.ranks
    empty = np.isnan(least)
    parts = []
    if not empty.all():
        parts.append(_limited(positives[~empty], least[~empty], int(too_high.sum()), settings))
    if empty.any():
        found = ranked[empty]
        deepest = int(found.max())
        fix = "the search finds nothing but positives, or nothing"
        if deepest:
            would = int((found >= deepest).sum())
            fix = f"the search finds at most {deepest}; {would:,} would have one with ranks [{deepest}, {last}]"
        parts.append(f"{empty.sum():,} rows have no passage at ranks {first} to {last}: {fix}")
    return "; ".join(parts)


def _limited(positives: np.ndarray, least: np.ndarray, too_high: int, settings: MineSettings) -> str:
    """Rows whose passages all score too high: the limit that most of them are above, and what would help."""
    anchor = positives[:, ANCHORS.index(settings.positive)]
    above = {key: int((least > limit).sum()) for key, limit in limits(anchor, settings).items()}
    key = max(above, key=above.__getitem__)
    counted = "" if key == "max_score" else f" (positive {settings.positive!r})".replace("'", '"')
    first, last = settings.ranks
    told = (
        f"{key} {getattr(settings, key):g}{counted} leaves {len(least):,} rows none, since all {too_high:,} candidates "
        f"at ranks {first} to {last} score above it"
    )
    helped: dict[str, int] = {}
    for changes in _changes(key, anchor, least, settings):
        changed = settings.model_copy(update=changes)
        limit = lowest_limit(positives[:, ANCHORS.index(changed.positive)], changed)
        ((name, value),) = changes.items()
        shown = "null" if value is None else f'"{value}"' if isinstance(value, str) else f"{value:g}"
        helped[f"{name} {shown}"] = int((least <= limit).sum())
    best = [f"{count:,} rows would get one with {change}" for change, count in helped.items() if count]
    return "; ".join([told, *best]) if best else f"{told}; no other {key} helps while the other limits stay"


def _changes(key: str, anchor: np.ndarray, least: np.ndarray, settings: MineSettings) -> Iterator[dict[str, Any]]:
    """Other values of a key, and of `positive`: the one that half of the rows need as far as it may go, then none."""
    if key != "max_score" and settings.positive != "highest":
        yield {"positive": "highest"}
    lowest = least.astype(np.float64)
    if key == "max_share":
        with np.errstate(divide="ignore"):
            needed = np.median(1 - (anchor - lowest) / np.abs(anchor))
        if settings.max_share is not None and settings.max_share < 1:
            yield {key: 1.0 if not needed < 1 else ceil(float(needed) * 100) / 100}
    elif key == "margin":
        needed = float(np.median(anchor - lowest))
        yield {key: 0.0 if needed <= 0 else floor(needed * 1000) / 1000}
    else:
        yield {key: ceil(float(np.median(lowest)) * 1000) / 1000}
    yield {key: None}
