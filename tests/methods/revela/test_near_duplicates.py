"""MinHash signatures against the exact Jaccard index, and which pairs they mask."""

import runpy
from typing import Any

import numpy as np
import pytest
import torch

from toolkit.methods.revela import near_duplicates as module
from toolkit.methods.revela.near_duplicates import HASHES, near_duplicates, signatures


def jaccard(one: list[int], other: list[int], ngram: int) -> float:
    """Of the sets of n-grams, exactly."""
    a, b = ({tuple(row[i : i + ngram]) for i in range(len(row) - ngram + 1)} for row in (one, other))
    return len(a & b) / len(a | b)


def pairs_of_texts(vocabulary: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Pairs that share from nothing to everything, some in another order."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(400):
        text = random.integers(0, vocabulary, random.integers(20, 160))
        other, changed = text.copy(), random.integers(0, len(text) + 1)
        other[:changed] = random.integers(0, vocabulary, changed)
        made.append((text.tolist(), np.roll(other, number % 3 * 7).tolist()))
    return made


def estimates(pairs: list[tuple[list[int], list[int]]], ngram: int, hashes: int = HASHES) -> np.ndarray:
    one, other = (signatures([pair[side] for pair in pairs], ngram)[:, :hashes] for side in range(2))
    return (one == other).float().mean(1).numpy()


@pytest.mark.parametrize("ngram", [2, 5])
@pytest.mark.parametrize("vocabulary", [30, 50_000])
def test_agreement_estimates_the_jaccard_index(ngram: int, vocabulary: int):
    """Without bias, with the standard error of HASHES independent hashes: measured 0.94 to 1.06 times that."""
    pairs = pairs_of_texts(vocabulary, ngram)
    exact = np.array([jaccard(*pair, ngram) for pair in pairs])
    standard = np.sqrt(exact * (1 - exact) / HASHES)
    bound = 1.15 * np.sqrt(np.square(standard).mean())
    errors = estimates(pairs, ngram) - exact
    assert np.sqrt(np.square(errors).mean()) < bound
    assert abs(errors.mean()) < 4 * np.sqrt(np.square(standard).mean() / len(pairs))
    assert (np.abs(errors) <= 5 * standard + 2 / HASHES).all() and not errors[exact == 1].any()
    for controls in (estimates(pairs, ngram + 2), estimates(pairs, ngram, HASHES // 4)):  # other n-grams; fewer hashes
        assert np.sqrt(np.square(controls - exact).mean()) > bound


def test_signatures_do_not_change_from_one_process_to_another():
    """They travel between ranks: nothing in them may be drawn when the module is imported."""
    copy: Any = runpy.run_path(module.__file__)
    rows = [[5, 6, 7, 8], [7]]
    assert copy["signatures"](rows, 2).equal(signatures(rows, 2))
    assert not signatures([[5, 6, 8, 7], [7]], 2)[0].equal(signatures(rows, 2)[0])


def test_copies_are_near_duplicates_and_others_are_not():
    random = np.random.default_rng(1)
    texts = [random.integers(0, 1000, 60).tolist() for _ in range(6)]
    edited = [*texts[0][:30], 1001, *texts[0][31:]]  # 5 of 56 n-grams change: Jaccard 51 / 61
    rows = signatures([*texts, texts[2], edited, texts[3][:3], texts[3][:3], texts[3][:4]], 5)
    found = near_duplicates(rows, rows, 0.7)
    expected = torch.eye(11, dtype=torch.bool)
    for one, other in ((2, 6), (0, 7), (8, 9)):  # texts under an n-gram equal their copies alone
        expected[one, other] = expected[other, one] = True
    assert found.equal(expected)
    whole = near_duplicates(rows, rows, 1.0)
    assert whole[2, 6] and not whole[0, 7]
    assert signatures([[1], [2, 3]], None).shape == (2, 0)


def test_rows_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch):
    """A row against itself, however few are compared at once; the share that is needed is rounded up."""
    pool = torch.randint(2, (37, HASHES), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    own = pool[11:30]
    expected = torch.tensor([[sum(map(int.__eq__, a, b)) >= 65 for b in pool.tolist()] for a in own.tolist()])
    assert 0.2 < float(expected.float().mean()) < 0.8
    for at_once in (1, 3 * pool.numel(), 2**21):
        monkeypatch.setattr(module, "_COMPARED_AT_ONCE", at_once)
        assert near_duplicates(own, pool, 64.5 / HASHES).equal(expected)
    assert not near_duplicates(own, pool, 63.5 / HASHES).equal(expected)
