"""The group of passages that a row of graded data gives to a step: a function of (seed, epoch, row) and of the data.

Called by the batches of graded rows, by what writes them to disk, and by the dry run.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from toolkit.determinism import generator
from toolkit.recipe.graded import Group

RELEVANT = 1.0  # the lowest grade of what is no negative


class Passages(NamedTuple):
    """The passages that one source, or all of them, have for a query."""

    order: np.ndarray  # int [n]: ids as numbers, sorted as the ids are; equal ids are the same passage
    grade: np.ndarray  # float32 [n]


Draw = tuple[int, int, int]  # seed, epoch, row


def joined(sources: Sequence[Passages], picks: Sequence[int | None], draw: Draw) -> np.ndarray:
    """Places of a query's passages in its sources one after another: int64, none of them the same passage.

    Of a passage that several sources have, or one source twice, the last one counts, at the place of the first.

    Args:
        picks: of each source how many of its passages are drawn at random; None: all.
    """
    places, before = [], 0
    for number, (source, most) in enumerate(zip(sources, picks, strict=True)):
        size = len(source.order)
        if most is None or size <= most:
            chosen = np.arange(size)
        else:
            chosen = np.sort(generator("pick", *draw, number).permutation(size)[:most])
        places.append(before + chosen)
        before += size
    place = np.concatenate(places)
    order = np.concatenate([source.order for source in sources])[place]
    last = dict(zip(order.tolist(), place.tolist(), strict=True))  # a key that comes again keeps its place
    return np.fromiter(last.values(), dtype=np.int64, count=len(last))


def in_group(passages: Passages, group: Group, draw: Draw) -> np.ndarray:
    """Places of the group among a query's passages, int64 [group.size].

    Too few passages are repeated in their order. The query `lacks` nothing.
    """
    if group.by == "positive_first":
        return _positive_first(passages.grade, group.size, draw)
    if group.by == "first":
        places = np.arange(len(passages.order))
    elif group.by == "random":
        places = generator("group", *draw).permutation(len(passages.order))
    else:
        places = np.lexsort((passages.order, passages.grade))
        places = places[::-1] if group.by == "most_relevant" else places
    return np.resize(places, group.size)


def _positive_first(grade: np.ndarray, size: int, draw: Draw) -> np.ndarray:
    """A passage of the highest grade, another one in each epoch, then size - 1 negatives, as Tevatron and trove draw.

    The negatives are shuffled once; each epoch goes on where the one before ended.
    """
    positives, negatives = np.flatnonzero(grade == grade.max()), np.flatnonzero(grade < RELEVANT)
    seed, epoch, row = draw
    first = positives[(row + seed + epoch) % len(positives)]
    if len(negatives) < size - 1:
        drawn = negatives[generator("negatives", *draw).integers(len(negatives), size=size - 1)]
    elif size == 1:
        drawn = negatives[:0]
    else:
        shuffled = negatives.tolist()
        random.Random(row + seed).shuffle(shuffled)
        begin = epoch * (size - 1) % len(shuffled)
        drawn = np.array((shuffled * 2)[begin : begin + size - 1])
    return np.array([first, *drawn], dtype=np.int64)


# --------------------------------------------------------------------------- before anything is drawn


def lacks(sources: Sequence[Passages], picks: Sequence[int | None], group: Group) -> str:
    """What a query has too few of in some epoch, whichever passages are picked, and the fix; empty if it has enough."""
    fewest = group.size if group.few == "refuse" else 1
    if group.by != "positive_first":
        return _too_few("passages", surely(sources, picks), fewest)
    if not surely(sources, picks, at_least=RELEVANT):
        return f"has no passage of grade 1 or more for a group to begin with; give it one, or {_SKIP}"
    return _too_few("passages below grade 1", surely(sources, picks, below=RELEVANT), min(fewest, group.size - 1))


_SKIP = 'set data.faulty_rows to "skip"'


def _too_few(what: str, sure: int, wanted: int) -> str:
    if sure >= wanted:
        return ""
    less = 'set data.group.few to "cycle", lower data.group.size, ' if wanted > 1 else "give it more, "
    return f"has {sure} of the {wanted} {what} that a group needs; {less}or {_SKIP}"


def surely(
    sources: Sequence[Passages], picks: Sequence[int | None], at_least: float = -np.inf, below: float = np.inf
) -> int:
    """How many passages of these grades a query has in every epoch, at the least, whichever are picked at random.

    Of a passage that several sources have, the last one that may be asked for it counts, as in `joined`.
    """
    ids = [set(source.order.tolist()) for source in sources]
    whole = [pick is None or len(own) <= pick for own, pick in zip(ids, picks, strict=True)]
    settled, unfit = set[int](), set[int]()  # what a later source surely has; what may end up with another grade
    for source, own, every in zip(reversed(sources), reversed(ids), reversed(whole), strict=True):
        fits = (source.grade >= at_least) & (source.grade < below)
        unfit |= set(source.order[~fits].tolist()) - settled
        settled |= own if every else set()
    always = settled - unfit
    sure, most = 0, 0
    for number, (own, pick) in enumerate(zip(ids, picks, strict=True)):
        if pick is not None and not whole[number]:
            others = set().union(*(ids[:number] + ids[number + 1 :]))
            sure += max(0, pick - len(own & (unfit | others)))
            most = max(most, pick - len(own & unfit))
    return max(len(always) + sure, most)
