"""Graded rows of every format: what is read, filtered and given a grade, what is counted, and what is refused."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from graded import BM25, published, row, write_rows
from pairs import write
from pydantic import TypeAdapter

from toolkit.data.faults import Skipped
from toolkit.data.graded_records import GradedRow, Passage, read_graded
from toolkit.data.stdlib_graded import related_code
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.graded import GradedData, GradedSource, StdlibGraded

ROWS = [
    {
        "query_id": 7,
        "query": " who ",
        "passages": [
            {"text": "best", "title": "T", "grade": 3, "id": "a"},
            {"text": " fair ", "grade": 1.5, "model": "m"},
            {"text": "  ", "title": "U", "grade": 0},
        ],
        "lengths": [1],
    },
    {"query": "what", "passages": [{"text": "none", "grade": -1, "title": None, "id": None}], "query_id": None},
    {"query": "", "passages": [{"text": "lost", "grade": 1}]},
    {"query": "why", "passages": [{"text": "", "grade": 1}]},
    {"query": "how", "passages": []},
]
EXPECTED = [
    GradedRow("7", "who", [Passage("a", "T best", 3.0), Passage(None, "fair", 1.5)], ""),
    GradedRow(None, "what", [Passage(None, "none", -1.0)], ""),
]


def source(path: Path | str, form: str = "graded", **keys: Any) -> GradedSource:
    raw = {"sources": [{"folder": str(path), "format": form} | keys], "group": {"size": 2, "by": "first"}}
    return GradedData.model_validate(raw).sources[0]


def read(given: GradedSource, counts: Counter[str] | None = None, skipped: Skipped | None = None) -> list[GradedRow]:
    counts = Counter() if counts is None else counts
    return [each._replace(where="") for each in read_graded(given, counts, skipped)]


def error(given: GradedSource) -> str:
    with pytest.raises(RecipeError) as caught:
        read(given)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_rows_of_files(tmp_path: Path, suffix: str):
    counts: Counter[str] = Counter()
    rows = ROWS if suffix != ".parquet" else [each | {"query_id": str(each.get("query_id") or "7")} for each in ROWS]
    found = read(source(write(tmp_path / f"rows{suffix}", *rows)), counts)
    ids = ["7", None if suffix != ".parquet" else "7"]
    assert found == [each._replace(query_id=name) for each, name in zip(EXPECTED, ids, strict=True)]
    assert counts == {"rows": 5, "empty": 3, "blank": 2, "filtered": 0}


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch):
    features = [{key: each.get(key) for key in ("query", "passages")} for each in ROWS[:1]]
    features[0]["passages"] = [{"text": "best", "grade": 3}, {"text": "fair", "grade": 1}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(features))
    found = read(TypeAdapter(GradedSource).validate_python({"hub": "a/b"}))
    assert found == [GradedRow(None, "who", [Passage(None, "best", 3.0), Passage(None, "fair", 1.0)], "")]


def test_the_filter_comes_first_then_the_first_ones_then_the_constant(tmp_path: Path):
    passages = [(f"p{grade} {n}", float(grade)) for n, grade in enumerate([0, 3, 1, 2, 3, 0.5])]
    path = write_rows(tmp_path / "rows.jsonl", [row("q", *passages)])

    def grades(**keys: Any) -> list[tuple[str, float]]:
        (found,) = read(source(path, **keys))
        return [(passage.text, passage.grade) for passage in found.passages]

    assert grades() == passages
    assert grades(at_least=1) == [passages[n] for n in (1, 2, 3, 4)]
    assert grades(below=1) == [passages[n] for n in (0, 5)]
    assert grades(at_least=1, below=3) == [passages[n] for n in (2, 3)]
    assert grades(at_least=1, pick={"first": 2}) == [passages[n] for n in (1, 2)]
    assert grades(below=1, grade=7, pick={"first": 9}) == [("p0 0", 7.0), ("p0.5 5", 7.0)]
    assert grades(pick={"random": 1}) == passages  # drawn by the batch
    assert grades(at_least=9) == []  # the query is known all the same
    counts: Counter[str] = Counter()
    read(source(path, at_least=1, pick={"first": 1}), counts)
    assert counts == {"rows": 1, "blank": 0, "filtered": 2, "cut": 3}


def test_pairs_are_of_grades_1_and_0(tmp_path: Path):
    path = write(tmp_path / "p.jsonl", {"anchor": "q", "positive": ["a", "b"], "negative_1": "c", "negative_2": " "})
    assert read(source(path, "pairs")) == [
        GradedRow(None, "q", [Passage(None, "a", 1.0), Passage(None, "b", 1.0), Passage(None, "c", 0.0)], "")
    ]
    assert [p.text for p in read(source(path, "pairs", below=1))[0].passages] == ["c"]
    named = source(path, "pairs", fields={"negatives": ["negative_2"]})
    assert [p.text for p in read(named)[0].passages] == ["a", "b"]


def test_mined_negatives_are_a_source(tmp_path: Path):
    """As `python -m toolkit.mine` writes them."""
    mined = {"query": "q", "positives": ["a"], "negatives": ["b", "c"], "weight": 1.0}
    write_rows(tmp_path / "mined" / "pairs.jsonl", [mined])
    (tmp_path / "mined" / "mined.json").write_text("{}")
    (found,) = read(source(tmp_path / "mined", "pairs", below=1, pick={"random": 2}, grade=1))
    assert found.passages == [Passage(None, "b", 1.0), Passage(None, "c", 1.0)]


# --------------------------------------------------------------------------- BEIR and its judgements


def test_judged_queries_in_the_order_of_the_file(tmp_path: Path):
    folder = Path(published(tmp_path, "real"))
    lines = ["12\tr2\t1", "13\tr9\t0", "12\tr1\t2", "99\tr1\t1", "13\tr77\t1"]
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines) + "\n")
    counts: Counter[str] = Counter()
    assert read(source(folder, "beir", split="dev"), counts) == [
        GradedRow(
            "12", "query text 12", [Passage("r2", "real passage 2", 1.0), Passage("r1", "real passage 1", 2.0)], ""
        ),
        GradedRow("13", "query text 13", [Passage("r9", "real passage 9", 0.0)], ""),
    ]
    assert counts == {"rows": 3, "missing": 2, "blank": 0, "filtered": 0, "unasked": 1, "unnamed": 9}
    assert "has no qrels/test.tsv; set split to dev or train" in error(source(folder, "beir", split="test"))


RUN = "11 Q0 r4 1 9.5 bm25\n11 Q0 r5 2 9.25 bm25\n12 Q0 r8 1 -1e0 bm25\n"


@pytest.mark.parametrize(
    ("name", "text", "grades"),
    [
        ("run.jsonl", '{"qid": 11, "docid": ["r4", "r5"], "score": [1, 2.5]}\n', {"11": [1.0, 2.5]}),
        ("mined.tsv", "query-id\tcorpus-id\tscore\n11\tr4\t1\n11\tr5\t2\n", {"11": [1.0, 2.0]}),
        ("qrels.txt", "11 0 r4 1\n11\t0\tr5\t2\n12 0 r8 0\n", {"11": [1.0, 2.0], "12": [0.0]}),
    ],
)
def test_judgements_in_other_layouts(tmp_path: Path, name: str, text: str, grades: dict):
    (tmp_path / name).write_text(text)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    folder = published(tmp_path, "real")
    found = read(source(folder, "beir", judgements=str(tmp_path / name)))
    assert read(source(folder, "beir", judgements=str(tmp_path / f"{name}.gz"))) == found
    assert {each.query_id: [p.grade for p in each.passages] for each in found} == grades


def test_a_run_needs_a_grade(tmp_path: Path):
    path = tmp_path / "bm25.run"
    path.write_text(RUN)
    folder = published(tmp_path, "real")
    found = read(source(folder, "beir", judgements=str(path), grade=1, at_least=0))
    assert [(p.id, p.grade) for each in found for p in each.passages] == [("r4", 1.0), ("r5", 1.0)]
    assert "is a run, whose scores are no grades; set the source's grade" in error(
        source(folder, "beir", judgements=str(path))
    )
    path.write_text(f"a note\n{RUN}11 0 r6 2\n")  # skipped, as are grades among scores
    with pytest.raises(RecipeError, match="is a run, whose scores are no grades"):
        read(source(folder, "beir", judgements=str(path)), None, Skipped())
    skipped = Skipped()
    assert read(source(folder, "beir", judgements=str(path), grade=1, at_least=0), None, skipped) == found
    path.write_text("11 Q0 r4 1 x bm25\n")
    assert "line 1: 'x' stands where a finite number" in error(source(folder, "beir", judgements=str(path), grade=1))
    assert skipped.kinds == {"no judgement": 2} and "4 fields, but 6 in the lines before" in skipped.last


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.jsonl", "[1]", "line 1: write"),
        ("a.jsonl", '{"qid": "11", "docid": ["r1"]}', "line 1: write"),
        ("a.jsonl", '{"qid": "11", "docid": [], "score": []}', "docid and score are no lists of one length"),
        ("a.jsonl", '{"qid": "11", "docid": ["r1"], "score": [1, 2]}', "docid and score are no lists of one length"),
        ("a.jsonl", '{"qid": "11", "docid": ["r1", "r1"], "score": [1, 2]}', "docid 'r1' stands there twice; keep one"),
        ("a.jsonl", '{"qid": "11", "docid": [null], "score": [1]}', "docid holds null; write an id"),
        ("a.jsonl", '{"qid": true, "docid": ["r1"], "score": [1]}', "qid holds true or false; write an id"),
        ("a.jsonl", '{"qid": "11", "docid": ["r1"], "score": ["1"]}', "'score' holds text; write the grade"),
        ("a.jsonl", '{"qid": "11", "docid": ["r1"], "score": [NaN]}', "'score' holds the number nan; write the grade"),
        ("a.jsonl", '{"qid": "11", "docid": ["r1"], "score": [1]}\n' * 2, "line 2: query '11' has lines further above"),
        ("a.txt", "11 0 r1", "line 1: 3 fields; write query Q0 passage rank score run, or query 0 passage grade"),
        ("a.txt", "11 0 r1 x", "line 1: 'x' stands where a finite number is needed"),
        ("a.txt", "11 0 r1 inf", "line 1: 'inf' stands where a finite number is needed"),
        ("a.txt", "11 0 r1 1\n11 0 r1 2", "line 2: passage 'r1' comes twice for a query; keep one"),
        ("a.txt", "11 0 r1 1\n12 0 r1 1\n11 0 r2 1\n", "line 3: query '11' has lines further above too; put the lines"),
        ("a.txt", "11 0 r1 1\n11 Q0 r2 1 9.5 run\n", "line 2: 6 fields, but 4 in the lines before; keep what a search"),
        ("a.txt", "\n", "holds no judgement; known layouts: .tsv"),
        ("a.tsv", "11\tr1\t1\n", "the header is missing"),
        (
            "a.txt",
            "55 0 r1 1\n",
            "no query of queries.jsonl has a judged passage in corpus.jsonl; their ids must agree",
        ),
    ],
)
def test_malformed_judgements_are_one_line(tmp_path: Path, name: str, text: str, problem: str):
    (tmp_path / name).write_text(text)
    given = source(published(tmp_path, "real"), "beir", judgements=str(tmp_path / name))
    assert problem in error(given) and "\n" not in error(given)


def test_faulty_judgements_are_skipped_and_counted(tmp_path: Path):
    (tmp_path / "a.txt").write_text("11 0 r1 1\n11 0 r1 2\n12 0 r1\n12 0 r2 1\n11 0 r3 1\n13 0 r3 nan\n")
    skipped = Skipped()
    found = read(source(published(tmp_path, "real"), "beir", judgements=str(tmp_path / "a.txt")), None, skipped)
    assert {each.query_id: [p.id for p in each.passages] for each in found} == {"11": ["r1"], "12": ["r2"]}
    assert skipped.kinds == {"judged twice": 1, "no judgement": 1, "of a query met before": 1, "no grade": 1}


def test_a_missing_file_of_judgements_and_a_missing_corpus_are_named(tmp_path: Path):
    folder = Path(published(tmp_path, "real"))
    assert "none.run is no file; name a file of judgements" in error(source(folder, "beir", judgements="none.run"))
    (folder / "corpus.jsonl").unlink()
    assert "corpus.jsonl is missing; a BEIR folder has" in error(source(folder, "beir", judgements=str(BM25)))
    assert "is no folder; name a folder in BEIR layout" in error(source(tmp_path / "x", "beir"))


# --------------------------------------------------------------------------- a generated folder, and rows of no use


def test_a_generated_folder_is_both_beir_and_graded(tmp_path: Path):
    folder = Path(published(tmp_path, "synth"))
    for name in ("generated.json", "report.md"):
        (folder / name).write_text("{}")
    assert "no column 'query' among _id, title, text; a row is {\"query\"" in error(source(folder))
    assert 'set format to "beir"' in error(source(folder))
    beir = read(source(folder, "beir"))
    rows = [
        {
            "query_id": each.query_id,
            "query": each.query,
            "passages": [{"id": p.id, "text": p.text, "grade": int(p.grade)} for p in each.passages],
        }
        for each in beir
    ]
    write_rows(folder / "passages.jsonl", rows)
    assert read(source(folder)) == beir


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("3", "a JSON object is needed, found the number 3; a row is {"),
        ("{", "not JSON"),
        ('{"query": "q"}', "no column 'passages' among query; a row is {"),
        ('{"passages": []}', "no column 'query' among passages; a row is {"),
        ('{"query": 3, "passages": []}', "'query' holds the number 3; write text"),
        ('{"query": "q", "passages": "p"}', "'passages' holds text; write a list of {"),
        ('{"query": "q", "passages": null}', "'passages' holds null; write a list of {"),
        ('{"query": "q", "passages": {"text": "p", "grade": 1}}', "'passages' holds an object; write a list of {"),
        ('{"query": "q", "passages": ["p"]}', "passage 1: an object is needed, found text; write {"),
        ('{"query": "q", "passages": [{"text": "p"}]}', "passage 1: no 'grade' among text; add it"),
        ('{"query": "q", "passages": [{"grade": 1}]}', "passage 1: no 'text' among grade; add it"),
        ('{"query": "q", "passages": [{"text": 1, "grade": 1}]}', "passage 1: 'text' holds the number 1; write text"),
        ('{"query": "q", "passages": [{"text": "p", "grade": "3"}]}', "passage 1: 'grade' holds text; write the grade"),
        ('{"query": "q", "passages": [{"text": "p", "grade": true}]}', "'grade' holds true or false; write the grade"),
        ('{"query": "q", "passages": [{"text": "p", "grade": null}]}', "'grade' holds null; write the grade"),
        ('{"query": "q", "passages": [{"text": "p", "grade": NaN}]}', "'grade' holds the number nan; write the grade"),
        (
            '{"query": "q", "passages": [{"text": "p", "grade": 1e999}]}',
            "'grade' holds the number inf; write the grade",
        ),
        ('{"query": "q", "passages": [{"text": "p", "grade": 1e39}]}', "write the grade as a finite number"),
        ('{"query": "q", "passages": [{"text": "p", "grade": 1, "id": []}]}', "id holds an empty list; write an id"),
        (
            '{"query": "q", "passages": [{"text": "p", "grade": 1, "title": 1}]}',
            "'title' holds the number 1; write text",
        ),
        ('{"query": "q", "passages": [], "query_id": 1.5}', "query_id holds the number 1.5; write an id, as text"),
        ('{"query": "\\ud800", "passages": []}', "'query' holds half a surrogate pair"),
    ],
)
def test_faulty_rows_are_one_line_with_place_and_fix_or_are_skipped(tmp_path: Path, line: str, problem: str):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(row("q", ("p", 1)))
    path.write_text(f"{good}\n{line}\n{good}\n")
    told = error(source(path))
    assert told.startswith(f"{path}: line 2") and problem in told and "\n" not in told
    skipped, counts = Skipped(), Counter[str]()
    assert len(read(source(path), counts, skipped)) == 2
    assert skipped.kinds.total() == 1 and counts["rows"] == 3


# --------------------------------------------------------------------------- the embedded corpus


def test_code_near_a_function_stands_for_relevance():
    rows, left_out = related_code()
    counts: Counter[str] = Counter()
    found = read(StdlibGraded(stdlib="graded"), counts)  # pyright: ignore[reportCallIssue]
    assert counts["unrelated"] == left_out and counts["rows"] == len(rows) + left_out and len(found) == len(rows) > 500
    grades = Counter(tuple(p.grade for p in each.passages) for each in found)
    assert grades.keys() == {(3.0, 2.0, 1.0, 0.0), (3.0, 1.0, 0.0), (3.0, 2.0, 0.0)} and min(grades.values()) > 5
    for each in found:
        named = {p.grade: str(p.id).split(":")[:2] for p in each.passages}
        assert each.query_id == f"q:{each.passages[0].id}" and len({p.text for p in each.passages}) == len(
            each.passages
        )
        own, owner = named[3.0], named[3.0][1].rpartition(".")[0]
        assert named[0.0][0] != own[0]
        if 2.0 in named:
            assert own[0] == named[2.0][0] and owner and named[2.0][1].rpartition(".")[0] == owner and named[2.0] != own
        if 1.0 in named:
            other = named[1.0][1]
            assert own[0] == named[1.0][0] and not other.startswith(f"{own[1]}.") and not own[1].startswith(f"{other}.")
            assert not owner or (other != owner and not other.startswith(f"{owner}."))
    assert len({str(each.passages[-1].id) for each in found}) > len(found) // 4  # not always the same ones
    assert read(StdlibGraded(stdlib="graded")) == found  # pyright: ignore[reportCallIssue]
