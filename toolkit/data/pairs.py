"""Pairs: token ids of queries, positives and hard negatives on disk, order and batch.

Called by prepare_pairs (write) and by training (plan and collate).
"""

import functools
import hashlib
import json
import math
import struct
from array import array
from collections.abc import Iterable
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from toolkit.data.known_positives import write_known
from toolkit.data.pair_records import PairRecord
from toolkit.data.text_store import DOCUMENT, QUERY, Encode, Texts, padded
from toolkit.data.token_store import TokenRows, TokenWriter
from toolkit.data.tokens import Tokens
from toolkit.determinism import generator
from toolkit.recipe.errors import RecipeError

# --------------------------------------------------------------------------- pairs on disk

_EXAMPLES = 8

Prefixes = tuple[str, str]  # of queries, of passages
Mix = Literal["rows", "pools"]


def write_pairs(
    records: Iterable[tuple[int, PairRecord]], prefixes: list[Prefixes], encode: Encode, folder: Path
) -> dict[str, Any]:
    """Write rows into an existing folder, every distinct text tokenised once; returns what is in meta.json.

    A text that a row names twice counts once, and as a positive if it is both. meta.json comes last: a store without
    it is no store. Texts are held for one batch of the tokenizer; keys stay in memory.

    Args:
        records: (source number, row); the numbers do not fall.
        prefixes: of each source.
        encode: token ids of texts that have their prefix.
    """
    digest = hashlib.blake2b(digest_size=8)
    sizes, examples = [0] * len(prefixes), []
    query_of_row, weights = array("q"), array("f")
    with ExitStack() as files:
        names = ("query", "document", "positives", "negatives")
        query, document, positives, negatives = (files.enter_context(TokenWriter(folder, name)) for name in names)
        queries, documents = Texts(query, QUERY, encode), Texts(document, DOCUMENT, encode)
        for source, record in records:
            query_prefix, passage_prefix = prefixes[source]
            own = dict.fromkeys(documents.number(passage_prefix, text) for text in record.positives)
            others = dict.fromkeys(documents.number(passage_prefix, text) for text in record.negatives)
            hard = [number for number in others if number not in own]
            query_of_row.append(queries.number(query_prefix, record.query))
            positives.append(list(own))
            negatives.append(hard)
            weights.append(record.weight)
            sizes[source] += 1
            keys = [queries.keys[query_of_row[-1]], *(documents.keys[number] for number in (*own, *hard))]
            digest.update(struct.pack(f"<{len(keys) + 3}qf", source, len(own), len(hard), *keys, record.weight))
            for text in (*record.positives, *record.negatives):
                if len(examples) < _EXAMPLES and text not in examples:
                    examples.append(text)
        queries.flush()
        documents.flush()
    arrays = {"query_key": queries.keys, "document_key": documents.keys, "query_of_row": query_of_row}
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", np.asarray(values, dtype=np.int64), allow_pickle=False)
    write_known(folder, queries.keys, documents.keys, query_of_row)
    np.save(folder / "weight.npy", np.asarray(weights, dtype=np.float32), allow_pickle=False)
    meta = {
        "sizes": sizes,
        "queries": len(query),
        "documents": len(document),
        "hard_negatives": negatives.ids,
        "tokens": query.ids + document.ids,
        "examples": examples,
        "digest": digest.hexdigest(),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return meta


class PairStore:
    """Rows of a folder, memory-mapped: a query, its positives and its hard negatives, all as numbers of texts."""

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError if the folder holds no finished store, ValueError if a file of it is damaged."""
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.sizes: list[int] = self.meta["sizes"]  # rows of each source
        self.digest: str = self.meta["digest"]  # of the texts' keys and the weights, whatever the tokenizer
        self.examples: list[str] = self.meta["examples"]  # the first document texts, without prefix
        self.query, self.document = TokenRows.open(folder, "query"), TokenRows.open(folder, "document")
        self.positives, self.negatives = TokenRows.open(folder, "positives"), TokenRows.open(folder, "negatives")
        self.known = TokenRows.open(folder, "known")  # of each query text: its positives in any row of any source
        names = ("query_key", "document_key", "query_of_row", "weight")
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names]
        self.query_key, self.document_key = arrays[:2]  # int64 [queries], [documents]
        self.query_of_row, self.weight = arrays[2:]  # int64 [rows], float32 [rows]

    def __len__(self) -> int:
        return len(self.weight)


# --------------------------------------------------------------------------- the order of training

_EXACT_BLOCK = 1_000  # pools of a block at most for shares that are met to the row
_SMALLEST_QUOTA = 100  # of a block that only comes near them: less than one in so many is rounding
_LONGEST_BLOCK = 1_000_000


class PairPlan:
    """Which rows make global pool number t: a pure function of (seed, t), whatever the number of ranks.

    Row ids run over the sources one after another. Shares of several sources are kept by quotas: pools come in blocks,
    and every block holds the same number of rows ("rows") or pools ("pools") of each source, the largest remainders
    rounded up; the seed deals them to the block's pools. Quotas are the exact shares where a block of at most 1,000
    pools allows it; otherwise they are off by less than 1% of the smallest one.

    One source, and each source of "pools": an epoch shuffles its rows and cuts them into pools, the tail dropped.

    Each source of "rows": epochs follow one another without a gap; every pool has the quota of the block over its
    pools, rounded up or down, in mixed order. What a pool takes from the end of one epoch is kept out of what it takes
    from the start of the next. A source of fewer rows than three pools take is shuffled anew for each pool instead.
    """

    def __init__(self, sizes: list[int], weights: list[float] | None, pool: int, mix: Mix | None, seed: int) -> None:
        """Args: rows of each source; their shares up to a factor (None: the sizes); rows per pool; how they mix.

        Raises:
            RecipeError: for a source of fewer rows than it gives to a pool, or of too small a share.
            ValueError: for several sources without mix.
        """
        if mix is None and len(sizes) > 1:
            raise ValueError(f"{len(sizes)} sources need a mix")
        exact = [Fraction(str(weight)) for weight in (sizes if weights is None else weights)]
        shares = [share / sum(exact) for share in exact]
        self.block, self.quotas = _quotas(shares, pool if mix == "rows" else 1)  # pools; rows or pools of each source
        self._rows_each = 1 if mix == "rows" else pool
        most = [math.ceil(Fraction(quota, self.block)) * self._rows_each for quota in self.quotas]
        for number, (size, needed) in enumerate(zip(sizes, most, strict=True)):
            if size < needed:
                raise RecipeError(
                    f"data.sources.{number}: {size} rows are fewer than the {needed} it gives to a pool of {pool}; "
                    "lower batch.pool or add data" + (", or lower its weight" if mix == "rows" else "")
                )
        # Until the source that takes longest has been seen once; for one source its rows / pool.
        self.pools_per_epoch: float = max(
            size * self.block / (quota * self._rows_each) for size, quota in zip(sizes, self.quotas, strict=True)
        )
        self._sizes, self._pool, self._mix, self._seed = sizes, pool, mix, seed
        self._first = np.cumsum([0, *sizes])[:-1]
        # Rows that a pool may take from the epoch it does not begin in.
        self._margin = [needed - 1 if mix == "rows" else 0 for needed in most]
        self._dealt = functools.lru_cache(maxsize=2)(self._deal)
        self._epoch = functools.lru_cache(maxsize=2 * len(sizes))(self._order)

    def pool(self, t: int) -> np.ndarray:
        """Row ids of global pool number t: int64 [pool], no id twice."""
        number, place = divmod(t, self.block)
        dealt = self._dealt(number)[place : place + 2] + number * np.asarray(self.quotas)
        before, after = dealt.tolist()  # what each source has given when the pool begins and ends
        if self._mix == "rows":
            parts = [self._first[s] + self._rows(s, t, before[s], after[s]) for s in range(len(self._sizes))]
            return generator("mix", self._seed, t).permutation(np.concatenate(parts))
        source = next(s for s in range(len(self._sizes)) if after[s] > before[s])
        epoch, place = divmod(before[source], self._sizes[source] // self._pool)
        return self._first[source] + self._epoch(source, epoch)[place * self._pool : (place + 1) * self._pool]

    def _deal(self, number: int) -> np.ndarray:
        """What each source has given before each pool of a block, and at its end: int64 [block + 1, sources].

        Each pool gets the whole part of quota / block. The remainders, source after source in a line, go to the pools
        in turn: as none of them is as long as a turn, no pool gets two of a source, and all pools get equally many.
        """
        quotas = np.asarray(self.quotas)
        counts = np.tile(quotas // self.block, (self.block, 1))
        line = np.repeat(np.arange(len(quotas)), quotas % self.block)
        turns = generator("sources", self._seed, number).permutation(self.block)
        counts[turns[np.arange(len(line)) % self.block], line] += 1
        return np.concatenate([np.zeros((1, len(quotas)), dtype=np.int64), counts.cumsum(0)])

    def _rows(self, source: int, t: int, before: int, after: int) -> np.ndarray:
        """Rows number before .. after - 1 of a source's endless sequence, which all go to pool t."""
        size, count = self._sizes[source], after - before
        if size < 3 * self._margin[source]:
            return generator("small source", self._seed, source, t).permutation(size)[:count]
        epoch, place = divmod(before, size)
        rows = self._epoch(source, epoch)[place : place + count]
        if len(rows) == count:
            return rows
        return np.concatenate([rows, self._epoch(source, epoch + 1)[: count - len(rows)]])

    def _order(self, source: int, epoch: int) -> np.ndarray:
        """An epoch's order of a source, whose first `margin` rows are none of the last `margin` of the epoch before.

        Only the first 2 * margin places change and the last margin ones do not, so no earlier epoch has a say.
        """
        margin, order = self._margin[source], self._shuffled(source, epoch)
        if epoch and margin:
            late = np.isin(order[: 2 * margin], self._shuffled(source, epoch - 1)[-margin:])
            order[: 2 * margin] = order[np.argsort(late, kind="stable")]
        return order

    def _shuffled(self, source: int, epoch: int) -> np.ndarray:
        return generator("pairs", self._seed, source, epoch).permutation(self._sizes[source])


def _quotas(shares: list[Fraction], units: int) -> tuple[int, list[int]]:
    """(pools of a block, units of each source in it) where a pool holds so many units."""
    wanted = [share * units for share in shares]
    block = math.lcm(*(want.denominator for want in wanted))
    if block > _EXACT_BLOCK:
        block = math.ceil(_SMALLEST_QUOTA / min(wanted))
    if block > _LONGEST_BLOCK:
        least = wanted.index(min(wanted))
        share = f"a share of {float(shares[least]):.1g}"
        raise RecipeError(f"data.sources.{least}: {share} is too small to be kept; raise its weight or remove it")
    quotas = [math.floor(want * block) for want in wanted]
    remainders = sorted(range(len(quotas)), key=lambda s: quotas[s] - wanted[s] * block)  # the largest first
    for source in remainders[: block * units - sum(quotas)]:
        quotas[source] += 1
    return block, quotas


# --------------------------------------------------------------------------- batches


class PairBatch(NamedTuple):
    """Rows of one pool. A row with fewer texts than slots has absent ones: key -1, one token that nobody compares."""

    query: Tokens  # [rows, length]
    document: Tokens  # [rows * (positives + negatives), length]: a row's positives, then its negatives, then the next
    query_key: Tensor  # int64 [rows]
    positive_key: Tensor  # int64 [rows, positives]; -1 where absent
    negative_key: Tensor  # int64 [rows, negatives]; -1 where absent
    known_key: Tensor  # int64 [rows, K]: positives of the query in any row that a pool may hold as others; then -1
    weight: Tensor  # float32 [rows]
    surrogate_query: Tensor | None = None  # [rows, s], another model's vectors, where the objective asks for them
    surrogate_document: Tensor | None = None  # [rows * (positives + negatives), s]; any where absent


def collate_pairs(
    store: PairStore,
    rows: np.ndarray,
    pool: int,
    places: np.ndarray,
    *,
    positives: int,
    negatives: int,
    seed: int,
    pad_id: int,
    surrogate: tuple[np.ndarray, np.ndarray] | None = None,
) -> PairBatch:
    """Rows of a pool, all or a rank's part. Of more texts than slots a subset is drawn by (seed, pool, place).

    Args:
        rows: row ids.
        pool: global number of the pool.
        places: place of each row in the pool, so that the draw does not depend on the number of ranks.
        positives: slots for positives of each row; at least 1.
        negatives: slots for hard negatives.
        surrogate: memory-mapped vectors of the store's query texts and of its document texts, of which the batch gets
            its own: [queries, s] and [documents, s].
    """
    query = store.query_of_row[rows]
    number = document_numbers(store, rows, pool, places, positives=positives, negatives=negatives, seed=seed)
    key = np.where(number < 0, -1, store.document_key[number])
    known = [store.document_key[store.known[number]] for number in query.tolist()]
    known_key = np.full((len(rows), max(map(len, known))), -1, dtype=np.int64)
    known_key[np.arange(known_key.shape[1]) < [[len(of_row)] for of_row in known]] = np.concatenate(known)
    vectors = (query, np.maximum(number.reshape(-1), 0))
    own = [] if surrogate is None else [torch.from_numpy(side[n]) for side, n in zip(surrogate, vectors, strict=True)]
    end = store.query.ids[store.query.offsets[query + 1] - 1]  # a token that the model knows
    return PairBatch(
        query=padded(store.query, query, pad_id),
        document=padded(store.document, number.reshape(-1), pad_id, end.repeat(positives + negatives)),
        query_key=torch.from_numpy(store.query_key[query]),
        positive_key=torch.from_numpy(key[:, :positives].copy()),
        negative_key=torch.from_numpy(key[:, positives:].copy()),
        known_key=torch.from_numpy(known_key),
        weight=torch.from_numpy(store.weight[rows]),
        surrogate_query=own[0] if own else None,
        surrogate_document=own[1] if own else None,
    )


def document_numbers(
    store: PairStore, rows: np.ndarray, pool: int, places: np.ndarray, *, positives: int, negatives: int, seed: int
) -> np.ndarray:
    """The documents of rows of a pool, int64 [rows, positives + negatives], -1 where absent; args as collate_pairs."""
    number = np.full((len(rows), positives + negatives), -1, dtype=np.int64)
    for i, (row, place) in enumerate(zip(rows.tolist(), places.tolist(), strict=True)):
        positive = _drawn(store.positives[row], positives, "positive", seed, pool, place)
        negative = _drawn(store.negatives[row], negatives, "negative", seed, pool, place)
        number[i, : len(positive)] = positive
        number[i, positives : positives + len(negative)] = negative
    return number


def _drawn(numbers: np.ndarray, slots: int, *key: int | str) -> np.ndarray:
    """All numbers in their order if there are slots for them, else as many of them as there are slots, at random."""
    if len(numbers) <= slots:
        return numbers
    return numbers[generator("draw", *key).permutation(len(numbers))[:slots]]
