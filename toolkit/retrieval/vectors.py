"""Vectors of many texts, in shards: in memory, or on disk where an interrupted encoding is taken up again.

Called by embed, which fills the shards, and by search, which reads them.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from toolkit.collectives import gather, group_device, is_distributed
from toolkit.files import replace_text, sha256

DTYPES = {"fp32": np.float32, "fp16": np.float16}
ROWS_PER_GATHER = 65536  # vectors travel between ranks in blocks: all at once they would not fit on a GPU
_CHECKPOINT = re.compile("[0-9a-f]{16}")


class Shard(NamedTuple):
    """A part of the vectors, one for each different text."""

    numbers: np.ndarray  # int64 [rows]: the first of the texts that are this row's
    vectors: np.ndarray  # fp32 or fp16 [rows, dim], perhaps a memory map


class Store(NamedTuple):
    """Where encodings are kept: folder/<checkpoint>/<kind, texts and dtype>/<shard>.npy beside its record."""

    folder: Path
    checkpoint: str  # toolkit.retrieval.embed.checkpoint_digest
    dtype: Literal["fp32", "fp16"] = "fp32"


class Vectors:
    """The vectors of a list of texts, the same on every rank; identical texts share one row.

    Attributes:
        shards: all of them.
        first: int64 [texts], the first text identical to each.
        row: int64 [texts], the place of each text's vector in the shards, counted through all of them.
    """

    def __init__(self, shards: list[Shard], first: np.ndarray) -> None:
        self.shards, self.first = shards, first
        numbers = np.concatenate([shard.numbers for shard in shards])
        place = np.empty(len(first), np.int64)
        place[numbers] = np.arange(len(numbers))
        self.row = place[first]

    def array(self) -> np.ndarray:
        """All vectors in memory, in the order of the texts: fp32 [texts, dim]."""
        return np.concatenate([shard.vectors for shard in self.shards], dtype=np.float32)[self.row]


def take_rows(shards: list[Shard], rows: np.ndarray, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Vectors of rows [n], counted through the shards: (places in `rows`, at most `most` vectors as stored)."""
    order = np.argsort(rows, kind="stable")
    ends = np.cumsum([len(shard.numbers) for shard in shards])
    cuts = np.searchsorted(rows[order], ends)
    first = start = 0
    for shard, cut, end in zip(shards, cuts, ends, strict=True):
        for some in (order[i : min(i + most, cut)] for i in range(first, cut, most)):
            yield some, shard.vectors[rows[some] - start]
        first, start = cut, end


def blocks(shards: list[Shard], rows: int, dtype: type[np.floating]) -> Iterator[tuple[int, np.ndarray]]:
    """The vectors copied to blocks of at most `rows` rows, small shards joined: (rows before it, [rows, dim])."""
    waiting: list[np.ndarray] = []
    count = before = 0
    for shard in shards:
        for start in range(0, len(shard.vectors), rows):
            piece = shard.vectors[start : start + rows]
            if count + len(piece) > rows:
                yield before, np.concatenate(waiting, dtype=dtype)
                waiting, before, count = [], before + count, 0
            waiting.append(piece)
            count += len(piece)
    if waiting:
        yield before, np.concatenate(waiting, dtype=dtype)


def gather_rows(own: np.ndarray) -> np.ndarray:
    """Rows of all ranks in rank order; the ranks may hold different numbers of rows, but equal widths and dtypes."""
    if not is_distributed():
        return own
    device = group_device()
    counts = gather(torch.tensor([len(own)], device=device)).tolist()
    parts: list[list[np.ndarray]] = [[] for _ in counts]
    for first in range(0, max(counts), ROWS_PER_GATHER):
        rows = min(ROWS_PER_GATHER, max(counts) - first)
        block = torch.zeros((rows, *own.shape[1:]), dtype=torch.from_numpy(own).dtype, device=device)
        mine = torch.from_numpy(own[first : first + rows])
        block[: len(mine)] = mine
        for part, count, got in zip(parts, counts, gather(block).cpu().numpy().reshape(-1, *block.shape), strict=True):
            part.append(got[: max(0, count - first)])
    return np.concatenate([own[:0], *(block for part in parts for block in part)])


