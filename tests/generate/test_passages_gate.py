"""What is read from an answer, and which texts are let through: malformed, hostile and foreign ones."""

import json
import time

import pytest

from toolkit.generate import gate
from toolkit.generate.parse import graded_texts, plain_text

GRADES = (3, 2, 1, 0)
GOOD = {f"grade_{grade}": f"text {grade}" for grade in GRADES}
READ = {grade: f"text {grade}" for grade in GRADES}
OBJECT = json.dumps(GOOD)


@pytest.mark.parametrize(
    "answer",
    [
        OBJECT,
        f"Sure! Here it is:\n```json\n{OBJECT}\n```\nI hope this helps {{you}}.",
        OBJECT[:-1] + ",}",
        OBJECT.replace('", "', '",\n"').replace("}", "  ,\n}"),
        f'{{"passages": {OBJECT}}}',
        f"[{OBJECT}]",
        f"<think>maybe {json.dumps(GOOD | {'grade_3': 'draft'})}</think>{OBJECT}",
        f"thoughts without a beginning {{ }}</think>\n{OBJECT}",
        f"{json.dumps({'grade_3': '...'})} that is the form. {OBJECT}",
        f"{json.dumps(GOOD | {'grade_3': 'draft'})} or better {OBJECT}",
        OBJECT.replace("grade_", "Grade "),
        OBJECT.replace("grade_", ""),
        json.dumps({"note": 1, **GOOD, "grade_9": "x"}),
        "{{" + OBJECT,
    ],
)
def test_an_object_is_found_wherever_it_stands(answer: str):
    assert graded_texts(answer, GRADES) == READ


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "no object at all",
        OBJECT[:-2],
        OBJECT[:40],
        '{"grade_3": ["text 3"], "grade_2": null, "grade_1": 1, "grade_0": {"text": "x"}}',
        "null",
        "[1, 2]",
        "{" * 5000,
        '{"a":' * 2000,
        "<think>" + OBJECT,
        '{"grade_3": ' + "9" * 5000 + "}",
        "\x00\ud800{",
    ],
)
def test_no_object_is_no_text_and_no_error(answer: str):
    began = time.process_time()
    assert len(graded_texts(answer, GRADES)) < len(GRADES)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("unit", ["{", '{"a":', '{"a":1},', '{"a":1,', '[{"a":', '\\"', '"{', ",", "{}", ", \n"])
