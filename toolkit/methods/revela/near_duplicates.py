"""Near-duplicate passages of a pool, told by MinHash signatures of their n-grams of tokens.

Called by batches (signatures, on the CPU) and by Revela, which masks such pairs: a copy needs no retrieval.
"""

import math

import numpy as np
import torch
from torch import Tensor

from toolkit.determinism import generator

HASHES = 128  # of a signature: the standard error of an estimate is sqrt(J (1 - J) / 128), at most 0.044
_COMPARED_AT_ONCE = 2**21  # hashes, one byte each while they are compared
_random = generator("near_duplicates")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: 2^64 over the golden ratio
_MULTIPLIERS = _random.integers(0, 2**32, HASHES, dtype=np.uint32)[:, None] | np.uint32(1)
_OFFSETS = _random.integers(0, 2**32, HASHES, dtype=np.uint32)[:, None]


def signatures(rows: list[list[int]], ngram: int | None) -> Tensor:
    """MinHash signatures (Broder 1997, On the resemblance and containment of documents) of token ids.

    Two signatures agree at a place with the probability that is the Jaccard index of the rows' sets of n-grams. A row
    shorter than `ngram` is one gram, so that it equals its copies alone.

    Args:
        rows: token ids, one or more each.
        ngram: tokens in an n-gram; None: no signatures.

    Returns:
        int32 [rows, HASHES]; without `ngram` [rows, 0].
    """
    if ngram is None:
        return torch.zeros((len(rows), 0), dtype=torch.int32)
    found = np.stack([_signature(np.asarray(row, dtype=np.uint64), min(ngram, len(row))) for row in rows])
    return torch.from_numpy(found.view(np.int32))


def _signature(ids: np.ndarray, ngram: int) -> np.ndarray:
    grams = np.zeros(len(ids) - ngram + 1, dtype=np.uint64)
    for place in range(ngram):  # a polynomial in the ids, modulo 2^64
        grams = (grams + ids[place : place + len(grams)] + np.uint64(1)) * _FACTOR
    grams ^= grams >> np.uint64(29)
    grams *= _FACTOR
    mixed = (grams >> np.uint64(32)).astype(np.uint32)
    return (mixed * _MULTIPLIERS + _OFFSETS).min(axis=1)


def near_duplicates(own: Tensor, pool: Tensor, threshold: float) -> Tensor:
    """Which pairs share at least `threshold` of their n-grams, by their signatures' estimate: bool [rows, S].

    Args:
        own: int32 [rows, HASHES].
        pool: int32 [S, HASHES].
        threshold: least estimated Jaccard index, in (0, 1].
    """
    needed = math.ceil(threshold * own.shape[1])
    at_once = max(1, _COMPARED_AT_ONCE // pool.numel())
    parts = [(part[:, None] == pool).sum(-1, dtype=torch.int32) >= needed for part in own.split(at_once)]
    return torch.cat(parts)
