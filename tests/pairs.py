"""Sources of pairs for tests: files and simulated hub data, in every style that is read as it is."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sources import folder_source, hub_source

from toolkit.data.pair_records import PairRecord, read_pairs
from toolkit.recipe.errors import RecipeError

Row = dict[str, Any]


def source(path: Path, form: str = "pairs", split: str | None = None, **fields: object) -> Any:
    return folder_source(folder=str(path), format=form, split=split, fields=fields)


def read(path: Path, form: str = "pairs", split: str | None = None, **fields: object) -> list[PairRecord]:
    return list(read_pairs(source(path, form, split, **fields), Counter()))


def write(path: Path, *rows: object) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def error(path: Path, form: str = "pairs", split: str | None = None, **fields: object) -> str:
    with pytest.raises(RecipeError) as caught:
        list(read_pairs(source(path, form, split, **fields), Counter()))
    return str(caught.value)


def passage(text: str, title: str = "", **more: str) -> Row:
    return {"docid": f"d-{text}", "title": title, "text": text, **more}


# Two rows of each style, as its makers write them; all mean EXPECTED.
EXPECTED = [PairRecord("q1", ["T p1"], ["n1", "U n2"], 1.0), PairRecord("q2", ["p2"], ["n3", "n4"], 1.0)]
STYLES: dict[str, tuple[Row, Row]] = {
    "tevatron": (
        {
            "query_id": "1",
            "query": "q1",
            "positive_passages": [passage("p1", "T")],
            "negative_passages": [passage("n1", " "), passage("n2", "U")],
        },
        {
            "query_id": "2",
            "query": "q2",
            "positive_passages": [passage("p2")],
            "negative_passages": [passage("n3"), passage("n4")],
        },
    ),
    "tevatron, plain texts": (
        {"query_id": "1", "query": "q1", "positives": ["T p1"], "negatives": ["n1", "U n2"]},
        {"query_id": "2", "query": "q2", "positives": ["p2"], "negatives": ["n3", "n4"]},
    ),
    "sentence-transformers": (
        {"anchor": "q1", "positive": "T p1", "negative_2": "U n2", "negative_1": "n1"},
        {"anchor": "q2", "positive": "p2", "negative_2": "n4", "negative_1": "n3"},
    ),
    "sentence-transformers, first negative without number": (
        {"query": "q1", "positive": ["T p1"], "negative_1": "U n2", "negative": "n1"},
        {"query": "q2", "positive": ["p2"], "negative_1": "n4", "negative": "n3"},
    ),
    "passages under positive": (
        {"query": "q1", "positive": passage("p1", "T"), "negative": [passage("n1"), passage("n2", "U")]},
        {"query": "q2", "positive": passage("p2"), "negative": [passage("n3"), passage("n4")]},
    ),
    "FlagEmbedding": (
        {"query": "q1", "pos": ["T p1"], "neg": ["n1", "U n2"], "pos_scores": [0.9], "prompt": "x"},
        {"query": "q2", "pos": ["p2"], "neg": ["n3", "n4"], "pos_scores": [0.8], "prompt": "x"},
    ),
}


def hub(**fields: object) -> Any:
    return hub_source(hub="a/b", split="dev", format="pairs", fields=fields)


def answer(monkeypatch: pytest.MonkeyPatch, *rows: Row) -> None:
    """Let the hub hold these rows."""
    dataset = datasets.Dataset.from_list(list(rows))

    def load(name: str, config: str | None, split: str, streaming: bool) -> datasets.Dataset:
        assert (name, config, split, streaming) == ("a/b", None, "dev", False)
        return dataset

    monkeypatch.setattr(datasets, "load_dataset", load)
