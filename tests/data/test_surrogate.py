"""The texts of a store by their numbers, read anew from its rows."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from surrogates import data_of, prepared, rows_of_topics, write_source
from tiny_retriever import CASES, make

from toolkit.data.pair_records import PairRecord, read_pairs
from toolkit.data.surrogate import SurrogateVectors, store_texts
from toolkit.data.text_store import DOCUMENT, QUERY, text_key

CHANGED = "^the rows are not those that were prepared: a file changed meanwhile; start again$"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(CASES["bert_full"], tmp_path_factory.mktemp("model")).base.folder


def test_texts_come_by_their_numbers_each_once(model: Path, tmp_path: Path):
    """The second source has other prefixes, so its copies of the first one's texts have numbers of their own."""
    rows = rows_of_topics(30)
    first, second = write_source(tmp_path / "a", rows), write_source(tmp_path / "b", rows[10:] + rows_of_topics(9, 1))
    data = data_of(first, second | {"query_prefix": "other: ", "passage_prefix": "another: "})
    store = prepared(data, model, tmp_path / "run")
    records = [record for source in data.sources for record in read_pairs(source, Counter())]
    for side, keys, person in (("query", store.query_key, QUERY), ("document", store.document_key, DOCUMENT)):
        texts = list(store_texts(store, records, side))
        assert [text_key(text, person) for text in texts] == keys.tolist()
        assert len(set(texts)) < len(texts)  # copies
    queries = list(store_texts(store, records, "query"))
    documents = list(store_texts(store, records, "document"))
    for row, record in enumerate(records):
        assert queries[store.query_of_row[row]] == record.query
        assert [documents[n] for n in store.positives[row]] == list(dict.fromkeys(record.positives))
        hard = [text for text in dict.fromkeys(record.negatives) if text not in record.positives]
        assert [documents[n] for n in store.negatives[row]] == hard


def test_other_rows_are_told(model: Path, tmp_path: Path):
    data = data_of(write_source(tmp_path / "a", rows_of_topics(20)))
    store = prepared(data, model, tmp_path / "run")
    records = list(read_pairs(data.sources[0], Counter()))
    fewer, more = records[:-1], [*records, records[-1]]
    text = [*records[:3], records[3]._replace(query="another"), *records[4:]]
    positive = [*records[:2], PairRecord(records[2].query, ["another"], records[2].negatives, 1.0), *records[3:]]
    longer = [records[0]._replace(positives=["one", "two"]), *records[1:]]
    for others, side in (
        (fewer, "query"),
        (more, "query"),
        (text, "query"),
        (positive, "document"),
        (longer, "document"),
    ):
        with pytest.raises(ValueError, match=CHANGED):
            list(store_texts(store, others, side))


def test_vectors_of_rows_are_those_of_query_and_first_positive(model: Path, tmp_path: Path):
    data = data_of(write_source(tmp_path / "a", rows_of_topics(20)))
    store = prepared(data, model, tmp_path / "run")
    query = np.arange(len(store.query), dtype=np.float16)[:, None]
    document = 100 + np.arange(len(store.document), dtype=np.float16)[:, None]
    rows = np.array([1, 4, 6, 11])
    found = SurrogateVectors(query, document).of_rows(store, rows)
    assert all(side.dtype == np.float32 for side in found)
    assert found[0][:, 0].tolist() == [float(store.query_of_row[row]) for row in rows]
    assert found[1][:, 0].tolist() == [100.0 + store.positives[row][0] for row in rows.tolist()]


@pytest.mark.parametrize("meta", ["{}", "[]", '{"dim": 3}', "x"])
def test_a_folder_that_holds_none_is_damaged(meta: str, tmp_path: Path, model: Path):
    store: Any = prepared(data_of(write_source(tmp_path / "a", rows_of_topics(20))), model, tmp_path / "run")
    (tmp_path / "meta.json").write_text(meta)
    with pytest.raises(ValueError, match=re.escape("meta.json lacks dim or sha256") + "|Expecting value"):
        SurrogateVectors.open(tmp_path, store)
