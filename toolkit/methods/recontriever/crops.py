"""Random crops of text as a query and its keys: token ids on disk, the order of training, batches.

Called by prepare_crops (the store) and by training (plan and collate).
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from toolkit.data.token_store import TokenRows, write_tokens
from toolkit.data.tokens import Tokens
from toolkit.determinism import generator
from toolkit.methods.recontriever.keys import Crops
from toolkit.recipe.errors import RecipeError

SHORTEST_DOCUMENT = 4  # tokens; less text than that has no two different crops worth comparing
_EXAMPLES, _EXAMPLE_CHARACTERS = 8, 2000

# --------------------------------------------------------------------------- one crop


class Draws(NamedTuple):
    """The random numbers of some crops of one chunk."""

    ratio: np.ndarray  # float64 [crops], share of the chunk
    start: np.ndarray  # int64 [crops], first token
    uniform: np.ndarray  # float64 [crops, length of the chunk], one per token of the crop; the rest is not used


def draw(random: np.random.Generator, length: int, crops: Crops, count: int) -> Draws:
    """Draws of `count` crops of a chunk of `length` tokens: ratio and start are uniform, the last start included."""
    ratio = random.uniform(crops.min_ratio, crops.max_ratio, count)
    start = random.integers(0, length - _tokens_in_crop(length, ratio), endpoint=True)
    return Draws(ratio, start, random.random((count, length)))


def crop(tokens: np.ndarray, ratio: float, start: int, uniform: np.ndarray, delete: float) -> np.ndarray:
    """A run of floor(length * ratio) tokens, at least one, without those whose uniform number is not above `delete`.

    Args:
        tokens: the chunk, [length].
        uniform: at least as many numbers of [0, 1) as the crop has tokens.

    Returns:
        [n], empty if all tokens were left out (Contriever, 2112.09118).
    """
    size = int(_tokens_in_crop(len(tokens), ratio))
    return tokens[start : start + size][uniform[:size] > delete]


def _tokens_in_crop(length: int, ratio: Any) -> Any:
    return np.maximum(1, np.floor(length * ratio)).astype(np.int64)


# --------------------------------------------------------------------------- documents on disk


def write_documents(documents: Iterable[tuple[str, list[int]]], folder: Path) -> None:
    """Write (text, token ids without special ones) of each document into an existing folder; holds one at a time.

    meta.json comes last: a store without it is no store. Its digest is of the texts and of the ids.
    """
    digest = hashlib.blake2b(digest_size=8)
    examples: list[str] = []
    tokens = 0

    def rows() -> Iterator[list[int]]:
        nonlocal tokens
        for text, ids in documents:
            data = text.encode()
            digest.update(b"%d %d " % (len(data), len(ids)) + data + np.asarray(ids, dtype="<i4").tobytes())
            if len(examples) < _EXAMPLES:
                examples.append(text[:_EXAMPLE_CHARACTERS])
            tokens += len(ids)
            yield ids

    count = write_tokens(folder, "documents", rows())
    meta = {"documents": count, "tokens": tokens, "digest": digest.hexdigest(), "examples": examples}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


class CropStore:
    """Token ids of the documents of a folder, memory-mapped; one row per document, in the order of the sources."""

    def __init__(self, meta: dict[str, Any], documents: TokenRows) -> None:
        self.meta = meta
        self.documents = documents
        self.digest: str = meta["digest"]
        self.examples: list[str] = meta["examples"]  # the first texts, cut

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Raises FileNotFoundError if the folder holds no finished store."""
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        return cls(meta, TokenRows.open(folder, "documents"))


# --------------------------------------------------------------------------- the order of training


