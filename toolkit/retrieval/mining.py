"""Hard negatives of rows of pairs: each rank searches for its share of the rows, rank 0 writes them.

Called by the command toolkit.mine and, before a stage trains, by prepare_negatives.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from toolkit.collectives import on_rank_zero, rank, world_size
from toolkit.data.negatives import ANCHORS, MiningRows, anchors, eligible, lowest_limit
from toolkit.data.pair_records import PairRecord
from toolkit.determinism import generator
from toolkit.files import sha256
from toolkit.models.retriever import Retriever
from toolkit.ranks.together import on_every_rank
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.search import Bm25Mine, MineSettings
from toolkit.retrieval.bm25 import best_found, bm25_index, bm25_scores, say_language
from toolkit.retrieval.embed import embed_texts
from toolkit.retrieval.mining_advice import why_none
from toolkit.retrieval.search import top_k
from toolkit.retrieval.vectors import gather_rows
from toolkit.retrieval.words import reading_of

ROWS, SCORES, RECORD = "pairs.jsonl", "scores.npy", "mined.json"
_ROWS_AT_ONCE = 1024
_MANY = 0.1  # share of rows without a negative that is worth a warning
_SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)  # quantiles of the scores in the record

# Numbers of rows and k -> best first: scores fp32 and indices int64 [rows, k], -1 for none; scores of the positives.
Search = Callable[[range, int], tuple[np.ndarray, np.ndarray, list[np.ndarray]]]


class Mined(NamedTuple):
    """What was found for all rows, the same on every rank."""

    negatives: np.ndarray  # int64 [rows, settings.negatives]: indices of passages in the order of ranks, -1 for none
    scores: np.ndarray  # fp32 [rows, 1 + settings.negatives]: that of settings.positive, the mined ones; NaN for none
    too_high: np.ndarray  # int64 [rows]: passages of the ranks that scored too high
    positives: np.ndarray  # fp64 [rows, 3]: scores of the positives, in the order of ANCHORS
    least: np.ndarray  # fp32 [rows]: the lowest score of the ranks; NaN where they hold no passage
    ranked: np.ndarray  # int64 [rows]: passages that have a rank, as far as was searched
    found: np.ndarray  # int64 [rows]: these and those that are never mined


def retriever_search(retriever: Retriever, rows: MiningRows) -> Search:
    """Search by inner product of vectors; every rank calls it and embeds its share of the texts.

    Raises:
        ValueError: if a vector is not finite.
    """
    passages = embed_texts(retriever, rows.passages, "passage")
    queries = embed_texts(retriever, [record.query for record in rows.records], "query")

    def search(block: range, k: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        scores, indices = top_k(queries[block.start : block.stop], passages, k)
        return scores, indices, [passages[rows.positives[row]] @ queries[row] for row in block]

    return search


def bm25_reading(rows: MiningRows, settings: Bm25Mine, of: str, key: str) -> str:
    """How BM25 reads the rows; rank 0 says in one line what is detected, and that `key` sets another language."""
    queries = [record.query for record in rows.records]
    reading = reading_of(settings.text, settings.language, rows.passages, queries)
    if settings.language is None and rank() == 0:
        say_language(of, reading, key)
    return reading


def bm25_search(rows: MiningRows, *, reading: str) -> Search:
    """Search by BM25; see toolkit.retrieval.words for the reading. Raises ValueError if no passage has a word."""
    index = bm25_index(rows.passages, reading=reading)

    def search(block: range, k: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        k = min(k, len(rows.passages))
        scores, indices = np.zeros((len(block), k), np.float32), np.full((len(block), k), -1, np.int64)
        of_positives = []
        queries = [rows.records[row].query for row in block]
        for i, found in enumerate(bm25_scores(index, queries, reading=reading)):
            of_positives.append(found[rows.positives[block[i]]])
            chosen = best_found(found, k)
            scores[i, : len(chosen)], indices[i, : len(chosen)] = found[chosen], chosen
        return scores, indices, of_positives

    return search


def digest_of_all(rows: MiningRows) -> str:
    """32 hex digits of the passages and queries, which all ranks must have read alike; all of them call it.

    Raises:
        RecipeError: on every rank, if they have not.
    """
    digest = hashlib.blake2b(digest_size=16)
    for text in (*rows.passages, *(record.query for record in rows.records)):
        digest.update(hashlib.blake2b(text.encode(), digest_size=16).digest())
    first = on_rank_zero(digest.hexdigest)

    def check() -> None:
        if digest.hexdigest() != first:
            raise RecipeError("the nodes hold different pairs or passages; put the data on a disk that all of them see")

    on_every_rank(check)
    return first


def mine(rows: MiningRows, search: Search, settings: MineSettings, seed: int, source: int) -> Mined:
    """Hard negatives of all rows; every rank calls it.

    A row is given as many as it lacks of `settings.negatives`, drawn from what `eligible` allows by (seed, source, row)
    whatever the number of ranks; where there are fewer, it gets those. Its positives' scores are its own search's.
    """
    count, last = settings.negatives, settings.ranks[1]
    own = range(*(len(rows.records) * part // world_size() for part in (rank(), rank() + 1)))
    negatives = np.full((len(own), count), -1, np.int64)
    scores = np.full((len(own), 1 + count), np.nan, np.float32)
    too_high, ranked, found = (np.zeros(len(own), np.int64) for _ in range(3))
    of_positives, least = np.zeros((len(own), len(ANCHORS))), np.full(len(own), np.nan, np.float32)
    for first in range(own.start, own.stop, _ROWS_AT_ONCE):
        block = range(first, min(first + _ROWS_AT_ONCE, own.stop))
        searched = search(block, last + max(len(rows.excluded[row]) for row in block))
        for row, row_scores, indices, positives in zip(block, *searched, strict=True):
            i = row - own.start
            of_positives[i] = anchors(positives)
            positive = of_positives[i, ANCHORS.index(settings.positive)]
            limit = float(lowest_limit(positive, settings))
            places, window, ranked[i] = eligible(row_scores, indices, rows.excluded[row], limit, settings)
            too_high[i], found[i] = len(window) - len(places), (indices >= 0).sum()
            if len(window):
                least[i] = row_scores[window[-1]]
            lacking = max(0, count - len(rows.own[row]))
            if len(places) > lacking:
                places = np.sort(generator("mine", seed, source, row).permutation(places)[:lacking])
            negatives[i, : len(places)] = indices[places]
            scores[i, 0], scores[i, 1 : 1 + len(places)] = positive, row_scores[places]
    return Mined(*map(gather_rows, (negatives, scores, too_high, of_positives, least, ranked, found)))


# --------------------------------------------------------------------------- what is written


def write_mined(rows: MiningRows, mined: Mined, settings: MineSettings, folder: Path, about: dict[str, Any]) -> str:
    """Write rows with their negatives into an existing folder; rank 0 calls it. Returns a line of counts.

    pairs.jsonl: query, positives, negatives (the row's own, then the mined ones in the order of their ranks) and weight
    of every row, as a source of format pairs reads them. scores.npy: `Mined.scores`. mined.json: `about`, settings,
    counts and quantiles of the scores, SHA-256 of pairs.jsonl. A warning says why, if more than a tenth of the rows
    have no negative.

    Raises:
        ValueError: if rows lack negatives and none was mined.
    """
    digest = hashlib.sha256()
    with (folder / ROWS).open("wb") as file:
        for line in _lines(rows, mined):
            digest.update(line)
            file.write(line)
    np.save(folder / SCORES, mined.scores, allow_pickle=False)
    found = (mined.negatives >= 0).sum(1)
    have = found + np.array([len(own) for own in rows.own])
    counts = {
        "rows": len(rows.records),
        "passages": len(rows.passages),
        "mined": int(found.sum()),
        "rows_with_fewer": int((have < settings.negatives).sum()),
        "rows_with_none": int((have == 0).sum()),
        "scored_too_high": int(mined.too_high.sum()),
    }
    if not counts["mined"] and counts["rows_with_fewer"]:
        raise ValueError(f"no row got a negative: {_why_none(mined, have < settings.negatives, settings)}")
    if counts["rows_with_none"] > _MANY * len(have):
        told = f"{counts['rows_with_none']:,} of {len(have):,} rows have no negative"
        print(f"warning: {told}: {_why_none(mined, have == 0, settings)}", file=sys.stderr, flush=True)
    record = about | {
        "settings": settings.model_dump(mode="json"),
        "counts": counts,
        "scores": {"positives": _quantiles(mined.scores[:, 0]), "mined": _quantiles(mined.scores[:, 1:])},
        "pairs_sha256": digest.hexdigest(),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return (
        f"mined: {counts['mined']:,} hard negatives for {counts['rows']:,} rows from {counts['passages']:,} passages; "
        f"{counts['rows_with_fewer']:,} rows have fewer than {settings.negatives}, {counts['rows_with_none']:,} none; "
        f"{counts['scored_too_high']:,} passages scored too high"
    )


def _why_none(mined: Mined, rows: np.ndarray, settings: MineSettings) -> str:
    return why_none(mined.positives[rows], mined.least[rows], mined.too_high[rows], mined.ranked[rows], settings)


def check_mined(folder: Path) -> None:
    """Raise ValueError or OSError if the rows in a folder are not those that were written."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if sha256(folder / ROWS) != record["pairs_sha256"]:
        raise ValueError(f"{ROWS} is not as it was written")


def _lines(rows: MiningRows, mined: Mined) -> Iterable[bytes]:
    for record, own, numbers in zip(rows.records, rows.own, mined.negatives.tolist(), strict=True):
        negatives = [*own, *(rows.passages[number] for number in numbers if number >= 0)]
        yield (json.dumps(_row(record, negatives), ensure_ascii=False) + "\n").encode()


def _row(record: PairRecord, negatives: list[str]) -> dict[str, Any]:
    return {"query": record.query, "positives": record.positives, "negatives": negatives, "weight": record.weight}


def _quantiles(scores: np.ndarray) -> dict[str, float]:
    there = scores[~np.isnan(scores)]
    return {str(share): round(float(np.quantile(there, share)), 4) for share in _SHARES} if len(there) else {}
