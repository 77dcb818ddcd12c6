"""The context of a pool: a function of the seed and the pool's number, whatever the ranks; and its documents."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contextual import cde_stage, context_keys

from toolkit.data.pair_records import PairRecord
from toolkit.data.pairs import PairStore, collate_pairs, document_numbers, write_pairs
from toolkit.methods.cde.keys import KEYS
from toolkit.methods.cde.method import METHOD
from toolkit.methods.cde.rows import CdeBatch, Context, collate_context, drawn_documents
from toolkit.recipe.context import ContextSettings

ROWS, POOL, SEED = 20, 8, 3
SLOTS = {"positives": 1, "negatives": 2}


def letters(texts: list[str]) -> list[list[int]]:
    return [[ord(letter) for letter in text] for text in texts]


def store(folder: Path, longest: int) -> PairStore:
    """Rows of which every third lacks a hard negative, read up to so many letters."""
    folder.mkdir()
    rows = []
    for i in range(ROWS):
        others = [f"other {i} {j}" for j in range(2 - (i % 3 == 0))]
        rows.append(PairRecord(f"query {i}", [f"document {i}{'x' * (i % 7)}"], others, 1.0))
    write_pairs(((0, row) for row in rows), [("", "")], lambda texts: [ids[:longest] for ids in letters(texts)], folder)
    return PairStore(folder)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[PairStore, PairStore]:
    root = tmp_path_factory.mktemp("pairs")
    return store(root / "retriever", 30), store(root / "first", 13)


def batch(stores: tuple[PairStore, PairStore], part: int, parts: int, pool: int = 4, **changes: Any) -> CdeBatch:
    """A rank's part of a pool."""
    whole = np.random.default_rng(pool).permutation(ROWS)[:POOL]
    share = POOL // parts
    places = np.arange(part * share, (part + 1) * share)
    pairs = collate_pairs(stores[0], whole[places], pool, places, seed=SEED, pad_id=0, positives=1, negatives=2)
    keys = ContextSettings(**context_keys("bert", **({"null_probability": 0.4} | changes)))
    return collate_context(pairs, stores[1], whole, pool, places, Context(keys, SLOTS, SEED, 0))


def texts(found: CdeBatch) -> list[str]:
    ids, mask = found.context
    return ["".join(map(chr, row[real > 0].tolist())) for row, real in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("size", [5, 10, 16])
def test_ranks_share_out_one_context(stores: tuple[PairStore, PairStore], parts: int, size: int) -> None:
    whole = batch(stores, 0, 1, size=size)
    shares = [batch(stores, part, parts, size=size) for part in range(parts)]
    assert len(texts(whole)) == size
    assert len({len(share.context.input_ids) for share in shares}) == 1  # as ZeRO-3 needs
    assert [text for share in shares for text in texts(share)][:size] == texts(whole)
    assert all(torch.equal(share.null, whole.null) for share in shares)
    assert all(torch.equal(share.repeated, whole.repeated) for share in shares)


def test_the_context_is_of_the_pools_documents_without_replacement(stores: tuple[PairStore, PairStore]) -> None:
    """Positives and hard negatives, as the first stage reads them; never a slot that is empty."""
    found = batch(stores, 0, 1, size=16)
    whole = np.random.default_rng(4).permutation(ROWS)[:POOL]
    numbers = document_numbers(stores[1], whole, 4, np.arange(POOL), seed=SEED, **SLOTS)
    there = ["".join(map(chr, stores[1].document[number])) for number in numbers[numbers >= 0].tolist()]
    assert (numbers < 0).any() and len(there) >= 16
    assert len(set(texts(found))) == 16 and set(texts(found)) <= set(there)
    assert all(len(text) <= 13 for text in texts(found)) and any(len(text) == 13 for text in texts(found))
    assert {text.split()[0] for text in texts(found)} == {"document", "other"}
    assert float(found.repeated) == 0


def test_it_is_drawn_anew_for_each_pool_and_seed(stores: tuple[PairStore, PairStore]) -> None:
    assert texts(batch(stores, 0, 1)) == texts(batch(stores, 0, 1))
    assert texts(batch(stores, 0, 1)) != texts(batch(stores, 0, 1, pool=5))
    numbers = np.arange(24).reshape(8, 3)
    assert drawn_documents(numbers, 10, 3, 4).tolist() != drawn_documents(numbers, 10, 4, 4).tolist()
    nulls = [batch(stores, 0, 1, pool=pool).null for pool in range(40)]
    assert 0.3 < float(torch.stack(nulls).float().mean()) < 0.5
    assert not batch(stores, 0, 1, null_probability=0.0).null.any()


def test_empty_slots_leave_too_few_documents() -> None:
    """Then they are drawn over again, and counted."""
    numbers = np.array([[4, -1], [7, -1], [9, 2]])
    found = drawn_documents(numbers, 6, SEED, 0).tolist()
    assert sorted(found[:4]) == [2, 4, 7, 9] and found[4:] == found[:2]


def test_several_vectors_of_a_document_share_out_one_length(stores: tuple[PairStore, PairStore]) -> None:
    shares = [batch(stores, part, 4, size=10, vectors_per_document=2) for part in range(4)]
    assert {share.context.input_ids.shape for share in shares} == {(2, 13)}  # five documents for four ranks
    assert {len(share.null) for share in shares} == {10}


def problems(context: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    stage = cde_stage("bert", context_keys("bert", **(context or {})), **changes)
    return [f"{path.removeprefix('stages.0.')}: {what}" for path, what in KEYS.check("stages.0", stage, True)]


LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["query"]}


@pytest.mark.parametrize(
    ("context", "changes", "line"),
    [
        (
            {"size": 17},
            {},
            "objective.context.size: a context takes 17 documents, and a pool holds at most 8 x 2 = 16; lower it, or "
            "raise batch.pool",
        ),
        (
            {"vectors_per_document": 3},
            {},
            "objective.context.vectors_per_document: 3 does not divide size 10; change one",
        ),
        (
            {},
            {"objective__share_prefix": False},
            "objective.share_prefix: has no effect on form tokens; remove it",
        ),
        (
            {},
            {"objective__first_stage": {"adapter": LORA}},
            "objective.first_stage.adapter: is a second one, and the retriever has no first; write lora, or remove it",
        ),
        (
            {},
            {"objective__first_stage": {"adapter": LORA, "start": {"folder": "x"}}, "lora": LORA},
            "objective.first_stage.adapter: stands beside start; remove one of the two",
        ),
        (
            {},
            {"objective__first_stage": {"adapter": LORA}, "lora": LORA, "export__merged": True},
            "export.merged: two adapters cannot both be merged into one backbone; set it to false",
        ),
        (
            {},
            {"objective__first_stage": {"start": "previous"}},
            "objective.first_stage.start: there is no stage before the first; name a folder or a hub id, or remove the "
            "key",
        ),
    ],
)
def test_bad_keys_are_one_line_each(context: dict[str, Any], changes: dict[str, Any], line: str) -> None:
    assert problems(context, **changes) == [line]
    assert problems() == [] and problems({"size": 32, "vectors_per_document": 2}) == []


def test_a_row_says_what_it_is_read_with() -> None:
    row = METHOD.row(cde_stage("bert", context_keys("bert", vectors_per_document=2)))
    assert row.what == (
        "queries with 1 positive and at most 1 hard negatives each, read with 10 vectors of 5 of the pool's documents"
    )
