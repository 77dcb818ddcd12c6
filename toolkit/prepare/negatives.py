"""Hard negatives of a stage's rows, mined before it trains; kept by content below <run>/prepared/.

Called by training on every rank: all of them search, rank 0 writes; a problem is a RecipeError on every rank.
"""

import hashlib
import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from toolkit.data.beir import read_beir_texts
from toolkit.data.faults import Skipped, keep_skipped, say_skipped, skipping
from toolkit.data.negatives import MiningRows, known_positives, mining_rows
from toolkit.data.pair_records import pair_files
from toolkit.export.write import load_export, read_record
from toolkit.files import replacing_folder
from toolkit.models.in_context import without_context
from toolkit.models.retriever import Retriever
from toolkit.prepare.pairs import limited_pairs
from toolkit.prepare.sources import KnownSource, check_unchanged, known_sources
from toolkit.ranks.together import on_every_rank, together
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.pairs import FolderPairs, PairFields, PairsData, PairSource
from toolkit.recipe.search import Bm25Mine, Mine, RetrieverMine
from toolkit.recipe.sources import source_name
from toolkit.retrieval.bm25 import SETTINGS, warn_if_nothing_found
from toolkit.retrieval.context import in_own_context
from toolkit.retrieval.mining import (
    Mined,
    Search,
    bm25_reading,
    bm25_search,
    check_mined,
    digest_of_all,
    mine,
    retriever_search,
    write_mined,
)
from toolkit.retrieval.words import CODE

_HOW_BM25_READS = "data.mine.text and data.mine.language"
_LAYOUT = 2  # of what is kept; one more makes older folders unread


def with_negatives(
    data: PairsData, previous: Path | None, run: Path, seed: int, device: torch.device | str
) -> PairsData:
    """The data of a stage with mined rows in place of its sources; as it is where the recipe mines none.

    Each source is searched for itself: the passages of its rows and, of format beir, its corpus. What is known to be a
    positive of a query in any of them is no negative of it. All nodes must see `run`.

    Args:
        previous: the export of the stage before.
        seed: draws the rows of a limited source, and the negatives.

    Raises:
        RecipeError: for malformed data, an export that cannot be loaded, rows that all get no negative, or a damaged
            folder.
    """
    settings = data.mine
    if settings is None:
        return data

    known: list[KnownSource] = []  # on rank 0

    def find() -> list[Any]:
        known.extend(known_sources(data.sources, run.parent / "prepared"))
        folder = run / "prepared" / f"mined_{_key(data, [source.content for source in known], previous, seed)}"
        return [str(folder), folder.is_dir()]

    name, there = together(find)
    if not there:
        _mine_all(data, known, previous, Path(name), seed, device)
    sources = [_mined_source(source, Path(name) / str(number)) for number, source in enumerate(data.sources)]

    def check() -> None:
        say_skipped(Path(name))
        for source in sources:
            _check(Path(source.folder))

    together(check)
    return data.model_copy(update={"sources": sources, "mine": None})


def passages_beside(source: PairSource, skipped: Skipped | None) -> list[str]:
    """The passages of a source that no row need name: the corpus of a folder in BEIR layout."""
    if isinstance(source, FolderPairs) and source.format == "beir":
        return list(read_beir_texts(pair_files(source)[0], skipped).values())
    return []


