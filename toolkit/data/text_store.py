"""Distinct texts as token ids on disk: numbered by their content when written, padded to batches when read.

Called by the stores of pairs and of graded rows.
"""

import hashlib
from array import array
from collections.abc import Callable

import numpy as np
import torch

from toolkit.data.token_store import TokenRows, TokenWriter
from toolkit.data.tokens import Tokens

_TEXTS_AT_ONCE, _CHARACTERS_AT_ONCE = 1024, 1 << 23
QUERY, DOCUMENT = b"query", b"document"  # the sides

Encode = Callable[[list[str]], list[list[int]]]


def text_key(text: str, side: bytes) -> int:
    """63 bits of a text's content: equal texts of one side have equal keys, those of two sides have not."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=side).digest(), "little") >> 1


class Texts:
    """The distinct texts of one side, numbered as they come, tokenised in batches; holds about 125 bytes of each."""

    def __init__(self, writer: TokenWriter, side: bytes, encode: Encode) -> None:
        self.keys = array("q")  # of each text, without its prefix
        self._writer, self._side, self._encode = writer, side, encode
        self._numbers: dict[str, dict[int, int]] = {}  # of each prefix: key -> number
        self._waiting: list[str] = []
        self._characters = 0

    def number(self, prefix: str, text: str) -> int:
        key = text_key(text, self._side)
        known = self._numbers.setdefault(prefix, {})
        if key not in known:
            known[key] = len(self.keys)
            self.keys.append(key)
            self._waiting.append(prefix + text)
            self._characters += len(text)
            if len(self._waiting) == _TEXTS_AT_ONCE or self._characters > _CHARACTERS_AT_ONCE:
                self.flush()
        return known[key]

    def flush(self) -> None:
        if self._waiting:
            for row in self._encode(self._waiting):
                self._writer.append(row)
        self._waiting, self._characters = [], 0


def padded(texts: TokenRows, numbers: np.ndarray, pad_id: int, absent: np.ndarray | None = None) -> Tokens:
    """Texts of these numbers, right-padded; number -1 is the one token that `absent` [len(numbers)] has there."""
    there = numbers >= 0
    first = texts.offsets[numbers]
    length = np.where(there, texts.offsets[numbers + 1] - first, 1)
    mask = np.arange(length.max()) < length[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    first = np.where(there, first, 0)
    ids[mask] = texts.ids[np.arange(length.sum()) + np.repeat(first - (length.cumsum() - length), length)]
    if absent is not None:
        ids[~there, 0] = absent[~there]
    return Tokens(torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64)))
