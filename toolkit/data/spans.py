"""Passages that documents become: cut, stored on disk, and put in order as pools.

Called by prepare (cut and store) and by the methods that read passages (order).
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa

from toolkit.determinism import generator
from toolkit.recipe.errors import RecipeError

# --------------------------------------------------------------------------- cutting documents

# A sentence ends at its mark, with closing quotes or brackets, before white space and a capital, digit or opening mark;
# after a full-width mark; and at an empty line. Curly quotes are 2018 2019 201c 201d, full-width marks 3002 ff01 ff1f.
_SENTENCE_END = re.compile(
    r"(?<=[.!?\u2026])[\"'\u201d\u2019)\]]*\s+(?=[\"'\u201c\u2018(\[]*[^\W_a-z])|(?<=[\u3002\uff01\uff1f])|\n\s*\n"
)
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[\"'])(?:[A-Z]|Mrs?|Ms|[DS]r|Jr|Prof|St|No|[Ff]igs?|[Ee]q|vs|cf|al|e\.g|i\.e)\.$",
)


def cut(text: str, unit: Literal["sentences", "lines"], max_words: int) -> list[str]:
    """Passages of whole sentences or whole lines, as many in each as fit in `max_words` white-space words.

    A single unit that is longer is cut at words. Passages are pieces of the text as it stands, in order; those without
    a letter or digit are left out. Sentences end at marks before a capital and at empty lines, by a rule without data.
    """
    passages: list[str] = []
    held: list[str] = []
    words = 0
    for piece in _pieces(text, unit, max_words):
        count = len(piece.split())
        if words + count > max_words:
            passages.append("".join(held))
            held, words = [], 0
        held.append(piece)
        words += count
    passages.append("".join(held))
    trim = str.strip if unit == "sentences" else _trim_lines
    return [trim(passage) for passage in passages if re.search(r"[^\W_]", passage)]


def _trim_lines(passage: str) -> str:
    """Without empty lines around it; the first line keeps its indent."""
    kept = passage.rstrip()
    before = len(kept) - len(kept.lstrip())  # its last line end is where the empty lines end
    return kept[kept.rfind("\n", 0, before) + 1 :]


def _pieces(text: str, unit: str, max_words: int) -> Iterator[str]:
    """Units with the white space that follows them; those of more than max_words words cut at words."""
    for piece in _sentences(text) if unit == "sentences" else text.splitlines(keepends=True):
        ends = [match.end() for match in re.finditer(r"\S+\s*", piece)][max_words - 1 :: max_words]
        first = 0
        for end in ends:
            yield piece[first:end]
            first = end
        if first < len(piece):
            yield piece[first:]


def _sentences(text: str) -> Iterator[str]:
    first = 0
    for match in _SENTENCE_END.finditer(text):
        if _ABBREVIATION.search(text, max(first, match.start() - 8), match.start()) is None:
            yield text[first : match.end()]
            first = match.end()
    yield text[first:]


# --------------------------------------------------------------------------- passages on disk

_ROWS_PER_BATCH = 8192
_SCHEMA = pa.schema([("text", pa.large_string()), ("document", pa.int64())])


def write_store(rows: Iterable[tuple[str, int]], folder: Path, form: str) -> None:
    """Write passages (text, document number; passages of a document in a row) into an existing folder.

    `form` is the format of the sources; for "groups" a document is a group and all have one size. Holds 8,192 texts at
    a time. meta.json comes last: a store without it is no store.
    """
    digest = hashlib.blake2b(digest_size=8)
    passages, documents, last = 0, 0, -1
    texts: list[str] = []
    numbers: list[int] = []
    with pa.OSFile(str(folder / "passages.arrow"), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        for text, document in rows:
            data = text.encode()
            digest.update(b"%d %d " % (document, len(data)) + data)
            passages, documents, last = passages + 1, documents + (document != last), document
            texts.append(text)
            numbers.append(document)
            if len(texts) == _ROWS_PER_BATCH:
                writer.write_batch(pa.record_batch([texts, numbers], schema=_SCHEMA))
                texts, numbers = [], []
        if texts:
            writer.write_batch(pa.record_batch([texts, numbers], schema=_SCHEMA))
    meta = {
        "format": form,
        "passages": passages,
        "documents": documents,
        "group_size": passages // documents if form == "groups" and documents else None,
        "digest": digest.hexdigest(),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


class PassageStore:
    """Passages of a folder, memory-mapped: texts are read when asked for, only document numbers are held."""

    def __init__(self, meta: dict[str, Any], texts: list[pa.LargeStringArray], document: np.ndarray) -> None:
        self.meta = meta
        self.document = document  # int64 [passages], not falling
        self.digest: str = meta["digest"]
        self.group_size: int | None = meta["group_size"]
        self._texts = texts

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Raises FileNotFoundError if the folder holds no finished store."""
        meta = json.loads((folder / "meta.json").read_text())
        table = pa.ipc.open_file(pa.memory_map(str(folder / "passages.arrow"))).read_all()
        numbers = [chunk.to_numpy() for chunk in table.column("document").chunks]
        document = np.concatenate(numbers) if numbers else np.zeros(0, dtype=np.int64)
        return cls(meta, table.column("text").chunks, document)

    def __len__(self) -> int:
        return len(self.document)

    def texts(self, ids: Iterable[int]) -> list[str]:
        """Texts of passages, in the order of the ids."""
        places = (divmod(int(i), _ROWS_PER_BATCH) for i in ids)
        return [self._texts[batch][row].as_py() for batch, row in places]


