"""Randomness as a pure function of its key."""

import subprocess
import sys

import numpy as np
import torch

from toolkit.determinism import batch_digest, generator, seed_step

DRAW = "from toolkit.determinism import generator; print(generator('a', 1).integers(2**62, size=3).tolist())"


def test_generator_is_the_same_in_every_process():
    runs = [
        subprocess.run(
            [sys.executable, "-c", DRAW], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout == f"{generator('a', 1).integers(2**62, size=3).tolist()}\n"


def test_generator_tells_keys_apart():
    keys = [("a", 1), ("a", "1"), ("a", 2), ("b", 1), ("a1",), ("a", 1, 0)]
    draws = {int(generator(*key).integers(2**62)) for key in keys}
    assert len(draws) == len(keys)


def test_seed_step_depends_on_step_and_rank_alone():
    def mask(*key: int) -> list[float]:
        seed_step(*key)
        return torch.rand(4).tolist()

    first = mask(3, 10, 0)
    torch.rand(100)  # whatever was drawn before does not matter
    assert mask(3, 10, 0) == first
    assert len({tuple(mask(*key)) for key in ((3, 10, 0), (3, 11, 0), (3, 10, 1), (4, 10, 0))}) == 4


def test_batch_digest_depends_on_ids_and_order_not_on_shape_or_type():
    ids = np.arange(6)
    digest = batch_digest(ids)
    assert len(digest) == 16 and int(digest, 16) >= 0
    assert batch_digest(ids.reshape(2, 3)) == batch_digest(ids.astype(np.int32)) == digest
    assert batch_digest(ids[::-1]) != digest
