"""Texts -> sparse vectors of BM25 weights, both sides alike: what a surrogate by words gives before its SVD.

Called by the vectors of a surrogate.
"""

from array import array
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from toolkit.retrieval.bm25 import SETTINGS
from toolkit.retrieval.words import CODE, words_of


class WordWeights(NamedTuple):
    """What BM25 knows of a collection; words that no fitted query has weigh nothing."""

    reading: str
    place: dict[str, int]  # word -> its dimension
    idf: np.ndarray  # fp64 [words]
    mean_length: float  # of a document, in words


def word_weights(queries: list[str], documents: Iterable[list[str]], reading: str) -> WordWeights:
    """Weights of the words of some queries, by how many of the documents (in blocks) have them.

    The SVD is fitted on these queries, so it gives other words no direction, and the vocabulary stays theirs.

    Raises:
        ValueError: if no query or no document has a word.
    """
    place: dict[str, int] = {}
    for row in words_of(queries, reading):
        for word in row:
            place.setdefault(word, len(place))
    counts, total, length = Counter[str](), 0, 0
    for block in documents:
        for row in words_of(block, reading):
            counts.update(set(row) & place.keys())
            length += len(row)
        total += len(block)
    if not place or not length:
        raise ValueError(f"no {'document' if place else 'query'} has a word")
    holding = np.array([counts[word] for word in place])
    return WordWeights(reading, place, np.log(1 + (total - holding + 0.5) / (holding + 0.5)), length / total)


def weighted(texts: list[str], weights: WordWeights) -> csr_array:
    """idf tf / (tf + k1 (1 - b + b length / mean length)) of each word, scaled to unit length: fp64 [texts, words]."""
    k1, b = SETTINGS["code" if weights.reading == CODE else "prose"]
    data, columns, ends = array("d"), array("q"), array("q", [0])
    for row in words_of(texts, weights.reading):
        saturation = k1 * (1 - b + b * len(row) / weights.mean_length)
        found = {weights.place[word]: count for word, count in Counter(row).items() if word in weights.place}
        own = np.array([weights.idf[place] * count / (count + saturation) for place, count in found.items()])
        data.extend(own / np.linalg.norm(own) if len(own) else own)
        columns.extend(found)
        ends.append(len(data))
    shape = (len(texts), len(weights.place))
    return csr_array((np.asarray(data), np.asarray(columns, np.int64), np.asarray(ends, np.int64)), shape=shape)
