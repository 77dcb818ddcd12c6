"""What is asked for a query: drawn attributes and examples, the texts of both forms, names and seeds of the calls."""

import json
from collections import Counter
from pathlib import Path

import pytest

from toolkit.generate.prompt import (
    GRADES,
    Prompts,
    attributes_of,
    example_of,
    read_prompts,
    single_request,
    together_request,
)
from toolkit.generate.queries import Query
from toolkit.recipe.errors import RecipeError

QUERY = Query("q1", "how do fjords form $query {x}")


def examples(path: Path, *queries: str) -> Path:
    rows = [
        {"query": query, "passages": [{"text": f"{query} of {grade}", "grade": grade} for grade in (0, 1, 2, 3)]}
        for query in queries
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def together() -> Prompts:
    return read_prompts("together", None, None, 1)


def test_all_grades_are_asked_for_at_once_from_the_best_down(together: Prompts):
    request = together_request(together, QUERY, 0)
    assert request.name == "q1/all/0" and QUERY.text in request.user and QUERY.text not in request.system
    places = [request.system.index(f"Grade {grade}: {together.grades[grade]}") for grade in GRADES]
    assert places == sorted(places)
    assert request.schema is not None
    assert list(request.schema["properties"]) == request.schema["required"] == [f"grade_{grade}" for grade in GRADES]
    again = together_request(together, QUERY, 1)
    assert again[1:4] == request[1:4] and again.seed != request.seed and again.name == "q1/all/1"


def test_attributes_are_drawn_by_the_seed_and_the_id(together: Prompts):
    assert attributes_of(together, QUERY) == attributes_of(together, Query("q1", "another text"))
    drawn = [attributes_of(together, Query(f"q{i}", "")) for i in range(600)]
    other = read_prompts("together", None, None, 2)
    assert [attributes_of(other, Query(f"q{i}", "")) for i in range(600)] != drawn
    for attribute, choices in together.attributes.items():
        counts = Counter(one[attribute] for one in drawn)
        assert counts.keys() == choices.keys()
        assert all(abs(n - 600 / len(choices)) < 5 * (600 / len(choices)) ** 0.5 for n in counts.values())
    assert set(together.attributes["length"]) == {"none", "2", "5", "10", "15"}


def test_an_attribute_says_its_text_and_none_says_nothing(together: Prompts):
    drawn = {i: attributes_of(together, Query(f"q{i}", "")) for i in range(300)}
    silent = next(i for i, one in drawn.items() if set(one.values()) == {"none"})
    asked = together_request(together, Query(f"q{silent}", "x"), 0).user
    assert asked == "Query: x\n\nWrite the four passages now, as one JSON object."
    loud = next(i for i, one in drawn.items() if one["length"] == "15" and one["register"] == "news")
    asked = together_request(together, Query(f"q{loud}", "x"), 0).user
    assert "about 15 sentences" in asked and "piece of news" in asked


def test_one_worked_example_is_shown_and_never_that_of_the_query(tmp_path: Path):
    path = examples(tmp_path / "e.jsonl", "first example", "second example")
    prompts = read_prompts("together", None, path, 1)
    shown = Counter(example_of(prompts, Query(f"q{i}", "x")).query for i in range(40))  # type: ignore[union-attr]
    assert set(shown) == {"first example", "second example"}
    for i in range(20):
        assert example_of(prompts, Query(f"q{i}", "First Example")).query == "second example"  # type: ignore[union-attr]
    user = together_request(prompts, Query("q", "first example"), 0).user
    assert '"grade_3": "second example of 3", "grade_2"' in user
    single = single_request(read_prompts("one-by-one", None, path, 1), Query("q", "first example"), 1, [], 0)
    assert "second example of 1" in single.user and "of 2" not in single.user


def test_an_example_that_is_no_unicode_is_one_line(tmp_path: Path):
    path = examples(tmp_path / "e.jsonl", "half \ud800")
    with pytest.raises(RecipeError, match=r"e.jsonl: line 1: 'the worked example' holds half a surrogate pair"):
        read_prompts("together", None, path, 1)


@pytest.mark.parametrize(
    "row",
    [
        '{"query": "a"}',
        '{"query": "a", "passages": [{"text": "t", "grade": 3}]}',
        '{"query": "", "passages": []}',
        '{"query": "a", "passages": [{"text": 1, "grade": 3}, {"text": "t", "grade": 2}, {"text": "t", "grade": 1}, '
        '{"text": "t", "grade": 0}]}',
        "[]",
    ],
)
def test_a_faulty_example_is_one_line(row: str, tmp_path: Path):
    path = examples(tmp_path / "e.jsonl", "good")
    path.write_text(path.read_text() + row + "\n")
    with pytest.raises(RecipeError, match=r"e.jsonl: line 2: is no worked example; write \{"):
        read_prompts("together", None, path, 1)


def test_a_call_for_one_grade_sees_the_better_passages():
    prompts = read_prompts("one-by-one", None, None, 1)
    request = single_request(prompts, QUERY, 1, ["the best one $x", "the second one"], 0)
    assert request.name == "q1/1/0" and request.schema is None
    assert prompts.grades[1] in request.user and prompts.grades[3] not in request.user + request.system
    assert request.user.index("the best one $x") < request.user.index("the second one")
    assert "already there" not in single_request(prompts, QUERY, 3, [], 0).user
    seeds = {single_request(prompts, QUERY, grade, [], attempt).seed for grade in GRADES for attempt in (0, 1)}
    assert len(seeds) == 8 and max(seeds) < 2**31


def test_a_very_long_query_is_asked_as_it_is(together: Prompts):
    text = "long " * 20000
    assert text.strip() in together_request(together, Query("q", text.strip()), 0).user
