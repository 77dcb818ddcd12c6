"""Rows of a query with positives and negatives: each style is read, and each mistake is one line with its fix."""

from collections import Counter
from pathlib import Path

import datasets
import pytest
from pairs import EXPECTED, STYLES, Row, answer, error, hub, passage, read, source, write

from toolkit.data.pair_records import PairRecord, content_hash, read_pairs
from toolkit.recipe.errors import RecipeError


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("style", STYLES)
def test_each_style_is_read_as_it_is_from_every_kind_of_file(tmp_path: Path, style: str, suffix: str):
    assert read(write(tmp_path / f"x{suffix}", *STYLES[style])) == EXPECTED


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_mapped_names(tmp_path: Path, suffix: str):
    ask: Row = {"ask": "q1", "w": 2, "good": [{"h": "T", "t": "p1"}], "bad": {"h": "", "t": "n1"}, "worse": "U n2"}
    other: Row = {"ask": "q2", "w": 3, "good": [{"h": "", "t": "p2"}], "bad": {"h": "", "t": "n3"}, "worse": "n4"}
    path = write(tmp_path / f"x{suffix}", ask, other)
    names: Row = {"query": "ask", "positive": "good", "negatives": ["bad", "worse"], "text": "t", "title": "h"}
    assert read(path, **names) == EXPECTED
    assert read(path, **names, weight="w") == [EXPECTED[0]._replace(weight=2.0), EXPECTED[1]._replace(weight=3.0)]
    assert [r.negatives for r in read(path, **Row(names, negatives=["worse"]))] == [["U n2"], ["n4"]]
    assert [r.negatives for r in read(path, **Row(names, negatives=None))] == [[], []]


def test_names_that_the_recipe_gives_are_not_guessed_again(tmp_path: Path):
    path = write(tmp_path / "x.jsonl", {"query": "q", "anchor": "a", "positive": "p", "neg": "n", "negative": "m"})
    assert read(path, query="positive", positive="query", negatives=[]) == [PairRecord("p", ["q"], [], 1.0)]
    assert read(path, query="anchor", negatives=["neg"]) == [PairRecord("a", ["p"], ["n"], 1.0)]
    path = write(tmp_path / "y.jsonl", {"pos": "noun", "positive": "p", "negative": "m", "neg": "n"})
    assert read(path, query="pos", negatives=["neg"]) == [PairRecord("noun", ["p"], ["n"], 1.0)]


def test_numbered_negatives_come_in_the_order_of_their_numbers(tmp_path: Path):
    numbers = [10, 2, 1, 11, 3]
    row = {"anchor": "q", "positive": "p", **{f"negative_{n}": f"n{n}" for n in numbers}, "negative_score": 0.5}
    (record,) = read(write(tmp_path / "x.jsonl", row))
    assert record.negatives == ["n1", "n2", "n3", "n10", "n11"]


def test_empty_texts_are_dropped_and_rows_without_query_or_positive_counted(tmp_path: Path):
    rows = [
        {"query": "q1", "pos": ["", "p1", None, "p2"], "neg": [" ", "n1", None]},
        {"query": " ", "pos": ["p"], "neg": []},
        {"query": None, "pos": ["p"], "neg": None},
        {"query": "q2", "pos": [], "neg": ["n"]},
        {"query": "q3", "pos": None, "neg": ["n"]},
        {"query": "q4", "pos": ["\n"], "neg": ["n"]},
        {"query": "q5", "pos": ["p3"], "neg": None},
    ]
    for suffix in (".jsonl", ".parquet"):
        counts: Counter[str] = Counter()
        records = list(read_pairs(source(write(tmp_path / f"x{suffix}", *rows)), counts))
        assert records == [PairRecord("q1", ["p1", "p2"], ["n1"], 1.0), PairRecord("q5", ["p3"], [], 1.0)]
        assert counts == {"rows": 7, "empty": 5}


