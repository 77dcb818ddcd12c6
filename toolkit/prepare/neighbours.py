"""Bundles of documents that are neighbours, by BM25 or by the starting retriever; cached below <run>/prepared/.

Called by training on every rank: BM25 works on rank 0, all ranks embed; a problem is a RecipeError on every rank.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolkit.collectives import on_rank_zero
from toolkit.data.bundles import bundle
from toolkit.data.spans import PassageStore, document_places
from toolkit.files import replacing_folder, sha256
from toolkit.models.backbone import DTYPES
from toolkit.models.places import ModelSource
from toolkit.models.retriever import load_retriever
from toolkit.ranks.together import on_every_rank, open_everywhere, together
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.search import Bm25Neighbours
from toolkit.recipe.stage import Stage
from toolkit.retrieval.bm25 import bm25_neighbours, say_language, warn_if_nothing_found
from toolkit.retrieval.embed import embed_texts
from toolkit.retrieval.search import top_k
from toolkit.retrieval.words import reading_of

NEIGHBOURS = 32  # looked at for each document, then those of its neighbours
WORDS = 256  # of a document that BM25 reads, more or less: whole passages, until there are so many
_FILE = "order.npy"


def prepare_bundles(
    stage: Stage, store: PassageStore, retriever: ModelSource, run: Path, device: torch.device | str
) -> np.ndarray:
    """The documents of a store, each run of `data.interleave` a bundle of neighbours; made once below `run`.

    All nodes must see `run`. Embeddings made anew on another number of ranks may differ in their last bits, and so may
    bundles whose documents are nearly equally near; whoever resumes knows them by the digest of the order.

    Returns:
        int64 [documents], each once; see toolkit.data.bundles.

    Raises:
        RecipeError: for a retriever that cannot be loaded, documents without words, or a damaged cache.
    """
    folder = Path(together(lambda: str(run / "prepared" / f"bundles_{_key(stage, store, retriever)}")))
    if not on_rank_zero(folder.is_dir):
        data, size = stage.data, stage.data.interleave
        assert data.neighbours is not None and size is not None  # the recipe demands them
        if isinstance(data.neighbours, Bm25Neighbours):
            settings = data.neighbours
            together(lambda: _write(folder, _by_bm25(store, settings), size))
        else:
            vectors = _embedded(stage, store, retriever, device)
            together(lambda: _write(folder, _by_vectors(vectors), size))
    return open_everywhere(folder, lambda found: _read(found, store.meta["documents"]))


def _key(stage: Stage, store: PassageStore, retriever: ModelSource) -> str:
    """16 hex digits of what decides the bundles: texts, setting, size; of embeddings also weights and how they read."""
    assert stage.data.neighbours is not None
    parts: list[Any] = [store.digest, stage.data.neighbours.model_dump(), stage.data.interleave]
    if not isinstance(stage.data.neighbours, Bm25Neighbours):
        parts += [stage.encoder_settings.model_dump(), stage.precision, _content(retriever)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _content(model: ModelSource) -> list[list[str]]:
    """Names and hashes of the files that make a model."""
    folders = [model.folder] if model.adapter is None else [model.folder, model.adapter]
    found = []
    for path in (path for folder in folders for path in sorted(folder.iterdir())):
        if path.suffix in (".safetensors", ".json", ".model", ".txt"):
            found.append([path.name, sha256(path)])
    return found


def _by_bm25(store: PassageStore, settings: Bm25Neighbours) -> np.ndarray:
    first, length = document_places(store.document)
    heads = [_head(store, int(start), int(count)) for start, count in zip(first, length, strict=True)]
    reading = reading_of(settings.text, settings.language, heads, [])
    if settings.language is None:
        say_language("the documents", reading, "data.neighbours.language")
    try:
        found = bm25_neighbours(heads, NEIGHBOURS, reading=reading)
    except ValueError as error:
        raise RecipeError(f'data.neighbours: {error}; choose other data, another "text" or null') from None
    keys = "data.neighbours.text and data.neighbours.language"
    warn_if_nothing_found("documents", int((found < 0).all(1).sum()), len(found), reading, keys)
    return found


def _head(store: PassageStore, start: int, count: int) -> str:
    """The first passages of a document, WORDS words in all or a passage more."""
    taken: list[str] = []
    words = 0
    for passage in range(start, start + count):
        taken += store.texts([passage])
        words += len(taken[-1].split())
        if words >= WORDS:
            break
    return "\n".join(taken)


def _embedded(stage: Stage, store: PassageStore, source: ModelSource, device: torch.device | str) -> np.ndarray:
    """The vector of each document's first passage: fp32 [documents, dim], on every rank."""
    dtype = DTYPES[stage.precision]
    retriever = on_every_rank(
        lambda: load_retriever(source.folder, stage.encoder_settings, dtype, device, source.adapter)
    )
    return embed_texts(retriever, store.texts(document_places(store.document)[0]), "passage")


def _by_vectors(vectors: np.ndarray) -> np.ndarray:
    """The nearest other documents by inner product: int64 [documents, NEIGHBOURS], -1 in place of the document."""
    _, found = top_k(vectors, vectors, NEIGHBOURS + 1)
    return np.where(found == np.arange(len(found))[:, None], -1, found)


def _write(folder: Path, neighbours: np.ndarray, size: int) -> None:
    order = bundle(neighbours, size)
    with replacing_folder(folder) as work:
        np.save(work / _FILE, order, allow_pickle=False)
    print(f"data: {-(-len(order) // size):,} bundles of {size} neighbouring documents", flush=True)


def _read(folder: Path, documents: int) -> np.ndarray:
    order = np.load(folder / _FILE, allow_pickle=False)
    if order.dtype != np.int64 or not np.array_equal(np.sort(order), np.arange(documents)):
        raise ValueError(f"{_FILE} does not name each of {documents} documents once")
    return order
