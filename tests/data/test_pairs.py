"""Pairs on disk, and batches that do not depend on the number of ranks."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from toolkit.data.pair_records import PairRecord
from toolkit.data.pairs import PairBatch, PairPlan, PairStore, collate_pairs, write_pairs
from toolkit.data.text_store import text_key

# --------------------------------------------------------------------------- store

PREFIXES = [("q: ", "p: "), ("", "other: ")]
RECORDS = [
    (0, PairRecord("who", ["alpha", "beta"], ["gamma"], 1.0)),
    (0, PairRecord("what", ["beta"], [], 0.5)),
    (1, PairRecord("who", ["alpha", "alpha"], ["delta", "alpha", "delta"], 2.0)),
]


def encode(texts: list[str]) -> list[list[int]]:
    """A token for each byte, and an end token."""
    return [[*text.encode(), 2] for text in texts]


def make_store(folder: Path, records=RECORDS, prefixes=PREFIXES, encode=encode) -> PairStore:
    folder.mkdir()
    write_pairs(iter(records), prefixes, encode, folder)
    return PairStore(folder)


def query_key(text: str) -> int:
    return text_key(text, b"query")


def document_key(text: str) -> int:
    return text_key(text, b"document")


def decoded(ids) -> str:
    *text, end = map(int, ids)
    assert end == 2
    return bytes(text).decode()


def test_rows_come_back_with_every_distinct_text_once(tmp_path: Path):
    encoded: list[str] = []

    def record(texts: list[str]) -> list[list[int]]:
        encoded.extend(texts)
        return encode(texts)

    store = make_store(tmp_path / "a", encode=record)
    documents = ["p: alpha", "p: beta", "p: gamma", "other: alpha", "other: delta"]
    assert sorted(encoded) == sorted([*documents, "q: who", "q: what", "who"])
    assert [decoded(store.document[i]) for i in range(len(store.document))] == documents
    rows = []
    for row in range(len(store)):
        texts = [[decoded(store.document[n]) for n in side[row]] for side in (store.positives, store.negatives)]
        rows.append((decoded(store.query[store.query_of_row[row]]), *texts, float(store.weight[row])))
    assert rows == [
        ("q: who", ["p: alpha", "p: beta"], ["p: gamma"], 1.0),
        ("q: what", ["p: beta"], [], 0.5),
        ("who", ["other: alpha"], ["other: delta"], 2.0),  # a text named twice counts once, a positive first
    ]
    assert store.sizes == [2, 1]
    assert store.meta["tokens"] == sum(len(text) + 1 for text in encoded)
    assert store.examples == ["alpha", "beta", "gamma", "delta"]


def test_keys_are_of_the_text_without_its_prefix_and_of_its_side(tmp_path: Path):
    store = make_store(tmp_path / "a")
    assert store.document_key[0] == store.document_key[3] == document_key("alpha")
    assert store.query_key[0] == store.query_key[2] == query_key("who")
    texts = [f"{i}" for i in range(1000)]
    keys = [query_key(text) for text in texts] + [document_key(text) for text in texts]
    assert len(set(keys)) == 2000 and min(keys) >= 0 and max(keys) < 2**63


def test_many_texts_are_tokenised_in_batches_and_keep_their_numbers(tmp_path: Path):
    sizes = []

    def record(texts: list[str]) -> list[list[int]]:
        sizes.append(len(texts))
        return encode(texts)

    records = [(0, PairRecord(f"q{i}", [f"d{i % 1500}"], [f"d{(7 * i) % 3000}"], 1.0)) for i in range(3000)]
    store = make_store(tmp_path / "a", records, [("", "")], record)
    assert max(sizes) == 1024 and sum(sizes) == 6000
    for row, (_, record_) in enumerate(records):
        assert decoded(store.query[store.query_of_row[row]]) == record_.query
        assert [decoded(store.document[n]) for n in store.positives[row]] == record_.positives


def test_the_digest_tells_of_every_change_of_the_data_and_of_no_other(tmp_path: Path):
    def changed(row: int, **fields) -> list:
        source, record = RECORDS[row]
        return [*RECORDS[:row], (source, record._replace(**fields)), *RECORDS[row + 1 :]]

    data = [
        RECORDS,
        RECORDS[:-1],
        [RECORDS[1], RECORDS[0], RECORDS[2]],
        changed(1, query="who"),
        changed(1, positives=["beta "]),
        changed(1, negatives=["gamma"]),
        changed(1, weight=0.6),
        changed(0, positives=["alpha"], negatives=["beta", "gamma"]),
        [RECORDS[0], (1, RECORDS[1][1]), RECORDS[2]],
    ]
    digests = [make_store(tmp_path / str(i), records).digest for i, records in enumerate(data)]
    assert len(set(digests)) == len(data)
    shouted = make_store(tmp_path / "shouted", encode=lambda texts: encode([text.upper() for text in texts]))
    assert shouted.digest == digests[0]


# --------------------------------------------------------------------------- batches


def many(rows: int = 64) -> list[tuple[int, PairRecord]]:
    """Rows of 1 to 5 positives and 0 to 6 negatives, some shared."""
    return [
        (
            0,
            PairRecord(
                f"query {i % 50}",
                [f"positive {i} {k}" for k in range(1 + i % 5)],
                [f"negative {i // 2} {k}" for k in range(i % 7)],
                1.0 + i,
            ),
        )
        for i in range(rows)
    ]


def batch_of(store: PairStore, rows, pool=0, places=None, positives=2, negatives=3, seed=0) -> PairBatch:
    places = np.arange(len(rows)) if places is None else places
    return collate_pairs(
        store, np.asarray(rows), pool, places, positives=positives, negatives=negatives, seed=seed, pad_id=0
    )


def texts_of(side) -> list[str]:
    """Texts of padded rows; one token is an absent slot."""
    assert side.input_ids.dtype == side.attention_mask.dtype == torch.int64
    rows = []
    for ids, mask in zip(side.input_ids.tolist(), side.attention_mask.tolist(), strict=True):
        length = sum(mask)
        assert mask == [1] * length + [0] * (len(mask) - length) and not any(ids[length:])
        rows.append(decoded(ids[:length]))
    assert side.input_ids.shape[1] == int(side.attention_mask.sum(1).max())
    return rows


def test_a_batch_fetches_a_surrogates_vectors_of_its_texts(tmp_path: Path):
    """From memory maps, whose rows are the texts by their numbers; also of texts that were drawn."""
    store, shape = make_store(tmp_path / "a", many(), [("", "")]), {"positives": 2, "negatives": 3}
    draw = np.random.default_rng(0)
    for side, count in (("query", len(store.query)), ("document", len(store.document))):
        np.save(tmp_path / f"{side}.npy", draw.normal(size=(count, 4)).astype(np.float16))
    vectors = [np.load(tmp_path / f"{side}.npy", mmap_mode="r") for side in ("query", "document")]
    rows, places = np.array([5, 33, 62, 0]), np.arange(4)
    batch = collate_pairs(store, rows, 3, places, **shape, seed=1, pad_id=0, surrogate=(vectors[0], vectors[1]))
    assert batch.surrogate_query is not None and batch.surrogate_document is not None
    number = {int(key): n for n, key in enumerate(store.document_key)}
    keys = torch.cat([batch.positive_key, batch.negative_key], 1).flatten().tolist()
    for key, vector in zip(keys, batch.surrogate_document, strict=True):
        assert key < 0 or np.array_equal(vector.numpy(), vectors[1][number[key]])
    assert any(key >= 0 for key in keys) and len(keys) == 4 * 5
    assert np.array_equal(batch.surrogate_query.numpy(), vectors[0][store.query_of_row[rows]])
    assert batch.surrogate_query.dtype == torch.float16
    plain = batch_of(store, rows)
    assert plain.surrogate_query is None and plain.surrogate_document is None


def test_a_batch_holds_what_the_rows_hold(tmp_path: Path):
    """Against the records themselves, with slots for all texts."""
    records = many()
    store = make_store(tmp_path / "a", records, [("", "")])
    rows = [5, 33, 62, 0, 11]
    batch = batch_of(store, rows, positives=5, negatives=6)
    chosen = [records[row][1] for row in rows]
    assert texts_of(batch.query) == [record.query for record in chosen]
    assert batch.query_key.tolist() == [query_key(record.query) for record in chosen]
    assert batch.weight.dtype == torch.float32 and batch.weight.tolist() == [record.weight for record in chosen]
    texts, keys = [], []
    for record in chosen:
        for of_row, slots in ((record.positives, 5), (record.negatives, 6)):
            texts += of_row + [""] * (slots - len(of_row))
            keys += [document_key(text) for text in of_row] + [-1] * (slots - len(of_row))
    assert texts_of(batch.document) == texts
    assert torch.cat([batch.positive_key, batch.negative_key], 1).flatten().tolist() == keys
    assert batch.positive_key.shape == (5, 5) and batch.negative_key.shape == (5, 6)
    known = [known_of(records)[record.query] for record in chosen]
    most = max(map(len, known))
    for keys, expected in zip(batch.known_key.tolist(), known, strict=True):
        assert set(keys[: len(expected)]) == expected and keys[len(expected) :] == [-1] * (most - len(expected))


def test_what_is_drawn_is_a_subset_and_what_is_not_drawn_is_known(tmp_path: Path):
    records = many()
    store = make_store(tmp_path / "a", records, [("", "")])
    batch = batch_of(store, np.arange(64), pool=3)
    texts = np.array(texts_of(batch.document)).reshape(64, 5)
    undrawn = 0
    for i, (_, record) in enumerate(records):
        for drawn, keys, of_row, slots in (
            (texts[i, :2], batch.positive_key[i], record.positives, 2),
            (texts[i, 2:], batch.negative_key[i], record.negatives, 3),
        ):
            present = [text for text in drawn.tolist() if text]
            assert len(set(present)) == len(present) == min(slots, len(of_row)) and set(present) <= set(of_row)
            assert keys.tolist() == [document_key(text) if text else -1 for text in drawn.tolist()]
        known = {key for key in batch.known_key[i].tolist() if key >= 0}
        assert known == known_of(records)[record.query]
        undrawn += len(record.positives) > 2
    assert undrawn > 30  # so known_key held more than positive_key
    assert batch_of(store, [0, 1], negatives=0).negative_key.shape == (2, 0)


def known_of(records: list[tuple[int, PairRecord]]) -> dict[str, set[int]]:
    """Keys of every query's positives that another query has or a row as hard negative, by looking through all rows."""
    positives = {
        query: {text for _, record in records if record.query == query for text in record.positives}
        for query in {record.query for _, record in records}
    }
    hard = {text for _, record in records for text in record.negatives if text not in record.positives}
    return {
        query: {
            document_key(text)
            for text in own
            if text in hard or any(text in others for other, others in positives.items() if other != query)
        }
        for query, own in positives.items()
    }