def test_a_passage_with_a_title_alone_is_empty_and_titles_may_lack(tmp_path: Path):
    row = {
        "query": "q",
        "positive_passages": [passage(" ", "T"), {"text": "p"}],
        "negative_passages": [{"text": "n", "title": None}],
    }
    assert read(write(tmp_path / "x.jsonl", row)) == [PairRecord("q", ["p"], ["n"], 1.0)]


def test_rows_are_read_one_at_a_time(tmp_path: Path):
    path = write(tmp_path / "x.jsonl", {"query": "q", "pos": "p"})
    path.write_bytes(path.read_bytes() + b"{\n")
    rows = read_pairs(source(path), Counter())
    assert next(rows) == PairRecord("q", ["p"], [], 1.0)
    with pytest.raises(RecipeError, match="line 2: not JSON"):
        next(rows)


GOOD = b'{"query": "q", "positive": "p", "negative": "n", "w": 1}\n'
BAD: list[tuple[bytes, Row, str]] = [
    (b'["q", "p"]', {}, "line 1: a JSON object is needed, found a list; write one object a line"),
    (b"null", {}, "line 1: a JSON object is needed, found null; write one object a line"),
    (b'{"q": "x", "positive": "p"}', {}, "line 1: no column query or anchor; set fields.query to one of q, positive"),
    (
        b'{"query": "x", "p": "p"}',
        {},
        "line 1: no column positive_passages or positive or positives or pos; set fields.positive to one of query, p",
    ),
    (b"{}", {}, "line 1: no column query or anchor; set fields.query to one of none"),
    (GOOD, {"query": "ask"}, "line 1: no column 'ask'; set fields.query to one of query, positive, negative, w"),
    (GOOD, {"weight": "v"}, "line 1: no column 'v'; set fields.weight to one of query, positive, negative, w"),
    (
        GOOD,
        {"negatives": ["negative", "n2"]},
        "line 1: no column 'n2'; set fields.negatives to one of query, positive, negative, w",
    ),
    (
        b'{"query": "q", "anchor": "a", "positive": "p"}',
        {},
        "line 1: columns query and anchor may each be the query; set fields.query to one",
    ),
    (
        b'{"query": "q", "pos": "p", "neg": "n", "negative_1": "m"}',
        {},
        "line 1: columns neg and negative_1 may each be the negatives; list those to read in fields.negatives",
    ),
    (
        GOOD + b'{"query": "q", "positive": "p", "negative": "n", "negative_1": "m"}',
        {},
        "line 2: columns query, positive, negative, negative_1, but query, positive, negative in the first row; "
        "give all rows the same (null for none) or name them in fields",
    ),
    (
        GOOD + b'{"query": "q", "positive": "p"}',
        {},
        "line 2: columns query, positive, but query, positive, negative in the first row; "
        "give all rows the same (null for none) or name them in fields",
    ),
    (
        GOOD + b'{"positive": "p", "negative": "n"}',
        {},
        "line 2: no column query or anchor; set fields.query to one of positive, negative",
    ),
    (
        b'{"query": ["q"], "positive": "p"}',
        {},
        "line 1: 'query' holds a list, text is needed; set fields.query to a column of text",
    ),
    (
        b'{"query": "q", "positive": 7}',
        {},
        "line 1: 'positive' holds the number 7, text is needed; set fields.positive to a column of text",
    ),
    (
        b'{"query": "q", "positive": [["p"]]}',
        {},
        "line 1: 'positive' holds a list, text is needed; set fields.positive to a column of text",
    ),
    (
        b'{"query": "q", "positive": "p", "negative_1": true}',
        {},
        "line 1: 'negative_1' holds true or false, text is needed; set fields.negatives to a column of text",
    ),
    (
        b'{"query": "q", "pos": [{"docid": "1", "body": "p"}]}',
        {},
        "line 1: a passage of 'pos' without 'text'; set fields.text to one of docid, body",
    ),
    (
        b'{"query": "q", "pos": [{"text": "p"}]}',
        {"title": "head"},
        "line 1: a passage of 'pos' without 'head'; set fields.title to one of text",
    ),
    (
        b'{"query": "q", "pos": {"text": ["p"]}}',
        {},
        "line 1: 'pos.text' holds a list, text is needed; set fields.text to a column of text",
    ),
    (
        b'{"query": "q", "pos": {"text": "p", "title": 3}}',
        {},
        "line 1: 'pos.title' holds the number 3, text is needed; set fields.title to a column of text",
    ),
    (
        b'{"query": "q", "pos": "\\ud83d"}',
        {},
        "line 1: 'pos' holds half a surrogate pair (\\ud800 to \\udfff); mend the text",
    ),
    (b'{"n": ' + b"1" * 5000 + b"}", {}, "line 1: not JSON of use (a number too long); write one object a line"),
]