def test_garbage_of_any_length_is_read_in_a_time_that_grows_with_it(unit: str):
    """A million characters in seconds; each brace that is open at the end once cost all that follows it."""
    began = time.process_time()
    assert graded_texts('"' + unit * (1_000_000 // len(unit)), GRADES) == {}
    assert plain_text(unit * (1_000_000 // len(unit)))
    assert time.process_time() - began < 5


def test_an_odd_quote_before_the_object_is_no_string():
    assert graded_texts('5" of rain. ' + OBJECT[:-1] + ",}", GRADES) == READ


def test_strings_keep_their_commas_braces_and_line_ends():
    texts = {grade: f'a, ] b,}} "{grade}" {{x}},\nnext' for grade in GRADES}
    answer = json.dumps({f"grade_{grade}": text for grade, text in texts.items()})[:-1] + ",}"
    assert graded_texts(answer.replace("\\n", "\n"), GRADES) == texts


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("  a text\n", "a text"),
        ("```\na text\n```", "a text"),
        ("```text\na\ntext```", "a\ntext"),
        ('"a text"', "a text"),
        ('"a" and "b"', '"a" and "b"'),
        ("<think>hm</think>a text", "a text"),
        ("", ""),
    ],
)
def test_a_plain_answer_is_its_text(answer: str, text: str):
    assert plain_text(answer) == text


LONG = "Glaciers carve deep valleys, and when the ice retreats the sea floods them slowly."
QUERY = "how do fjords form"


def test_a_good_text_is_let_through():
    assert gate.text_fault(LONG, QUERY) == ""
    assert (
        gate.text_fault("峡湾は氷河が谷を深く削り、その後に海水が入り込むことで形成される地形である。", "フィヨルド")
        == ""
    )


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", gate.SHORT),
        ("Nine words are not enough for a passage here.", gate.SHORT),
        ("...", gate.SHORT),
        ("短い文章。", gate.SHORT),
        (LONG + " \ufffd", gate.BROKEN),
        (LONG + " \ud800", gate.BROKEN),
        (LONG + "\x00", gate.BROKEN),
        (LONG + "\x1b[31m", gate.BROKEN),
        (LONG + " This answers the query.", gate.META),
        (LONG + " Its relevance is low.", gate.META),
        (LONG + " That is not relevant to the question.", gate.META),
        (LONG + " (grade 2)", gate.META),
        ("This passage is about " + LONG, gate.META),
        ("As an AI language model I say: " + LONG, gate.META),
        ("Here is the passage you asked for: " + LONG, gate.META),
        ("Sure, here you go. " + LONG, gate.META),
        # by SmolLM2-135M-Instruct
        ("I'm glad to see that the passage is clear and concise. " + LONG, gate.META),
        ("Here's a rewritten version of the text with additional suggestions: " + LONG, gate.META),
        (LONG + " The text is edited to provide a clear and accurate answer to the question.", gate.META),
        (LONG + " It says so without repeating what was searched for.", gate.META),
        ("This is another example of how a passage can be used to convey information to readers.", gate.META),
    ],
)
def test_a_faulty_text_has_a_cause(text: str, cause: str):
    assert gate.text_fault(text, QUERY) == cause


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("A query in SQL begins with a select and names columns, then a table.", "how to write a query in sql"),
        ("A query in SQL begins with a select and names columns, then a table.", "list all rows of a database table"),
        ("In grade 2 children learn to add and subtract numbers up to one hundred.", "what is taught in second grade"),
        ("The relevance of a theory is judged by what can be built upon it later.", "relevance theory in linguistics"),
        ("In this passage the sea is a narrow strait which ships cross only by day.", "north west passage"),
        ("The passage of time and the narrow passage between two rocks made the sailors doubt their maps.", "sailing"),
        ("To answer the question of who built it, scholars date the mortar of the oldest stones.", "old walls"),
        ("For example, the question of who built the wall is still open to scholars.", "who built the wall"),
        ("Sure-footed goats and sheep cross these slopes every spring, and nobody leads them.", "goats"),
        ("Tabs\tand\nline ends are no broken characters, since manuals have lists in them.", "lists"),
    ],
)
def test_words_of_the_task_are_let_through_where_the_query_has_them(text: str, query: str):
    assert gate.text_fault(text, query) == ""


def test_a_copy_of_the_query_is_refused():
    query = "return the string payload filled with zero bytes up to the next border"
    assert gate.text_fault("One can " + query.upper() + ", which is what it does.", query) == gate.COPY
    long = " ".join(f"word{i}" for i in range(300))
    part = " ".join(f"word{i}" for i in range(100, 112))
    assert gate.text_fault(f"It begins here and then {part} and it ends.", long) == gate.COPY
    fewer = " ".join(f"word{i}" for i in range(100, 111))
    assert gate.text_fault(f"It begins here and then {fewer} and it ends.", long) == ""
    assert gate.text_fault(" ".join(reversed(query.split())), query) == gate.COPY  # no other words
    assert gate.text_fault(f"{QUERY}: {LONG}", QUERY) == ""  # four words stand in any text about them


def test_near_duplicates_share_more_than_four_fifths_of_their_words():
    words = [f"word{i}" for i in range(10)]
    assert gate.alike(" ".join(words), ["nothing here", " ".join([*words, "more", "most"])])  # 10 of 12
    assert not gate.alike(" ".join(words[:8]), [" ".join(words)])  # 8 of 10
    assert gate.alike("A b C", ["a B c"]) and not gate.alike("words", [])
    assert gate.alike("東京都は日本の首都", ["東京都は日本の首都。"])


def test_the_share_of_the_query_s_words():
    assert gate.share_found("Red red fish", "a red car") == 0.5
    assert gate.share_found("?", "a red car") is None
    assert gate.num_words("one two three") == 3 and gate.num_words("東京都") == 2