def test_known_are_the_positives_of_the_query_in_any_row_of_any_source(tmp_path: Path):
    random = np.random.default_rng(0)

    def some(most: int) -> list[str]:
        return [f"d{i}" for i in random.integers(40, size=random.integers(1, most))]

    records = [(i // 100, PairRecord(f"q{random.integers(30)}", some(4), some(5), 1.0)) for i in range(200)]
    store = make_store(tmp_path / "a", records)  # the sources' prefixes differ: most texts have two numbers
    assert len(store.query) > len({record.query for _, record in records})
    known = known_of(records)
    of_row_alone = 0
    for row, (_, record) in enumerate(records):
        keys = batch_of(store, [row]).known_key[0].tolist()
        assert len(keys) == len(set(keys)) and set(keys) == known[record.query]
        of_row_alone += {document_key(text) for text in record.positives} == known[record.query]
    assert of_row_alone < 20  # the control: what a row names is hardly ever all


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_together_hold_the_batch_of_one(tmp_path: Path, ranks: int):
    store = make_store(tmp_path / "a", many(), [("", "")])
    plan = PairPlan(store.sizes, None, 16, None, seed=9)
    for t in (0, 3, 7):
        rows, places = plan.pool(t), np.arange(16)
        whole = batch_of(store, rows, t)
        parts = [batch_of(store, r, t, p) for r, p in zip(np.split(rows, ranks), np.split(places, ranks), strict=True)]
        for side in ("query", "document"):
            assert [text for part in parts for text in texts_of(getattr(part, side))] == texts_of(getattr(whole, side))
        for name in ("query_key", "positive_key", "negative_key", "weight"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        known = [[key for key in row if key >= 0] for part in parts for row in part.known_key.tolist()]
        assert known == [[key for key in row if key >= 0] for row in whole.known_key.tolist()]
        if ranks > 1:  # negative control: places counted from each rank's own start
            wrong = torch.cat([batch_of(store, r, t).negative_key for r in np.split(rows, ranks)])
            assert not torch.equal(wrong, whole.negative_key)


def test_draws_are_new_in_each_pool_place_and_seed_and_favour_none(tmp_path: Path):
    record = PairRecord("query", [f"p{k}" for k in range(5)], [f"n{k}" for k in range(5)], 1.0)
    store = make_store(tmp_path / "a", [(0, record)], [("", "")])

    def drawn(pool: int, place: int = 0, seed: int = 0) -> tuple[int, ...]:
        batch = batch_of(store, [0], pool, np.array([place]), positives=2, negatives=2, seed=seed)
        return (*batch.positive_key[0].tolist(), *batch.negative_key[0].tolist())

    assert drawn(0) == drawn(0)
    for others in (
        [drawn(t) for t in range(20)],
        [drawn(0, i) for i in range(20)],
        [drawn(0, 0, s) for s in range(20)],
    ):
        assert len(set(others)) > 15
    counts = Counter(key for t in range(1000) for key in drawn(t))
    assert len(counts) == 10 and all(350 < count < 450 for count in counts.values())  # of 400 expected
    places = {document_key(text): k for side in (record.positives, record.negatives) for k, text in enumerate(side)}
    same = sum(places[key[0]] == places[key[2]] for key in map(drawn, range(1000)))
    assert 150 < same < 250  # of 200: negatives are not drawn as the positives are