@pytest.mark.parametrize(("data", "fields", "message"), BAD)
def test_a_malformed_row_is_one_line_with_place_and_fix(tmp_path: Path, data: bytes, fields: Row, message: str):
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    assert error(path, **fields) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        ("0", "the number 0"),
        ("-1.5", "the number -1.5"),
        ("NaN", "the number nan"),
        ("Infinity", "the number inf"),
        ("1" + "0" * 400, "the number 1" + "0" * 36 + "..."),
        ('"1"', "text"),
        ("true", "true or false"),
        ("null", "null"),
        ("[1]", "a list"),
    ],
)
def test_weights_are_finite_numbers_above_0(tmp_path: Path, weight: str, kind: str):
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD + GOOD.replace(b'"w": 1', f'"w": {weight}'.encode()))
    assert error(path, weight="w") == (
        f"{path}: line 2: 'w' holds {kind}, a number above 0 is needed; set fields.weight to a column of weights"
    )
    assert [r.weight for r in read(path)] == [1.0, 1.0]  # a column that is not named is not looked at


def test_parquet_is_checked_by_its_columns_and_by_row(tmp_path: Path):
    path = write(tmp_path / "x.parquet", {"q": "a", "positive": "b"})
    assert error(path) == f"{path}: no column query or anchor; set fields.query to one of q, positive"
    write(path, {"query": "a", "positive": "b", "w": 1.0}, {"query": "a", "positive": "b", "w": 0.0})
    assert error(path, weight="w") == (
        f"{path}: row 2: 'w' holds the number 0.0, a number above 0 is needed; set fields.weight to a column of weights"
    )
    other = write(tmp_path / "y.parquet", {"query": "a", "positive": "b", "negative": "c"})
    assert error(tmp_path) == (
        f"{other}: row 1: columns query, positive, negative, but query, positive in the first row; "
        "give all rows the same (null for none) or name them in fields"
    )


# --------------------------------------------------------------------------- hub


@pytest.mark.parametrize("style", STYLES)
def test_hub_data_is_read_in_every_style(monkeypatch: pytest.MonkeyPatch, style: str):
    answer(monkeypatch, *STYLES[style])
    counts: Counter[str] = Counter()
    assert list(read_pairs(hub(), counts)) == EXPECTED
    assert counts["rows"] == 2


def test_hub_mistakes(monkeypatch: pytest.MonkeyPatch):
    answer(monkeypatch, {"q": "q", "positive": "p", "w": 1.0}, {"q": "q", "positive": "p", "w": -1.0})
    with pytest.raises(RecipeError) as caught:
        list(read_pairs(hub(), Counter()))
    assert str(caught.value) == "dataset a/b: no column query or anchor; set fields.query to one of q, positive, w"
    with pytest.raises(RecipeError, match=r"^dataset a/b: row 2: 'w' holds the number -1\.0, a number above 0"):
        list(read_pairs(hub(query="q", weight="w"), Counter()))

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no way out")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    for use in (lambda: list(read_pairs(hub(), Counter())), lambda: content_hash(hub())):
        with pytest.raises(RecipeError, match=r"^data.sources: dataset a/b: the hub cannot be reached \(no way out\)"):
            use()
