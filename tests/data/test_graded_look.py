"""What the first rows of graded sources show: columns and keys with their use, grades, and rows of several sources."""

from pathlib import Path
from typing import Any

import pytest
from graded import BM25, make_data, published, row, write_rows
from pairs import write

from toolkit.data.first_look import Look, count_rows
from toolkit.data.graded_look import look_at_graded, put_together
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.graded import GradedData


def looked(*sources: dict[str, Any], **keys: Any) -> tuple[GradedData, list[Look]]:
    data = make_data(list(sources), **keys)
    return data, [look_at_graded(source, data) for source in data.sources]


def test_columns_keys_and_grades_are_named(tmp_path: Path):
    rows = [row("q", ("a", 3), ("b", 0.5), query_id="1", model="m")]
    rows[0]["passages"][1]["attributes"] = {}
    path = write_rows(tmp_path / "rows.jsonl", rows)
    _, (seen,) = looked({"folder": str(path)})
    assert seen.line == (
        f"{path}: query = query, passages = passages, query_id = query_id, grades = 3, 0.5; "
        "not used: model, passages.attributes"
    )
    assert [p.text for p in seen.graded[0].passages] == ["a", "b"] and seen.unused == ["model", "passages.attributes"]
    _, (seen,) = looked({"folder": str(path), "at_least": 1, "grade": 7})
    assert "grades = 7" in seen.line


def test_pairs_and_judged_queries(tmp_path: Path):
    path = write(tmp_path / "p.jsonl", {"anchor": "q", "positive": "p", "negative": "n", "score": 1})
    _, (seen,) = looked({"folder": str(path), "format": "pairs"})
    used = "query = anchor, positive = positive, negatives = negative; not used: score"
    assert seen.line == f"pairs of grades 1, 0 in {path}: {used}"
    folder = published(tmp_path, "real")
    _, (seen, found) = looked(
        {"folder": folder, "format": "beir"},
        {"folder": folder, "format": "beir", "judgements": str(BM25), "grade": 1},
        join="query_id",
    )
    assert seen.line == f"{folder}: judged queries of train.tsv, grades 1, 0, passages = title and text"
    assert found.line == f"{folder}: judged queries of bm25_qrels.jsonl, grades 1, passages = title and text"
    assert [each.query for each in seen.graded] == [f"query text {n}" for n in (11, 12, 13)]
    assert [len(each.passages) for each in found.graded] == [4, 2, 1]


def test_the_embedded_corpus_is_not_read_for_a_look():
    _, (seen,) = looked({"stdlib": "graded"})
    assert seen.name == "stdlib: graded" and not seen.graded and not seen.line


def test_faults_of_the_first_rows_are_problems_unless_they_are_skipped(tmp_path: Path):
    path = write_rows(tmp_path / "rows.jsonl", [row("q", ("a", 3)), {"query": "q", "passages": 1}])
    with pytest.raises(RecipeError, match="line 2: 'passages' holds the number 1"):
        looked({"folder": str(path)})
    _, (seen,) = looked({"folder": str(path)}, faulty="skip")
    assert len(seen.graded) == 1
    run = tmp_path / "bm25.run"
    run.write_text("11 Q0 r4 1 9.5 bm25\n")
    with pytest.raises(RecipeError, match="is a run, whose scores are no grades"):
        looked({"folder": published(tmp_path, "real"), "format": "beir", "judgements": str(run)})


def test_rows_of_one_query_are_put_together_from_the_sources_looked_at(tmp_path: Path):
    one = write_rows(tmp_path / "1.jsonl", [row("a", ("a1", 3), query_id="1"), row("b", ("b1", 3), query_id="2")])
    two = write_rows(tmp_path / "2.jsonl", [row("b", ("b2", 1), query_id="2"), row("b", ("b3", 1), query_id="2")])
    sources = [{"folder": str(path)} for path in (one, two)]
    for join in ("query_id", "query_text"):
        data, looks = looked(*sources, join=join)
        held = [[p.text for row_ in rows for p in row_.passages] for rows in put_together(looks, data)]
        assert held == [["b1"], ["b2", "b3"]]
    data, looks = looked(sources[1])
    assert [[p.text for p in rows[0].passages] for rows in put_together(looks, data)] == [["b2"]]
    nameless = write_rows(tmp_path / "3.jsonl", [row("b", ("b2", 1))])
    data, looks = looked({"folder": str(nameless)}, join="query_id")
    assert put_together(looks, data) == []


def test_rows_are_counted_where_that_is_quick(tmp_path: Path):
    folder = published(tmp_path, "real")
    run = tmp_path / "bm25.run"
    run.write_text("11 Q0 r4 1 9.5 bm25\n")
    beir = {"folder": folder, "format": "beir"}
    sources = [beir, beir | {"judgements": str(BM25)}, beir | {"judgements": str(run)}, {"folder": str(BM25)}]
    data = make_data(sources, "query_id")
    assert [count_rows(source) for source in data.sources] == [
        (3, "judged queries"),
        (3, "by counting lines"),
        (None, "not counted: bm25.run has several lines for a query"),
        (3, "by counting lines"),
    ]