def _key(data: PairsData, contents: list[str], previous: Path | None, seed: int) -> str:
    """16 hex digits of all that decides what is mined: texts, settings, seed, and who searches."""
    assert data.mine is not None
    sources = [source.model_dump(mode="json", exclude={"folder", "weight"}) for source in data.sources]
    parts = [
        _LAYOUT,
        contents,
        sources,
        data.faulty_rows,
        data.mine.model_dump(mode="json"),
        seed,
        _searcher(data.mine, previous),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _searcher(settings: Mine, previous: Path | None) -> dict[str, Any]:
    if isinstance(settings, Bm25Mine):
        return about_bm25(settings.text, settings.language)
    assert previous is not None
    return about_export(previous)


def about_bm25(text: Literal["prose", "code"], reading: str | None) -> dict[str, Any]:
    """What decides the scores of BM25; `reading`: as the passages are read, None if that is still to be detected."""
    versions = {package: version(package) for package in ("bm25s", "PyStemmer", "regex")}
    language = None if text == CODE else reading
    return {"bm25": text, "language": language, "k1_b": list(SETTINGS[text]), "versions": versions}


def about_export(folder: Path) -> dict[str, Any]:
    """What decides the vectors of an export; RecipeError if it is none."""
    return {key: read_record(folder)[key] for key in ("weights_sha256", "settings", "dtype")}


def _mine_all(
    data: PairsData,
    sources: list[KnownSource],
    previous: Path | None,
    folder: Path,
    seed: int,
    device: torch.device | str,
) -> None:
    settings = data.mine
    assert settings is not None
    skipped = skipping(data.faulty_rows)
    every = on_every_rank(
        lambda: [list(limited_pairs(source, i, seed, Counter(), skipped)) for i, source in enumerate(data.sources)]
    )
    known = known_positives(record for records in every for record in records)
    retriever = None
    if isinstance(settings, RetrieverMine):
        assert previous is not None  # the recipe demands it
        retriever = on_every_rank(lambda: load_export(previous, device))
    results: list[tuple[MiningRows, Mined, dict[str, Any]]] = []
    readings: list[str] = []  # of BM25, a source each
    for number, (source, records) in enumerate(zip(data.sources, every, strict=True)):
        if not records:
            raise RecipeError(f"data.sources.{number}: holds no pair; name a source that holds some")
        rows = on_every_rank(
            lambda source=source, records=records: mining_rows(
                records, passages_beside(source, skipping(data.faulty_rows)), known
            )
        )
        about = {"source": source_name(source), "texts": digest_of_all(rows), "seed": seed}
        if isinstance(settings, Bm25Mine):
            readings.append(bm25_reading(rows, settings, f"data.sources.{number}", "data.mine.language"))
            about["by"] = about_bm25(settings.text, readings[number])
            search = on_every_rank(lambda rows=rows, number=number: bm25_search(rows, reading=readings[number]))
        else:
            assert retriever is not None
            about["by"] = _searcher(settings, previous)
            search = _retriever_search(rows, retriever, source, seed)
        results.append((rows, mine(rows, search, settings, seed, number), about))

    def write() -> None:
        with replacing_folder(folder) as work:
            for number, (rows, mined, about) in enumerate(results):
                (work / str(number)).mkdir()
                if readings:
                    of, without = f"queries of data.sources.{number}", int((mined.found == 0).sum())
                    warn_if_nothing_found(of, without, len(mined.found), readings[number], _HOW_BM25_READS)
                try:
                    line = write_mined(rows, mined, settings, work / str(number), about)
                except ValueError as error:
                    raise RecipeError(f"data.mine: source {number}: {error}") from None
                print(f"data.sources.{number}: {line}", flush=True)
            check_unchanged(sources)
            keep_skipped(skipped, work)

    together(write)


def _retriever_search(rows: MiningRows, retriever: Retriever, source: PairSource, seed: int) -> Search:
    """By vectors; a contextual retriever reads all of a source's texts with some of its own passages."""
    prefixes = {"query_prefix": source.query_prefix, "passage_prefix": source.passage_prefix}
    own = {key: prefix for key, prefix in prefixes.items() if prefix is not None}
    prefixed = without_context(retriever)._replace(settings=retriever.settings.model_copy(update=own))
    return retriever_search(
        in_own_context(prefixed, rows.passages, len(rows.passages), source_name(source), seed), rows
    )


def _mined_source(source: PairSource, folder: Path) -> FolderPairs:
    """A source of the mined rows in place of the one they come from; its limit is met already."""
    kept = {key: getattr(source, key) for key in ("weight", "query_prefix", "passage_prefix")}
    fields = PairFields(weight="weight")  # pyright: ignore[reportCallIssue]
    return FolderPairs(folder=str(folder), fields=fields, **kept)  # pyright: ignore[reportCallIssue]


def _check(folder: Path) -> None:
    try:
        check_mined(folder)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{folder.parent}: is damaged ({error}); delete it, and it is made again") from None
