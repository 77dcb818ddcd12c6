"""Graded rows of a stage as token ids, cached by content in <run>/../prepared, where all runs of that folder find them.

Called by training on every rank: rank 0 does the work, and if it fails every rank raises the same RecipeError.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolkit.data.faults import keep_skipped, skipping
from toolkit.data.graded import GradedStore, Picks
from toolkit.data.graded_records import GradedRow, read_graded
from toolkit.data.graded_write import How, write_graded
from toolkit.files import expanded
from toolkit.prepare.models import ids_digest, text_ids
from toolkit.prepare.sources import prepared_folder
from toolkit.ranks.together import open_everywhere, together
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.graded import FolderGraded, GradedData
from toolkit.recipe.models import EncoderSettings
from toolkit.recipe.sources import source_name

_LAYOUT = 2  # of the store; one more makes older caches unread


def prepare_graded(data: GradedData, encoder: EncoderSettings, tokenizer_folder: Path, run: Path) -> GradedStore:
    """The graded rows of a stage's sources, put together and tokenised once beside `run`, on a disk all nodes must see.

    `tokenizer_folder` is that of the model: config.json tells which ids have an embedding. The cache is keyed by what
    the files hold, wherever they lie, and by what decides which rows are there.

    Raises:
        RecipeError: for malformed or empty data, rows with too few passages for a group, or files that change while
            they are read; the same on every rank.
    """

    def write(work: Path) -> str:
        counts = [Counter[str]() for _ in data.sources]
        skipped = skipping(data.faulty_rows)
        sources = [
            (whose, _some(read_graded(source, counts[number], skipped), number, counts[number]))
            for number, (source, whose) in enumerate(zip(data.sources, shared_ids(data), strict=True))
        ]
        how = How(data.join, picks_of(data), data.group, (encoder.query_prefix, encoder.passage_prefix))
        meta = write_graded(sources, how, text_ids(encoder, tokenizer_folder), work, skipped)
        if not meta["rows"]:
            last = f", the last: {skipped.last}" if skipped is not None else ""
            raise RecipeError(f"data.sources: no query has the passages of a group{last}")
        keep_skipped(skipped, work)
        return "\n".join([*_read(data, counts, meta), _announcement(meta)])

    def prepare() -> str:
        def key(contents: list[str]) -> str:
            return _key(data, contents, encoder, tokenizer_folder)

        return str(prepared_folder("graded", data.sources, run, key, write))

    store = open_everywhere(Path(together(prepare)), GradedStore)
    together(lambda: _warn(store.meta, data))
    return store


def picks_of(data: GradedData) -> Picks:
    """Of each source how many passages are drawn at random."""
    return [None if source.pick is None else source.pick.random for source in data.sources]


def shared_ids(data: GradedData) -> list[int]:
    """Of each source the first one whose ids mean the same, as they do within a folder or a dataset."""
    whose = [
        str(expanded(source.folder).resolve()) if isinstance(source, FolderGraded) else source_name(source)
        for source in data.sources
    ]
    return [whose.index(name) for name in whose]


def _some(rows: Iterator[GradedRow], number: int, counts: Counter[str]) -> Iterator[GradedRow]:
    """The rows; RecipeError at the end if there was none."""
    some = False
    for row in rows:
        some = True
        yield row
    if not some:
        raise RecipeError(
            f"data.sources.{number}: no graded row in {counts['rows']} rows; name a source that holds some"
        )


def _key(data: GradedData, contents: list[str], encoder: EncoderSettings, tokenizer_folder: Path) -> str:
    """16 hex digits of everything that decides what is stored."""
    group = data.group
    parts = [
        _LAYOUT,
        contents,
        [source.model_dump(mode="json", exclude={"folder", "judgements"}) for source in data.sources],
        shared_ids(data),
        data.join,
        data.faulty_rows,
        # What decides which rows have enough passages, and what is said of the others.
        [group.size, group.by, group.few],
        ids_digest(tokenizer_folder),
        [encoder.query_prefix, encoder.passage_prefix],
        [encoder.max_tokens, encoder.append_eos],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


# --------------------------------------------------------------------------- what is said


def _read(data: GradedData, counts: list[Counter[str]], meta: dict[str, Any]) -> Iterator[str]:
    """A line for each source: its rows, and all of it that is not used."""
    left_out = {
        "empty": "rows without a query or a passage",
        "blank": "passages without text",
        "missing": "judged texts that are missing",
        "unasked": "queries without judgements",
        "unnamed": "passages that no query names",
        "filtered": "passages of other grades",
        "cut": "passages after the first ones",
        "unrelated": "docstrings without code near theirs",
    }
    for number, (source, count) in enumerate(zip(data.sources, counts, strict=True)):
        not_used = [f"{count[kind]:,} {what}" for kind, what in left_out.items() if count[kind]]
        told = f"; not used: {', '.join(not_used)}" if not_used else ""
        known = f", for {meta['known_to'][number]:,} of the queries" if len(data.sources) > 1 else ""
        yield f"data.sources.{number}: {source_name(source)}: {count['rows']:,} rows{known}{told}"


def _announcement(meta: dict[str, Any]) -> str:
    shared = f" ({meta['told']['shared']:,} of them in all {meta['sources']} sources)" if meta["sources"] > 1 else ""
    return (
        f"data: {meta['rows']:,} queries{shared}, {meta['passages']:,} passages, {meta['graded']:,} graded passages of "
        f"queries (grades {meta['grades']}), digest {meta['digest']}, {meta['tokens']:,} tokens"
    )


def _warn(meta: dict[str, Any], data: GradedData) -> None:
    """Every run says what of the prepared rows it does not use, or uses twice."""
    told, rows, group = meta["told"], meta["rows"], data.group
    lines = []
    if meta["sources"] > 1 and not told["shared"]:
        what = "ids" if data.join == "query_id" else "texts"
        why = f"do their queries' {what} agree?"
        if told["known"]:
            why = f"{told['known']:,} queries are in all, but at_least and below leave some source without passages"
        lines.append(f"data.join: no query has passages in all {meta['sources']} sources; {why}")
    if told.get("repeated"):
        lines.append(
            f"data.group: {told['repeated']:,} of {rows:,} queries have fewer than {group.size} passages "
            "for a group in some epoch; they are repeated"
        )
    if told.get("unread"):
        which = "below the highest grade and not below 1" if group.by == "positive_first" else f"after {group.size}"
        lines.append(f"data.group: {told['unread']:,} passages are in no group: those {which} of a query")
    if told.get("regraded"):
        lines.append(
            f"data.sources: {told['regraded']:,} grades are not used, since the passage has another one further on for "
            "the same query; the last one counts"
        )
    if told.get("twice"):
        lines.append(
            f"data.sources: {told['twice']:,} of {rows:,} queries have a text twice, under two ids; ids mean the same "
            "within a folder or dataset only"
        )
    for line in lines:
        print(f"warning: {line}", file=sys.stderr, flush=True)
