"""The positives of every query over all rows, against a look through all of them."""

from array import array
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from toolkit.data.known_positives import write_known
from toolkit.data.token_store import TokenRows, write_tokens


def known(
    folder: Path, query_key: list[int], document_key: list[int], rows: list[tuple[int, list[int]]], hard: list[int]
):
    """Rows of (number of the query, numbers of its positives) and hard negatives: what is known of each query."""
    write_tokens(folder, "positives", (positives for _, positives in rows))
    write_tokens(folder, "negatives", [hard])
    write_known(folder, array("q", query_key), array("q", document_key), array("q", [query for query, _ in rows]))
    written = TokenRows.open(folder, "known")
    assert len(written) == len(query_key)
    return [written[query].tolist() for query in range(len(query_key))]


def test_rows_of_one_query_are_united_and_texts_of_one_key_are_one(tmp_path: Path) -> None:
    query_key, document_key = [7, 5, 7], [40, 10, 30, 10]
    rows = [(0, [3, 0]), (1, [2]), (0, [1]), (2, [2, 0])]
    assert known(tmp_path, query_key, document_key, rows, [3, 0]) == [[0, 1, 2], [2], [0, 1, 2]]


def test_documents_of_one_query_alone_are_not_written(tmp_path: Path) -> None:
    rows = [(0, [0, 1, 2]), (1, [2])]
    assert known(tmp_path, [7, 5], [40, 10, 30], rows, []) == [[2], [2]]


@pytest.mark.parametrize("seed", range(5))
def test_many_rows(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    query_key = random.integers(2**62, 2**62 + 40, size=60).tolist()
    document_key = random.integers(2**62, 2**62 + 150, size=300).tolist()
    rows = [(int(random.integers(60)), random.permutation(300)[: random.integers(1, 5)].tolist()) for _ in range(500)]
    expected, of_number = defaultdict(set), defaultdict(set)
    for query, positives in rows:
        expected[query_key[query]].update(document_key[document] for document in positives)
        of_number[query].update(document_key[document] for document in positives)
    hard = random.permutation(300)[:40].tolist()
    found = known(tmp_path, query_key, document_key, rows, hard)
    asked = Counter(key for keys in expected.values() for key in keys)
    others = {key for key, count in asked.items() if count > 1} | {document_key[number] for number in hard}
    for query, numbers in enumerate(found):
        keys = [document_key[number] for number in numbers]
        assert len(keys) == len(set(keys)) and set(keys) == expected[query_key[query]] & others
    assert any(expected[query_key[query]] != of_number[query] for query in range(60))  # so prefixes do matter
