"""BM25 by bm25s, in the form of Lucene: the lexical baseline of evaluation, neighbours of documents, hard negatives.

An index can be kept in a cache folder: its key is the content of the documents and all settings.
"""

import hashlib
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import bm25s
import numpy as np
import Stemmer

from toolkit.files import placing_folder, sha256
from toolkit.search import best

# (k1, b): Anserini's defaults, the literature's usual baseline, for prose; for code, whose documents differ more in
# length, those of bm25s: nDCG@10 0.314 instead of 0.233 on the embedded corpus (dev).
SETTINGS = {"prose": (0.9, 0.4), "code": (1.5, 0.75)}
QUERY_WORDS = 32  # of a document that looks for its neighbours
_WORD = re.compile(r"[^\W_]+")
_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_LAYOUT = 1  # of a cached index and of the words in it; one more makes older ones unread
_DIGESTS = "digests.json"  # name -> SHA-256 of every other file of a cached index


def bm25_top_k(
    documents: list[str],
    queries: list[str],
    k: int,
    *,
    code: bool,
    candidates: list[np.ndarray] | None = None,
    cache: Path | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The documents with the largest BM25 scores, best first; equal scores are ordered by index.

    Args:
        documents, queries: the texts.
        k: results per query; min(k, n) are returned.
        code: words split at underscores and changes of case, neither stems nor stop words removed; otherwise English
            stop words are removed and words stemmed (Snowball).
        candidates: for each query the indices (int64, rising) of the documents it may find; None: all.
        cache: as in `bm25_index`.

    Returns:
        scores fp32 [q, min(k, n)], indices int64 [q, min(k, n)]. Places without a document (score 0: no word in
        common, or no candidate left) have index -1.

    Raises:
        ValueError: if no document has a word.
    """
    index = bm25_index(documents, code=code, cache=cache)
    k = min(k, len(documents))
    scores, indices = np.zeros((len(queries), k), np.float32), np.full((len(queries), k), -1, np.int64)
    for row, found in enumerate(bm25_scores(index, queries, code=code)):
        if candidates is not None:
            allowed = np.zeros_like(found)
            allowed[candidates[row]] = found[candidates[row]]
            found = allowed
        chosen = best_found(found, k)
        scores[row, : len(chosen)], indices[row, : len(chosen)] = found[chosen], chosen
    return scores, indices


def bm25_index(documents: list[str], *, code: bool, cache: Path | None = None) -> bm25s.BM25:
    """The index of some documents: from a cache folder if it is there, else made and, with a cache, kept there.

    Kept as <cache>/bm25_<16 hex digits of the texts in their order, the settings and the libraries' versions>: arrays
    (npy without pickle) and JSON. A folder of which a file is missing or altered is made anew, never used. Several
    processes may share a cache.

    Raises:
        ValueError: if no document has a word. OSError: if the cache cannot be written.
    """
    if cache is None:
        return _index((code_words if code else prose_words)(documents), code)
    folder = cache / f"bm25_{_key(documents, code)}"
    if _is_whole(folder):
        return bm25s.BM25.load(folder, load_corpus=False, allow_pickle=False)
    index = bm25_index(documents, code=code)
    if _is_whole(folder):  # another process was first; its index may be in use
        return index
    shutil.rmtree(folder, ignore_errors=True)
    with placing_folder(folder) as work:
        index.save(work, allow_pickle=False, show_progress=False)
        (work / _DIGESTS).write_text(json.dumps(_digests(work)) + "\n", encoding="utf-8")
    return index


def bm25_scores(index: bm25s.BM25, queries: list[str], *, code: bool) -> Iterator[np.ndarray]:
    """Of each query the scores of all documents, fp32 [n]; 0 without a word in common."""
    for words in (code_words if code else prose_words)(queries):
        yield index.get_scores(words) if words else np.zeros(index.scores["num_docs"], np.float32)


def bm25_neighbours(documents: list[str], k: int, *, code: bool) -> np.ndarray:
    """The other documents that BM25 finds for each document's own rarest words, best first.

    A query is the document's QUERY_WORDS rarest words of those that another document has too, once each: they carry
    nearly all of the score, and the lists of documents that hold them are short.

    Returns:
        int32 [n, k]; -1 where no further document is found. Memory grows with n k, not with n^2.

    Raises:
        ValueError: if no document has a word.
    """
    words = (code_words if code else prose_words)(documents)
    index = _index(words, code)
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


def _key(documents: list[str], code: bool) -> str:
    """16 hex digits of everything that decides an index."""
    digest = hashlib.sha256()
    for text in documents:
        digest.update(hashlib.sha256(text.encode()).digest())
    kind = "code" if code else "prose"
    parts = [_LAYOUT, kind, SETTINGS[kind], version("bm25s"), version("PyStemmer"), digest.hexdigest()]
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


def _index(words: list[list[str]], code: bool) -> bm25s.BM25:
    if not any(words):
        raise ValueError("no document has a word to search for")
    k1, b = SETTINGS["code" if code else "prose"]
    index = bm25s.BM25(method="lucene", k1=k1, b=b)
    index.index(words, show_progress=False)
    return index


def best_found(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the largest positive scores, at most k, best first; equal scores are ordered by index."""
    found = np.flatnonzero(scores > 0)
    return found[best(scores[found], k)]


def prose_words(texts: list[str]) -> list[list[str]]:
    """Lower-cased words of two letters or more, English stop words removed, stemmed."""
    stemmer = Stemmer.Stemmer("english")
    return bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)  # pyright: ignore[reportReturnType, reportArgumentType]


def code_words(texts: list[str]) -> list[list[str]]:
    """Lower-cased words of two letters or more, split at underscores and case: HTTPServer_v2 -> http, server, v2."""
    parts = [[sys.intern(part.lower()) for word in _WORD.findall(text) for part in _CASE.split(word)] for text in texts]
    return [[part for part in row if len(part) > 1] for row in parts]
