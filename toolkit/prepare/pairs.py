"""Pairs of a stage as token ids, cached by content in <run>/../prepared, where all runs of that folder find them.

Called by training on every rank: rank 0 does the work, and if it fails every rank raises the same RecipeError.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.data.faults import Skipped, keep_skipped, skipping
from toolkit.data.first_look import look_at_pairs, no_negatives, too_few
from toolkit.data.pair_records import PairRecord, read_pairs
from toolkit.data.pairs import PairStore, Prefixes, write_pairs
from toolkit.determinism import generator
from toolkit.prepare.models import ids_digest, text_ids
from toolkit.prepare.sources import prepared_folder
from toolkit.ranks.together import open_everywhere, together
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.models import EncoderSettings
from toolkit.recipe.pairs import PairsData, PairSource

_LAYOUT = 4  # of the store; one more makes older caches unread
# Keys of a source that do not change what is stored: place and share. Its prefixes are resolved first.
_NOT_STORED = {"folder", "weight", "query_prefix", "passage_prefix"}


def prepare_pairs(data: PairsData, encoder: EncoderSettings, tokenizer_folder: Path, run: Path, seed: int) -> PairStore:
    """The pairs of a stage's sources, of which rows that have too few texts are told, as tokens_of_pairs.

    Raises:
        RecipeError: as tokens_of_pairs, and for hard negatives asked for where no row has any.
    """
    store = tokens_of_pairs(data, encoder, tokenizer_folder, run, seed)
    together(lambda: _check_slots(store, data))
    return store


def tokens_of_pairs(
    data: PairsData, encoder: EncoderSettings, tokenizer_folder: Path, run: Path, seed: int
) -> PairStore:
    """The pairs of a stage's sources, tokenised once beside `run`, on a disk that all nodes must see.

    `tokenizer_folder` is that of the model: config.json tells which ids have an embedding. Rows and texts have the same
    numbers whatever the tokenizer and the longest input.

    The cache is keyed by what the files hold, wherever they lie. Files whose names, sizes and times are as they were
    when they were last read are not read again.

    Raises:
        RecipeError: for malformed or empty data, a limit above a source's rows, or files that change while they are
            read; the same on every rank.
    """

    def write(work: Path) -> str:
        counts = [Counter[str]() for _ in data.sources]
        skipped = skipping(data.faulty_rows)
        prefixes = [_prefixes(source, encoder) for source in data.sources]
        records = _records(data, seed, counts, skipped)
        meta = write_pairs(records, prefixes, text_ids(encoder, tokenizer_folder), work)
        keep_skipped(skipped, work)
        return _announcement(meta, sum(counts, Counter()))

    def prepare() -> str:
        def key(contents: list[str]) -> str:
            return _key(data, contents, encoder, tokenizer_folder, seed)

        return str(prepared_folder("pairs", data.sources, run, key, write))

    return open_everywhere(Path(together(prepare)), PairStore)


# --------------------------------------------------------------------------- the key of the cache


def _key(data: PairsData, contents: list[str], encoder: EncoderSettings, tokenizer_folder: Path, seed: int) -> str:
    """16 hex digits of everything that decides what is stored."""
    sources = [source.model_dump(mode="json", exclude=_NOT_STORED) for source in data.sources]
    limited = any(source.limit is not None for source in data.sources)
    parts = [
        _LAYOUT,
        contents,
        sources,
        data.faulty_rows,
        ids_digest(tokenizer_folder),
        [_prefixes(source, encoder) for source in data.sources],
        [encoder.max_tokens, encoder.append_eos],
        seed if limited else None,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _prefixes(source: PairSource, encoder: EncoderSettings) -> Prefixes:
    return (
        encoder.query_prefix if source.query_prefix is None else source.query_prefix,
        encoder.passage_prefix if source.passage_prefix is None else source.passage_prefix,
    )


# --------------------------------------------------------------------------- writing


def _records(
    data: PairsData, seed: int, counts: list[Counter[str]], skipped: Skipped | None
) -> Iterator[tuple[int, PairRecord]]:
    """(source number, row) of all sources."""
    for number, source in enumerate(data.sources):
        some = False
        for record in limited_pairs(source, number, seed, counts[number], skipped):
            some = True
            yield number, record
        if not some:
            raise RecipeError(
                f"data.sources.{number}: no pair in {counts[number]['rows']} rows; name a source that holds some"
            )


def limited_pairs(
    source: PairSource, number: int, seed: int, counts: Counter[str], skipped: Skipped | None
) -> Iterator[PairRecord]:
    """A source's rows or, with a limit, the first so many of a permutation of them, in the source's order."""
    if source.limit is None:
        yield from read_pairs(source, counts, skipped)
        return
    total = sum(1 for _ in read_pairs(source, counts, skipped))
    if 0 < total < source.limit:
        raise RecipeError(
            f"data.sources.{number}.limit: {source.limit} rows are more than the source's {total}; lower or remove it"
        )
    chosen = np.zeros(total, dtype=bool)
    chosen[generator("limit", seed, number).permutation(total)[: source.limit]] = True
    for row, record in enumerate(read_pairs(source, Counter(), None if skipped is None else Skipped())):
        if chosen[row]:
            yield record


def _check_slots(store: PairStore, data: PairsData) -> None:
    """Warn of the rows of each source that have fewer positives or negatives than the recipe takes of a row.

    Raises:
        RecipeError: if it takes negatives and no row has one.
    """
    if data.negatives and not store.meta["hard_negatives"]:
        raise RecipeError(no_negatives(data.negatives, [look_at_pairs(source, data) for source in data.sources]))
    ends = np.cumsum(store.sizes)
    for key, wanted, texts in (
        ("positives", data.positives, store.positives),
        ("negatives", data.negatives, store.negatives),
    ):
        have = np.diff(texts.offsets)
        for number, (size, end) in enumerate(zip(store.sizes, ends, strict=True)):
            if line := too_few(key, wanted, have[end - size : end].tolist(), "rows"):
                print(f"warning: data.sources.{number}: {line}", file=sys.stderr, flush=True)


def _announcement(meta: dict[str, Any], counts: Counter[str]) -> str:
    return (
        f"data: {counts['rows']:,} rows, {counts['empty']:,} of them without text; "
        + (f"{counts['missing']:,} judged texts are missing; " if counts["missing"] else "")
        + f"{sum(meta['sizes']):,} pairs, {meta['queries']:,} queries, {meta['documents']:,} documents, "
        f"{meta['hard_negatives']:,} hard negatives (data.negatives of a row are used), "
        f"digest {meta['digest']}, {meta['tokens']:,} tokens"
    )