# --------------------------------------------------------------------------- the order of training


def document_places(store_document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First passage and number of passages of each document: int64 [documents] each."""
    first = np.flatnonzero(np.diff(store_document, prepend=-1))
    return first, np.diff(first, append=len(store_document))


def end_to_end(first: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Runs of integers, first[i], first[i] + 1, ... of length[i] each, one after another."""
    return np.arange(length.sum()) + np.repeat(first - (np.cumsum(length) - length), length)


def check_sizes(pool: int, passages: int, interleave: int | None, documents: int) -> None:
    """Raises RecipeError if the data holds less than one pool, or fewer documents than are dealt in turn."""
    if pool > passages:
        raise RecipeError(f"batch.pool: {pool} passages are more than the data's {passages}; lower it or add data")
    if interleave is not None and interleave > documents:
        raise RecipeError(
            f"data.interleave: {interleave} documents are more than the data's {documents}; lower it or add data"
        )


class PoolPlan:
    """Which passages make global pool number t: a pure function of (seed, t), whatever the number of ranks.

    Documents (2506.16552, 4.1): each epoch shuffles them, lays them end to end and cuts that line into `interleave`
    lanes of equal length; passages are dealt from the lanes in turn (d11, d21, ..., dn1, d12, ...), so that every pool
    mixes that many documents to the very end, however unequal they are. At most one document per lane boundary is
    divided between two lanes. The dealt sequence is cut into pools, the tail dropped, the pools shuffled.

    Groups: a pool joins whole groups, or a shuffled group is cut into several pools; then the pools are shuffled.
    """

    def __init__(
        self, store_document: np.ndarray, group_size: int | None, pool: int, interleave: int | None, seed: int
    ) -> None:
        """Args: document number of each passage; group size or None; passages per pool; documents dealt in turn.

        Raises:
            RecipeError: for a pool above the data or unfit for the groups, and for fewer documents than interleave.
        """
        total = len(store_document)
        self._first, self._length = document_places(store_document)
        check_sizes(pool, total, interleave, len(self._first))
        self._pool, self._seed, self._group_size = pool, seed, group_size
        if group_size is None:
            assert interleave is not None  # the recipe demands it of every source but groups
            self._lanes = interleave
            self.pools_per_epoch = total // interleave * interleave // pool
            if not self.pools_per_epoch:
                fits = total // interleave * interleave
                raise RecipeError(
                    f"batch.pool: {pool} is above the {fits} passages that {interleave} equal lanes hold; lower it"
                )
        else:
            if pool % group_size and group_size % pool:
                parts = [str(n) for n in range(2, group_size) if group_size % n == 0]
                fits = ", ".join([*parts, f"{group_size} or a multiple of {group_size}"])
                raise RecipeError(f"batch.pool: {pool} does not fit groups of {group_size} passages; use {fits}")
            groups = total // group_size
            self.pools_per_epoch = (
                groups // (pool // group_size) if pool >= group_size else groups * (group_size // pool)
            )
        self._epoch = functools.lru_cache(maxsize=2)(self._documents if group_size is None else self._groups)

    def pool(self, t: int) -> np.ndarray:
        """Passage ids of global pool number t: int64 [pool], no id twice."""
        epoch, place = divmod(t, self.pools_per_epoch)
        return self._epoch(epoch)[place]

    def _documents(self, epoch: int) -> np.ndarray:
        random = generator("documents", self._seed, epoch)
        order = random.permutation(len(self._first))
        line = end_to_end(self._first[order], self._length[order])  # passage ids, document after document
        rounds = len(line) // self._lanes
        dealt = line[: rounds * self._lanes].reshape(self._lanes, rounds).T.reshape(-1)
        pools = dealt[: self.pools_per_epoch * self._pool].reshape(-1, self._pool)
        return pools[random.permutation(len(pools))]

    def _groups(self, epoch: int) -> np.ndarray:
        size = self._group_size
        assert size is not None
        random = generator("groups", self._seed, epoch)
        order = random.permutation(len(self._first))
        groups = self._first[order][:, None] + np.arange(size)  # [groups, size]
        if self._pool < size:
            groups = random.permuted(groups, axis=1)
        pools = groups.reshape(-1)[: self.pools_per_epoch * self._pool].reshape(-1, self._pool)
        return pools[random.permutation(len(pools))]
