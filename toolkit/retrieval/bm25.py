"""BM25 by bm25s, in the form of Lucene: the lexical baseline of evaluation, neighbours of documents, hard negatives.

An index can be kept in a cache folder: its key is the content of the documents and all settings.
"""

import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import bm25s
import numpy as np

from toolkit.files import placing_folder, sha256
from toolkit.retrieval.search import best
from toolkit.retrieval.words import CODE, words_of

# (k1, b): Anserini's defaults, the literature's usual baseline, for prose; for code, whose documents differ more in
# length, those of bm25s: nDCG@10 0.314 instead of 0.233 on the embedded corpus (dev).
SETTINGS = {"prose": (0.9, 0.4), "code": (1.5, 0.75)}
QUERY_WORDS = 32  # of a document that looks for its neighbours
_LAYOUT = 2  # of a cached index and of the words in it; one more makes older ones unread
_DIGESTS = "digests.json"  # name -> SHA-256 of every other file of a cached index


def bm25_top_k(
    documents: list[str],
    queries: list[str],
    k: int,
    *,
    reading: str,
    candidates: list[np.ndarray] | None = None,
    cache: Path | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The documents with the largest BM25 scores, best first; equal scores are ordered by index.

    Args:
        documents, queries: the texts.
        k: results per query; min(k, n) are returned.
        reading: how texts are cut into words, as in toolkit.retrieval.words.words_of.
        candidates: for each query the indices (int64, rising) of the documents it may find; None: all.
        cache: as in `bm25_index`.

    Returns:
        scores fp32 [q, min(k, n)], indices int64 [q, min(k, n)]. Places without a document (score 0: no word in
        common, or no candidate left) have index -1.

    Raises:
        ValueError: if no document has a word.
    """
    index = bm25_index(documents, reading=reading, cache=cache)
    k = min(k, len(documents))
    scores, indices = np.zeros((len(queries), k), np.float32), np.full((len(queries), k), -1, np.int64)
    for row, found in enumerate(bm25_scores(index, queries, reading=reading)):
        if candidates is not None:
            allowed = np.zeros_like(found)
            allowed[candidates[row]] = found[candidates[row]]
            found = allowed
        chosen = best_found(found, k)
        scores[row, : len(chosen)], indices[row, : len(chosen)] = found[chosen], chosen
    return scores, indices


def bm25_index(documents: list[str], *, reading: str, cache: Path | None = None) -> bm25s.BM25:
    """The index of some documents: from a cache folder if it is there, else made and, with a cache, kept there.

    Kept as <cache>/bm25_<16 hex digits of the texts in their order, the reading, the settings and the libraries'
    versions>: arrays (npy without pickle) and JSON. A folder of which a file is missing or altered is made anew, never
    used. Several processes may share a cache.

    Raises:
        ValueError: if no document has a word. OSError: if the cache cannot be written.
    """
    if cache is None:
        return _index(words_of(documents, reading), reading)
    folder = cache / f"bm25_{_key(documents, reading)}"
    if _is_whole(folder):
        return bm25s.BM25.load(folder, load_corpus=False, allow_pickle=False)
    index = bm25_index(documents, reading=reading)
    if _is_whole(folder):  # another process was first; its index may be in use
        return index
    shutil.rmtree(folder, ignore_errors=True)
    with placing_folder(folder) as work:
        index.save(work, allow_pickle=False, show_progress=False)
        (work / _DIGESTS).write_text(json.dumps(_digests(work)) + "\n", encoding="utf-8")
    return index


def bm25_scores(index: bm25s.BM25, queries: list[str], *, reading: str) -> Iterator[np.ndarray]:
    """Of each query the scores of all documents, fp32 [n]; 0 without a word in common."""
    for words in words_of(queries, reading):
        yield index.get_scores(words) if words else np.zeros(index.scores["num_docs"], np.float32)


def bm25_neighbours(documents: list[str], k: int, *, reading: str) -> np.ndarray:
    """The other documents that BM25 finds for each document's own rarest words, best first.

    A query is the document's QUERY_WORDS rarest words of those that another document has too, once each: they carry
    nearly all of the score, and the lists of documents that hold them are short.

    Returns:
        int32 [n, k]; -1 where no further document is found. Memory grows with n k, not with n^2.

    Raises:
        ValueError: if no document has a word.
    """
    words = words_of(documents, reading)
    index = _index(words, reading)
    frequency = Counter(word for row in words for word in set(row))
    neighbours = np.full((len(documents), k), -1, np.int32)
    for row, own in enumerate(words):
        shared = [word for word in dict.fromkeys(own) if frequency[word] > 1]
        if shared:
            found = index.get_scores(sorted(shared, key=frequency.__getitem__)[:QUERY_WORDS])
            found[row] = 0
            chosen = best_found(found, k)
            neighbours[row, : len(chosen)] = chosen
    return neighbours


def say_language(of: str, reading: str, key: str) -> None:
    """One line for a language that was detected; `key` sets another."""
    if reading != CODE:
        print(f"BM25 reads {of} as {reading}, by its script and function words; {key} sets another", flush=True)


def warn_if_nothing_found(of: str, without: int, total: int, reading: str, keys: str) -> None:
    """One line if more than half of all queries (or documents) share no word with a document; `keys` may change it."""
    if 2 * without > total:
        print(
            f"warning: BM25 finds nothing for {without:,} of {total:,} {of}: read as {reading} they share no word with "
            f"a document; look at {keys}",
            file=sys.stderr,
            flush=True,
        )


def _key(documents: list[str], reading: str) -> str:
    """16 hex digits of everything that decides an index."""
    digest = hashlib.sha256()
    for text in documents:
        digest.update(hashlib.sha256(text.encode()).digest())
    versions = [version(package) for package in ("bm25s", "PyStemmer", "regex")]
    parts = [_LAYOUT, reading, _settings(reading), versions, digest.hexdigest()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _is_whole(folder: Path) -> bool:
    """Whether every file of a cached index is as it was written."""
    try:
        return json.loads((folder / _DIGESTS).read_text(encoding="utf-8")) == _digests(folder)
    except (OSError, ValueError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(path for path in folder.iterdir() if path.name != _DIGESTS):
        found[path.name] = sha256(path)
    return found


def _settings(reading: str) -> tuple[float, float]:
    return SETTINGS["code" if reading == CODE else "prose"]


def _index(words: list[list[str]], reading: str) -> bm25s.BM25:
    if not any(words):
        raise ValueError("no document has a word to search for")
    k1, b = _settings(reading)
    index = bm25s.BM25(method="lucene", k1=k1, b=b)
    index.index(words, show_progress=False)
    return index


def best_found(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the largest positive scores, at most k, best first; equal scores are ordered by index."""
    found = np.flatnonzero(scores > 0)
    return found[best(scores[found], k)]
