"""Queries for which passages are written: every kind of source, and what is said of rows that cannot be used."""

import gzip
import json
from pathlib import Path

import pytest
from beir import write_beir

from toolkit.data.records import Collection
from toolkit.generate import queries as module
from toolkit.generate.queries import read_queries
from toolkit.recipe.errors import RecipeError


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_rows_with_and_without_ids(tmp_path: Path):
    rows = [{"_id": 7, "text": " one "}, {"_id": "b", "text": "two\nlines"}, {"_id": "c", "text": "naïve 東京 🙂"}]
    found = read_queries(write(tmp_path / "q.jsonl", *rows), None, None, 1)
    assert [tuple(one) for one in found.chosen] == [("7", "one"), ("b", "two\nlines"), ("c", "naïve 東京 🙂")]
    nameless = read_queries(write(tmp_path / "p.jsonl", {"query": "one"}, {"query": "two"}), None, None, 1)
    turned = read_queries(write(tmp_path / "r.jsonl", {"query": "two"}, {"query": "one"}), None, None, 1)
    assert set(nameless.chosen) == set(turned.chosen)  # an id is a function of the text, not of the line
    assert len({one.id for one in nameless.chosen}) == 2
    assert nameless.digest != turned.digest


def test_repeated_and_empty_queries_are_counted(tmp_path: Path):
    rows = [{"query": "a"}, {"query": "a "}, {"query": ""}, {"query": None}, {"query": "b"}, {"query": "a"}]
    found = read_queries(write(tmp_path / "q.jsonl", *rows), None, None, 1)
    assert ([one.text for one in found.chosen], found.repeated, found.empty) == (["a", "b"], 2, 2)


def test_pairs_and_graded_rows_give_their_queries(tmp_path: Path):
    rows = [{"anchor": "a", "positive": "p"}, {"anchor": "a", "positive": "q"}, {"anchor": "b", "positive": "p"}]
    assert [one.text for one in read_queries(write(tmp_path / "q.jsonl", *rows), None, None, 1).chosen] == ["a", "b"]
    folder = tmp_path / "graded"
    folder.mkdir()
    with gzip.open(folder / "train-0.jsonl.gz", "wt") as file:
        file.write(json.dumps({"query_id": "x", "query": "c", "passages": [{"text": "t", "grade": 3}]}) + "\n")
    assert read_queries(str(folder), None, None, 1).chosen == [("x", "c")]


def test_a_beir_folder_gives_the_queries_of_a_split(tmp_path: Path):
    folder = write_beir(tmp_path / "small")
    found = read_queries(str(folder), "dev", None, 1)
    judged = {line.split("\t")[0] for line in (folder / "qrels" / "dev.tsv").read_text().splitlines()[1:]}
    assert {one.id for one in found.chosen} == judged
    with pytest.raises(RecipeError, match=r"has no qrels/none.tsv; set --split to .*dev.*, or name the file"):
        read_queries(str(folder), "none", None, 1)
    every = read_queries(str(folder / "queries.jsonl"), None, None, 1)
    assert len(every.chosen) >= len(judged)


def test_the_embedded_corpus_gives_training_docstrings(monkeypatch):
    asked = []

    def small(split: str) -> Collection:
        asked.append(split)
        return Collection("stdlib", {}, {"q:a.py:f:1": "Return the first.", "q:a.py:g:9": "Return the last."}, {})

    monkeypatch.setattr(module, "collection", small)
    assert read_queries("stdlib", None, None, 1).chosen[1] == ("q:a.py:g:9", "Return the last.")
    assert asked == ["train"]
    with pytest.raises(RecipeError, match="--split: stdlib has none"):
        read_queries("stdlib", "test", None, 1)


def test_a_larger_limit_holds_a_smaller_one(tmp_path: Path):
    path = write(tmp_path / "q.jsonl", *({"query": f"query {i}"} for i in range(50)))
    small, large, other = (read_queries(path, None, *given) for given in ((5, 1), (20, 1), (5, 2)))
    assert set(small.chosen) < set(large.chosen) and len(large.chosen) == 20
    assert set(other.chosen) != set(small.chosen)
    order = [one.text for one in read_queries(path, None, None, 1).chosen]
    assert [one.text for one in large.chosen] == [text for text in order if text in dict(map(reversed, large.chosen))]
    assert small.digest == large.digest  # of the whole source
    with pytest.raises(RecipeError, match="--limit: 51 queries are more than the source's 50"):
        read_queries(path, None, 51, 1)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"query": "b"', r"q.jsonl: line 2: not JSON"),
        ('["b"]', r"q.jsonl: line 2: a JSON object is needed"),
        ('{"question": "b"}', r"q.jsonl: line 2: no column query, anchor, text, but question"),
        ('{"query": 3}', r"q.jsonl: line 2: 'query' holds the number 3, text is needed"),
        ('{"query": "b", "_id": "x"}', r"q.jsonl: line 2: id 'x' stands in an earlier row with another query"),
        ('{"query": "b", "_id": "y\\tz"}', r"q.jsonl: line 2: the id of the query 'y\\tz' holds a tab"),
        ('{"query": "b", "_id": [1]}', r"q.jsonl: line 2: the id of the query holds a list"),
        ('{"query": "\\ud800"}', r"q.jsonl: line 2: 'the query' holds half a surrogate pair"),
    ],
)
def test_a_malformed_query_is_named_with_file_and_line(line: str, problem: str, tmp_path: Path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"query": "a", "_id": "x"}\n' + line + "\n")
    with pytest.raises(RecipeError, match=problem) as told:
        read_queries(str(path), None, None, 1)
    assert "\n" not in str(told.value)


def test_no_queries_are_told_in_one_line(tmp_path: Path):
    (tmp_path / "q.txt").write_text("a query\n")
    with pytest.raises(RecipeError, match=r"^--queries: .*q\.txt is no \.jsonl, \.jsonl\.gz or \.parquet file; name"):
        read_queries(str(tmp_path / "q.txt"), None, None, 1)
    with pytest.raises(RecipeError, match="no such file or folder; name a file of queries"):
        read_queries(str(tmp_path / "none"), None, None, 1)
    with pytest.raises(RecipeError, match="holds no query"):
        read_queries(write(tmp_path / "q.jsonl", {"query": " "}), None, None, 1)
