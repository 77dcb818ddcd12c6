"""Randomness as a pure function of named keys: numpy generators, the seed of an optimizer step, the batch digest.

Called by the data order and by the training loop; what it gives needs no saved random-number state to resume.
"""

import hashlib

import numpy as np
import torch


def _entropy(key: tuple[int | str, ...]) -> int:
    """128 bits of the key's text; 1 and "1" differ, and so do ("ab",) and ("a", "b")."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=16).digest(), "little")


def generator(*key: int | str) -> np.random.Generator:
    """A numpy generator that is a function of the key alone: the same in every process and on every machine."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(_entropy(key))))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch (CPU and every CUDA device) for one optimizer step on one rank.

    Called at the start of every step, it makes dropout a function of (seed, step, rank), so a resumed run draws the
    masks of an uninterrupted one.
    """
    torch.manual_seed(_entropy(("step", seed, step, rank)) % 2**63)


def batch_digest(rows: np.ndarray) -> str:
    """16 hex digits of the row ids of a global batch, in order."""
    return hashlib.blake2b(np.ascontiguousarray(rows, dtype="<i8").tobytes(), digest_size=8).hexdigest()
