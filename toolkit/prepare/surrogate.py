"""Vectors of the texts of pairs by a surrogate, made once and kept by content in <run>/../prepared.

Called by every rank: a retriever's are made by all of them, BM25's by rank 0, block by block; no rank ever holds all.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from toolkit.collectives import on_rank_zero, rank
from toolkit.data.faults import skipping
from toolkit.data.pair_records import PairRecord
from toolkit.data.pairs import PairStore
from toolkit.data.surrogate import Side, SurrogateVectors, check_vectors, store_texts
from toolkit.export.write import load_export
from toolkit.files import placing_folder, sha256
from toolkit.models.in_context import without_context
from toolkit.models.retriever import Retriever
from toolkit.prepare.negatives import about_bm25
from toolkit.prepare.pairs import limited_pairs
from toolkit.ranks.telling import telling
from toolkit.ranks.together import on_every_rank, open_everywhere, together, together_for_long
from toolkit.recipe.errors import RecipeError, one_line
from toolkit.recipe.evaluation import EvalSettings
from toolkit.recipe.pairs import PairsData
from toolkit.recipe.surrogate import Bm25Surrogate, PreviousSurrogate, RetrieverSurrogate, Surrogate
from toolkit.retrieval.bm25 import say_language
from toolkit.retrieval.context import in_own_context
from toolkit.retrieval.embed import checkpoint_digest, encode
from toolkit.retrieval.reduce import FIT_ROWS, check_dim, sparse_svd_basis, svd_basis, unit
from toolkit.retrieval.retrievers import load_any, names_no_retriever
from toolkit.retrieval.settings import with_settings
from toolkit.retrieval.vectors import Store, is_finished, open_shard, save_shard
from toolkit.retrieval.word_vectors import weighted, word_weights
from toolkit.retrieval.words import reading_of

BLOCK = 2**16  # texts that are embedded, written and forgotten together
_CONTEXT_SEED = 0  # of a contextual retriever, which reads with some of the documents
_LAYOUT = 1  # of what is kept; one more makes older folders unread
_SIDES: tuple[tuple[Side, Any], ...] = (("query", "query"), ("document", "passage"))  # and whose prefix
_LOOKED_AT = 10_000  # texts of each side by which BM25 finds the language

Texts = Callable[[Side], Iterator[str]]  # the store's texts by their numbers, read anew
Say = Callable[[str], None]
Still = Callable[[], None]  # rank 0 tells the others that it still works
Made = TypeVar("Made")


class Known(NamedTuple):
    """A surrogate of some pairs."""

    key: str  # 16 hex digits of all that decides its vectors
    retriever: Retriever | None  # None: BM25


def missing_folder(surrogate: Surrogate) -> str | None:
    """What is wrong with a surrogate that a recipe names by a folder which is not there; no access to the hub."""
    if isinstance(surrogate, RetrieverSurrogate) and names_no_retriever(surrogate.from_):
        return f"{one_line(surrogate.from_)}: no such folder; name the folder of a retriever, or its id on the hub"
    return None


def know_surrogate(
    surrogate: Surrogate, store: PairStore, previous: Path | None, device: torch.device | str, at: str
) -> Known:
    """Who embeds; every rank calls it, and loads the retriever.

    Raises:
        RecipeError: for a retriever that cannot be loaded.
    """
    retriever: Retriever | None = None
    try:
        if isinstance(surrogate, RetrieverSurrogate):
            changes = EvalSettings.model_validate(surrogate.model_dump(exclude={"by", "from_", "svd", "dense"}))
            found = load_any(surrogate.from_, None, changes, torch.device(device), surrogate.dense).retriever
            retriever = on_every_rank(lambda: with_settings(found, changes))
        elif isinstance(surrogate, PreviousSurrogate):
            assert previous is not None  # the recipe demands it
            retriever = on_every_rank(lambda: load_export(previous, device))
    except RecipeError as error:
        raise RecipeError(f"{at}: {_with_keys(str(error))}") from None
    loaded = retriever

    def key() -> str:
        if isinstance(surrogate, Bm25Surrogate):
            who: Any = about_bm25(surrogate.text, surrogate.language)
        else:
            assert loaded is not None
            who = checkpoint_digest(loaded)
        texts = hashlib.sha256(store.query_key.tobytes())
        texts.update(store.document_key.tobytes())
        parts = [_LAYOUT, surrogate.svd, who, len(store.query), texts.hexdigest()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    return Known(together(key), retriever)


def _with_keys(problem: str) -> str:
    """What evaluation says of its flags, said of the keys of a surrogate."""
    for key in ("max_tokens", "query_prefix", "passage_prefix", "pooling", "normalize"):
        problem = problem.replace(f"--{key.replace('_', '-')}", key)
    return problem.replace("eval.max_tokens", "max_tokens")


def surrogate_vectors(
    surrogate: Surrogate,
    data: PairsData,
    store: PairStore,
    previous: Path | None,
    run: Path,
    seed: int,
    device: torch.device | str,
    at: str = "data.clusters.surrogate",
) -> SurrogateVectors:
    """The vectors of the texts of a store, memory-mapped; every rank calls it.

    With `svd` they are of unit length (or zero, for a text without a word), else as the retriever gives them. A run
    that is interrupted goes on with the blocks that it lacks.

    Args:
        data: what the store was made of, with mined rows in place of its sources.
        previous: the export of the stage before.
        run: a folder on a disk that all nodes see.
        seed: that of the limits of sources.
        at: the key of the recipe that asks, for messages.

    Raises:
        RecipeError: for a retriever that cannot be loaded or gives vectors that are not finite, an `svd` that is too
            large, rows that changed, or a damaged folder; the same on every rank.
    """
    known = know_surrogate(surrogate, store, previous, device, at)
    folder = run.parent / "prepared" / f"surrogate_{known.key}"
    if not on_rank_zero(folder.is_dir):
        work = run / "prepared" / f"{folder.name}.work"

        def texts(side: Side) -> Iterator[str]:
            return store_texts(store, _records(data, seed), side)

        counts = {"query": len(store.query), "document": len(store.document)}
        if known.retriever is None:
            assert isinstance(surrogate, Bm25Surrogate)
            together_for_long(lambda still: _by_words(surrogate, texts, counts, folder, at, still))
        else:
            passages, total = on_every_rank(lambda: texts("document")), counts["document"]
            retriever = in_own_context(without_context(known.retriever), passages, total, at, _CONTEXT_SEED)
            _embed(retriever, texts, counts, surrogate.svd, work, at)
            together_for_long(lambda still: _gather(surrogate.svd, counts, work, folder, at, still))
            on_rank_zero(lambda: shutil.rmtree(work))

    def read(found: Path) -> SurrogateVectors:
        if rank() == 0:
            check_vectors(found)
        return SurrogateVectors.open(found, store)

    return open_everywhere(folder, read)


def _records(data: PairsData, seed: int) -> Iterator[PairRecord]:
    sources = enumerate(data.sources)
    some = (limited_pairs(source, i, seed, Counter(), skipping(data.faulty_rows)) for i, source in sources)
    return chain.from_iterable(some)


def _told(at: str, work: Callable[[], Made]) -> Made:
    try:
        return work()
    except ValueError as error:
        raise RecipeError(f"{at}: {error}") from None


# --------------------------------------------------------------------------- a retriever's


def _embed(retriever: Retriever, texts: Texts, counts: dict[str, int], svd: int | None, work: Path, at: str) -> None:
    """Write a file of vectors for each block of texts that has none yet, fp16 [texts, dim]."""
    shards = Store(work / "shards", "vectors")
    with telling() as say:
        for side, kind in _SIDES:
            following = texts(side)
            for first in range(0, counts[side], BLOCK):
                say(f"surrogate: {first:,} of {counts[side]:,} {side} texts are embedded")
                path = _block(work, side, first)
                block = on_every_rank(lambda following=following: list(islice(following, BLOCK)))
                if on_rank_zero(lambda path=path: is_finished(path, print)):
                    continue
                named = {f"{first + i} ({one_line(text, 40)})": text for i, text in enumerate(block)}
                try:
                    vectors = encode(retriever, named, kind, shards)
                except ValueError as error:
                    raise RecipeError(f"{at}: {error}; name another retriever") from None
                if svd is not None:  # told now, not when all are embedded
                    shape = (min(counts["query"], FIT_ROWS), vectors.shards[0].vectors.shape[1])
                    _told(f"{at}.svd", partial(check_dim, svd, *shape))
                together(lambda vectors=vectors, path=path, side=side: _keep(vectors.array(), path, side, at))
                del vectors
                on_rank_zero(lambda: shutil.rmtree(shards.folder))
            on_every_rank(lambda following=following: next(following, None))  # it checks that there are no more


def _block(work: Path, side: Side, first: int) -> Path:
    return work / f"{side}_{first // BLOCK:05d}.npy"


def _keep(vectors: np.ndarray, path: Path, side: Side, at: str) -> None:
    with np.errstate(over="ignore"):
        kept = vectors.astype(np.float16)
    bad = len(kept) - int(np.isfinite(kept).all(1).sum())
    if bad:
        fix = "set normalize to true"
        raise RecipeError(f"{at}: vectors of {bad:,} {side} texts are too large for 16 bits; {fix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_shard(path, kept)


def _gather(svd: int | None, counts: dict[str, int], work: Path, folder: Path, at: str, still: Still) -> None:
    """The blocks as one array a side, reduced if the recipe says so."""

    def blocks(side: Side) -> Iterator[np.ndarray]:
        return (open_shard(_block(work, side, first)) for first in range(0, counts[side], BLOCK))

    def fitted() -> Iterator[np.ndarray]:
        for number, block in enumerate(blocks("query")):
            if number * BLOCK < FIT_ROWS:
                yield block[: FIT_ROWS - number * BLOCK]

    with telling(still) as say:
        say("surrogate: SVD is fitted")
        basis = None if svd is None else _told(f"{at}.svd", lambda: svd_basis(fitted(), svd))

        def made(side: Side) -> Iterator[np.ndarray]:
            for block in blocks(side):
                yield block if basis is None else unit(block.astype(np.float32) @ basis)

        _write(folder, made, counts, say)


def _write(folder: Path, made: Callable[[Side], Iterator[np.ndarray]], counts: dict[str, int], say: Say) -> None:
    """Write blocks of vectors one after another, as fp16; the folder appears when it is whole."""
    with placing_folder(folder) as work:
        dim = 0
        for side, _ in _SIDES:
            array, first = None, 0
            for block in made(side):
                if array is None:
                    dim = block.shape[1]
                    shape = (counts[side], dim)
                    array = np.lib.format.open_memmap(work / f"{side}.npy", "w+", np.float16, shape)
                array[first : first + len(block)] = block
                first += len(block)
                say(f"surrogate: {first:,} of {counts[side]:,} {side} vectors are written")
            assert array is not None and first == counts[side]
            array.flush()
        digests = {side: sha256(work / f"{side}.npy") for side, _ in _SIDES}
        meta = json.dumps({"dim": dim, "sha256": digests}, indent=1)
        (work / "meta.json").write_text(f"{meta}\n", encoding="utf-8")
    print(
        f"surrogate: {counts['query']:,} query and {counts['document']:,} document vectors of {dim} dimensions",
        flush=True,
    )


# --------------------------------------------------------------------------- BM25's


def _by_words(
    surrogate: Bm25Surrogate, texts: Texts, counts: dict[str, int], folder: Path, at: str, still: Still
) -> None:
    looked = [list(islice(texts(side), _LOOKED_AT)) for side in ("document", "query")]
    reading = reading_of(surrogate.text, surrogate.language, *looked)
    if surrogate.language is None:
        say_language("the pairs", reading, f"{at}.language")
    with telling(still) as say:
        fitted = list(islice(texts("query"), FIT_ROWS))

        def documents() -> Iterator[list[str]]:
            first = 0
            for block in _in_blocks(texts("document")):
                say(f"surrogate: words of {first:,} of {counts['document']:,} document texts are counted")
                yield block
                first += len(block)

        weights = _told(at, lambda: word_weights(fitted, documents(), reading))
        say("surrogate: SVD is fitted")
        basis = _told(f"{at}.svd", lambda: sparse_svd_basis(weighted(fitted, weights), surrogate.svd))
        without = Counter[str]()

        def made(side: Side) -> Iterator[np.ndarray]:
            for block in _in_blocks(texts(side)):
                vectors = unit(weighted(block, weights) @ basis)
                without[side] += int((vectors == 0).all(1).sum())
                yield vectors

        _write(folder, made, counts, say)
    for side, count in without.items():
        if count:
            told = f"surrogate: {count:,} of {counts[side]:,} {side} texts share no word with the first {FIT_ROWS:,}"
            print(f"{told} queries; their vectors are zero", flush=True)


def _in_blocks(texts: Iterator[str]) -> Iterator[list[str]]:
    while block := list(islice(texts, BLOCK)):
        yield block
