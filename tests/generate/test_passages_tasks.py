"""The passages of a query in both forms: what is asked, refused, asked again, kept and dropped; rounds of an engine."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from scripted_engine import ScriptedEngine, passage, right

from toolkit.generate import gate
from toolkit.generate.asking import Unanswered, ask
from toolkit.generate.prompt import GRADES, Example, Prompts, read_prompts
from toolkit.generate.queries import Query
from toolkit.generate.requests import Answer, Request
from toolkit.generate.tasks import task_of

Replies = Callable[[Request], str | Answer]


def prompts(form: str = "together") -> Prompts:
    return read_prompts(form, None, None, 1)


def run(form: str, reply: Replies, *ids: str, room: int = 3) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Records by id, and the names of what was asked."""
    engine = ScriptedEngine(reply, room=room)
    tasks = (task_of(prompts(form), Query(name, f"how is {name}")) for name in ids)
    found = {}
    for task in ask(engine, tasks):
        assert task.record is not None and task.record["id"] not in found
        found[task.record["id"]] = task.record
    return found, [request.name for request in engine.asked]


def first_wrong(wrong: str | Answer, *names: str) -> Replies:
    """Right answers but for some requests."""

    def reply(request: Request) -> str | Answer:
        if request.name not in names:
            return right(request)
        return wrong._replace(name=request.name) if isinstance(wrong, Answer) else wrong

    return reply


@pytest.mark.parametrize("form", ["together", "one-by-one"])
@pytest.mark.parametrize("room", [1, 2, 50])
def test_every_query_is_asked_once_and_kept(form: str, room: int):
    ids = [f"q{i}" for i in range(7)]
    found, asked = run(form, right, *ids, room=room)
    assert set(found) == set(ids) and len(asked) == len(set(asked)) == (7 if form == "together" else 28)
    for name, record in found.items():
        assert record["kept"] and record["causes"] == [] and record["calls"] == (1 if form == "together" else 4)
        texts = [(one["grade"], one["text"]) for one in record["passages"]]
        assert texts == [(grade, passage(name, grade)) for grade in GRADES]
        assert record["tokens"] > 0 and record["prompt_tokens"] > record["tokens"]


def test_a_refused_answer_is_asked_for_once_more_with_another_seed():
    found, asked = run("together", first_wrong("no object", "a/all/0"), "a", "b")
    assert asked.count("a/all/0") == asked.count("a/all/1") == 1 and "b/all/1" not in asked
    record = found["a"]
    assert record["kept"] and record["causes"] == [gate.MISSING] and record["calls"] == 2
    assert record["passages"][0]["text"] == passage("a", 3, 1)
    assert record["passages"][0]["seed"] != found["b"]["passages"][0]["seed"]


def test_a_query_without_all_grades_is_dropped_with_its_causes():
    short = json.dumps({f"grade_{grade}": "too short" for grade in GRADES})
    found, asked = run("together", first_wrong(short, "a/all/0", "a/all/1"), "a", "b")
    assert not found["a"]["kept"] and found["a"]["passages"] == [] and found["a"]["causes"] == [gate.SHORT] * 2
    assert found["b"]["kept"] and len(asked) == 3


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        (Answer("", '{"grade_3": "a long text', True, 10, 10), gate.CUT),
        (Answer("", '{"grade_3": "only one"}', False, 10, 10), gate.MISSING),
        (json.dumps({f"grade_{grade}": passage("x", 1) for grade in GRADES}), gate.ALIKE),
        (json.dumps({f"grade_{grade}": f"This passage {passage('x', grade)}" for grade in GRADES}), gate.META),
    ],
)
def test_each_cause_is_counted(wrong: str | Answer, cause: str):
    assert run("together", first_wrong(wrong, "a/all/0"), "a")[0]["a"]["causes"] == [cause]
    assert cause in gate.CAUSES


def test_a_whole_object_counts_although_the_answer_was_cut_behind_it():
    whole = Answer("a/all/0", right(Request("a/all/0", "", "", None, 0)) + " and so on and", True, 10, 10)
    assert run("together", first_wrong(whole, "a/all/0"), "a")[0]["a"]["causes"] == []


@pytest.mark.parametrize("form", ["together", "one-by-one"])
def test_a_request_that_the_engine_refuses_is_not_asked_again(form: str):
    name = "a/all/0" if form == "together" else "a/3/0"
    failed = Answer("", "", False, 0, 0, "too long for the model: 9,000 tokens")
    found, asked = run(form, first_wrong(failed, name), "a")
    assert asked == [name] and not found["a"]["kept"]
    assert found["a"]["causes"] == [gate.REFUSED] and found["a"]["reasons"] == [failed.failed]