class CropPlan:
    """Which chunks make global pool number t, and their tokens: pure functions of (seed, t), whatever the ranks.

    By default a document is cut into the fewest windows of at most `chunk_tokens`, all of nearly one length; those
    under 4 tokens are left out. Across documents, all text is one stream, cut into chunks of exactly `chunk_tokens`
    from an offset that every epoch draws anew (Contriever). An epoch is a permutation of the chunks cut into pools, the
    tail dropped.
    """

    def __init__(self, store: CropStore, crops: Crops, pool: int, seed: int) -> None:
        """Args: chunks per pool; seed of the order. Raises RecipeError for a pool above the data."""
        self._documents, self._length, self._pool, self._seed = store.documents, crops.chunk_tokens, pool, seed
        self._stream = crops.across_documents
        self.left_out = 0  # documents too short
        if self._stream:
            # An epoch has one more chunk where the offset allows it, and then drops more of its tail.
            self.chunks = max(0, (len(store.documents.ids) - self._length + 1) // self._length)
        else:
            lengths = np.diff(store.documents.offsets)
            short = lengths < SHORTEST_DOCUMENT
            windows = np.where(short, 0, -(-lengths // self._length))
            self._first = np.concatenate([[0], np.cumsum(windows)])  # [documents + 1], number of its first chunk
            self.left_out, self.chunks = int(short.sum()), int(self._first[-1])
        if pool > self.chunks:
            without = f" ({self.left_out} documents under {SHORTEST_DOCUMENT} tokens left out)" if self.left_out else ""
            raise RecipeError(
                f"batch.pool: {pool} is more than the data's {self.chunks} chunks of up to {self._length} tokens"
                f"{without}; lower it or add data"
            )
        self.pools_per_epoch = self.chunks // pool
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)

    def pool(self, t: int) -> np.ndarray:
        """Chunk numbers of global pool number t: int64 [pool], none twice."""
        epoch, place = divmod(t, self.pools_per_epoch)
        return self._epoch(epoch)[1][place]

    def chunk(self, t: int, number: int) -> np.ndarray:
        """Token ids of a chunk of global pool number t: int32 [at most chunk_tokens]."""
        if self._stream:
            first = self._epoch(t // self.pools_per_epoch)[0] + self._length * number
            return np.array(self._documents.ids[first : first + self._length])
        document = int(np.searchsorted(self._first, number, side="right")) - 1
        tokens = self._documents[document]
        windows = int(self._first[document + 1] - self._first[document])
        window = number - int(self._first[document])
        return np.array(tokens[len(tokens) * window // windows : len(tokens) * (window + 1) // windows])

    def _draw_epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        """The stream's offset and the pools, int64 [pools_per_epoch, pool]."""
        random = generator("chunks", self._seed, epoch)
        offset = int(random.integers(self._length)) if self._stream else 0
        chunks = (len(self._documents.ids) - offset) // self._length if self._stream else self.chunks
        order = random.permutation(chunks)[: self.pools_per_epoch * self._pool]
        return offset, order.reshape(-1, self._pool)


# --------------------------------------------------------------------------- batches


class CropBatch(NamedTuple):
    query: Tokens  # [rows, length]
    key: Tokens  # [views * rows, length], view-major: view v of row b is v * rows + b
    document: Tensor  # int64 [rows], chunk number of each row


def collate_crops(
    plan: CropPlan,
    rows: np.ndarray,
    pool: int,
    places: np.ndarray,
    *,
    views: int,
    crops: Crops,
    frame: tuple[list[int], list[int]],
    seed: int,
    pad_id: int,
    max_tokens: int,
) -> CropBatch:
    """One query and `views` keys of each chunk, all cut in the same way; a row is a function of (seed, pool, place).

    Args:
        rows: chunk numbers, [rows].
        pool: global pool number t that the rows are of.
        places: where in that pool each row stands, [rows].
        frame: special ids before and after every text.
        max_tokens: longest crop with its special ids; longer ones lose their last tokens.

    Raises:
        ValueError: if max_tokens leaves no room beside the special ids.
    """
    before, after = frame
    room = max_tokens - len(before) - len(after)
    if room < 1:
        raise ValueError(f"max_tokens {max_tokens} leaves no room beside {len(before) + len(after)} special ids")
    pieces: list[np.ndarray] = []
    for number, place in zip(rows.tolist(), places.tolist(), strict=True):
        chunk = plan.chunk(pool, number)
        draws = draw(generator("crops", seed, pool, place), len(chunk), crops, 1 + views)
        for ratio, start, uniform in zip(*draws, strict=True):
            piece = crop(chunk, ratio, start, uniform, crops.delete)[:room]
            bare = not (len(piece) or before or after)  # a text of no token at all has no vector
            pieces.append(chunk[start : start + 1] if bare else piece)
    ids, mask = (
        torch.from_numpy(np.ascontiguousarray(a.reshape(len(rows), 1 + views, -1).swapaxes(0, 1)))
        for a in pad_framed(pieces, frame, pad_id)
    )
    query, key = Tokens(ids[0], mask[0]), Tokens(ids[1:].flatten(0, 1), mask[1:].flatten(0, 1))
    return CropBatch(query, key, torch.as_tensor(rows))


def pad_framed(
    pieces: list[np.ndarray], frame: tuple[list[int], list[int]], pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of the pieces within their special ids, right-padded to one width: both int64 [pieces, length]."""
    before, after = frame
    end = len(before) + np.array([len(piece) for piece in pieces])
    column = np.arange(end.max() + len(after))
    ids = np.full((len(pieces), len(column)), pad_id, dtype=np.int64)
    ids[:, : len(before)] = before
    ids[(column >= len(before)) & (column < end[:, None])] = np.concatenate(pieces)
    for i, special in enumerate(after):
        ids[np.arange(len(pieces)), end + i] = special
    return ids, (column < end[:, None] + len(after)).astype(np.int64)