# --------------------------------------------------------------------------- on disk


def save_shard(path: Path, vectors: np.ndarray) -> None:
    """Write vectors to a .npy file aside and rename it; the record beside it, written last, makes it a finished one."""
    work = path.with_name(f".{path.name}.writing")
    with work.open("wb") as file:
        np.save(file, vectors, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    record = {"bytes": work.stat().st_size, "sha256": sha256(work)}
    _record_of(path).unlink(missing_ok=True)  # it would be that of an older file
    os.replace(work, path)
    replace_text(_record_of(path), json.dumps(record) + "\n")


def open_shard(path: Path) -> np.ndarray:
    """A shard as a memory map; raises OSError or ValueError if there is none."""
    return np.load(path, mmap_mode="r", allow_pickle=False)


def is_finished(path: Path, say: Callable[[str], None]) -> bool:
    """Whether a shard is there as it was written; `say` gets a line on one that was altered since."""
    try:
        record = json.loads(_record_of(path).read_text(encoding="utf-8"))
        size = path.stat().st_size
        if size != record["bytes"]:
            problem = f"{size:,} bytes instead of {record['bytes']:,}"
        elif sha256(path) != record["sha256"]:
            problem = "its content differs from its digest"
        else:
            return True
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    say(f"vectors: {path}: damaged ({problem}); encoded again")
    return False


def _record_of(path: Path) -> Path:
    return path.with_suffix(".json")


def adopt(left: Path, store: Store | None) -> None:
    """Clear away the vectors that an interrupted evaluation left in a folder, and say so.

    Those of the store's checkpoint move into the store, or stay if they are in it; those of others are deleted. Nothing
    is touched that `encode` did not write.
    """
    inside = store is not None and left.resolve() == store.folder.resolve()
    kept = {store.checkpoint} if store is not None and inside else set()
    found = [folder for folder in _checkpoints(left) if folder.name not in kept]
    if not found:
        return
    moved = 0 if store is None or inside else _move(left, store)
    _delete(found, left)
    did = f"{moved:,} shards moved to {store.folder}" if moved and store is not None else "deleted"
    print(f"vectors: {left}: left by an interrupted evaluation; {did}", flush=True)


def _move(left: Path, store: Store) -> int:
    """Move shards of a store's checkpoint into it; returns how many."""
    moved = 0
    for path in sorted((left / store.checkpoint).rglob("*")):
        place = store.folder / path.relative_to(left)
        if path.is_file() and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, place)
            moved += path.suffix == ".npy"
    return moved


def _checkpoints(folder: Path) -> list[Path]:
    """The folders of single checkpoints that `encode` wrote in a folder."""
    below = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in below if _CHECKPOINT.fullmatch(path.name) and any(path.glob("*/encoding.json"))]


def _delete(checkpoints: list[Path], folder: Path) -> None:
    """Delete folders of checkpoints, and the folder that holds them if nothing else is in it."""
    for path in checkpoints:
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # it holds something else, or is not there
        folder.rmdir()


def leave(store: Store, keep: bool) -> None:
    """Delete a store's vectors once they were used, or say in one line what it holds of other checkpoints."""
    if not keep:
        _delete([store.folder / store.checkpoint], store.folder)
        return
    if not store.folder.is_dir():  # nothing was encoded into it: mteb's own tasks keep no vectors
        return
    others = [folder for folder in store.folder.iterdir() if folder.is_dir() and folder.name != store.checkpoint]
    size = sum(path.stat().st_size for folder in others for path in folder.rglob("*") if path.is_file())
    if others:
        print(
            f"vectors: {store.folder}: {size / 2**20:,.0f} MiB are of {len(others)} other checkpoints; delete what is "
            f"not needed, all but {store.checkpoint}",
            flush=True,
        )