@pytest.mark.parametrize("form", ["together", "one-by-one"])
def test_hostile_answers_leave_a_record_that_can_be_written(form: str):
    texts = ["\ud800" * 20, "\x00" * 40, json.dumps({f"grade_{g}": "\ud800 word" * 20 for g in GRADES}), "{" * 3000]
    for text in texts:
        record = run(form, lambda request, text=text: text, "a")[0]["a"]
        assert not record["kept"] and json.dumps(record, ensure_ascii=False).encode()
    failed = run(form, lambda request: Answer(request.name, "", False, 0, 0, "bad \ud800\nline"), "a")[0]["a"]
    assert failed["reasons"] == ["bad \\ud800\\nline"] and json.dumps(failed, ensure_ascii=False).encode()


def test_one_grade_is_asked_for_again_alone_and_sees_the_better_ones():
    wrong = first_wrong(Answer("", "cut", True, 5, 5), "a/1/0")
    engine = ScriptedEngine(wrong)
    (task,) = ask(engine, [task_of(prompts("one-by-one"), Query("a", "how"))])
    assert [request.name for request in engine.asked] == ["a/3/0", "a/2/0", "a/1/0", "a/1/1", "a/0/0"]
    for request, better in zip(engine.asked, ([], [3], [3, 2], [3, 2], [3, 2, 1]), strict=True):
        shown = [passage("a", grade, int(grade == 1)) in request.user for grade in (3, 2, 1)]
        assert shown == [grade in better for grade in (3, 2, 1)]
    assert task.record is not None and task.record["causes"] == [gate.CUT] and task.record["kept"]
    given_up, asked = run("one-by-one", first_wrong("short", "a/2/0", "a/2/1"), "a")
    assert asked == ["a/3/0", "a/2/0", "a/2/1"] and given_up["a"]["causes"] == [gate.SHORT] * 2
    assert not given_up["a"]["kept"] and given_up["a"]["calls"] == 3


def test_calls_that_see_nothing_of_one_another_are_asked_at_once():
    own = prompts("one-by-one")
    texts = {name: text.replace("$earlier", "") for name, text in own.texts.items() if name != "earlier"}
    engine = ScriptedEngine(first_wrong("short", "a/3/0"), room=10)
    (task,) = ask(engine, [task_of(own._replace(texts=texts), Query("a", "how"))])
    assert [request.name for request in engine.asked[:4]] == [f"a/{grade}/0" for grade in GRADES]
    assert task.record is not None and task.record["kept"] and task.record["calls"] == 5
    assert [one["grade"] for one in task.record["passages"]] == list(GRADES)


def test_a_copy_of_the_worked_example_is_refused():
    shown = Example("example", {grade: passage("a", grade) for grade in GRADES})
    own = prompts()._replace(examples=[shown])
    (task,) = ask(ScriptedEngine(), [task_of(own, Query("a", "how"))])
    assert task.record is not None and task.record["causes"] == [gate.EXAMPLE] and task.record["kept"]


def test_what_follows_from_the_last_answers_is_asked_in_another_round():
    """An engine that has drawn all before it answers, as batch files do."""
    rounds = []

    class InRounds(ScriptedEngine):
        def answers(self, requests: Iterable[Request]) -> Iterator[Answer]:
            drawn = list(requests)
            rounds.append([request.name for request in drawn])
            yield from super().answers(drawn)

    found = list(ask(InRounds(), (task_of(prompts("one-by-one"), Query(name, "how")) for name in "ab")))
    assert len(found) == 2
    assert [sorted(names) for names in rounds] == [[f"a/{grade}/0", f"b/{grade}/0"] for grade in GRADES]


def test_requests_without_an_answer_end_the_asking():
    class Silent(ScriptedEngine):
        def answers(self, requests: Iterable[Request]) -> Iterator[Answer]:
            for request in requests:
                if request.name != "b/all/0":
                    yield self._reply(request)

    found = []
    with pytest.raises(Unanswered) as told:
        for task in ask(Silent(), (task_of(prompts(), Query(name, "how")) for name in "abc")):
            found.append(task.record["id"])  # type: ignore[index]
    assert found == ["a", "c"] and told.value.args == (1,)


def test_tasks_are_begun_only_when_there_is_room():
    begun = []

    def tasks() -> Iterator[Any]:
        for i in range(100):
            begun.append(i)
            yield task_of(prompts(), Query(f"q{i}", "how"))

    for number, _ in enumerate(ask(ScriptedEngine(room=4), tasks()), start=1):
        assert len(begun) <= number + 4
