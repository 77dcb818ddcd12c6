"""Requests in files of OpenAI's batch format and their answers read back: rounds, errors, doubled and unknown lines."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from stub_server import TOO_LONG, Reply, completion

from toolkit.generate import batch_file
from toolkit.generate.batch_file import batch_engine
from toolkit.generate.requests import Answer, Request, Sampling
from toolkit.recipe.errors import RecipeError

SAMPLING = Sampling(max_tokens=50, temperature=0.7, top_p=0.9)
SCHEMA = {"type": "object"}


def requests(*names: str, user: str = "a text\nof two lines") -> list[Request]:
    return [Request(name, "be good", user, SCHEMA, 7) for name in names]


def run(path: Path, asked: list[Request], **settings: Any) -> tuple[dict[str, Answer], list[str]]:
    """The answers by name, and what was said."""
    said: list[str] = []
    found = list(batch_engine(path, "some/model", SAMPLING, say=said.append, **settings).answers(asked))
    assert len({answer.name for answer in found}) == len(found)
    return {answer.name: answer for answer in found}, said


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def output(name: str, reply: Reply | str = "fine", style: str = "openai") -> dict[str, Any]:
    """A line as OpenAI writes it, or vllm run-batch, which puts what failed into `error`."""
    reply = completion(reply) if isinstance(reply, str) else reply
    response: Any = {"status_code": reply.status, "request_id": "r", "body": reply.body}
    error = None
    if reply.status != 200 and style == "vllm":
        response["body"], error = None, reply.body
    return {"id": "x", "custom_id": name, "response": response, "error": error}


EXPIRED = {"id": "x", "custom_id": "b", "response": None, "error": {"code": "batch_expired", "message": "too late"}}


def write(path: Path, *answers: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in answers), encoding="utf-8")


def test_requests_are_written_as_the_format_says(tmp_path):
    found, said = run(tmp_path / "new" / "batch", requests("a", "b/\u00e4"))
    path = tmp_path / "new" / "batch" / "requests_00001.jsonl"
    assert found == {} and sorted(path.parent.iterdir()) == [path]
    assert said == [
        f"{path.parent}: 0 answers read; 2 requests written to requests_00001.jsonl",
        f"next, for each file: vllm run-batch -i {path} -o {path.parent}/answers_00001.jsonl --model some/model; then "
        "give the same command again",
    ]
    first, second = lines(path)
    assert second["custom_id"] == "b/\u00e4"
    assert first == {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "some/model",
            "messages": [
                {"role": "system", "content": "be good"},
                {"role": "user", "content": "a text\nof two lines"},
            ],
            "max_tokens": 50,
            "temperature": 0.7,
            "top_p": 0.9,
            "seed": 7,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
            },
        },
    }


def test_files_of_a_stated_number_of_requests_and_of_bytes(tmp_path, monkeypatch):
    names = [f"q{i}" for i in range(7)]
    run(tmp_path, requests(*names), per_file=3)
    files = sorted(tmp_path.iterdir())
    assert [len(lines(path)) for path in files] == [3, 3, 1]
    assert [line["custom_id"] for path in files for line in lines(path)] == names
    monkeypatch.setattr(batch_file, "MOST_BYTES", 2 * len(files[2].read_bytes()))
    run(tmp_path / "small", requests(*names))
    assert [len(lines(path)) for path in sorted((tmp_path / "small").iterdir())] == [2, 2, 2, 1]
    for number in (0, 50_001):
        with pytest.raises(RecipeError, match="write 1 to 50,000"):
            batch_engine(tmp_path, "m", SAMPLING, per_file=number)


@pytest.mark.parametrize("style", ["openai", "vllm"])
def test_answers_are_read_as_often_as_they_are_asked_for(tmp_path, style):
    asked = requests("a", "b", "c")
    run(tmp_path, asked)
    write(tmp_path / "any name.jsonl", output("c", "of c"), output("a", "of a"), output("b", TOO_LONG["vllm"], style))
    for _ in range(2):
        found, said = run(tmp_path, asked)
        assert found["a"] == Answer("a", "of a", False, 7, 2) and found["c"].text == "of c"
        assert found["b"].failed.startswith(
            "too long for the model's context (This model's maximum context length is 4096"
        )
        assert said == [f"{tmp_path}: 3 answers read"]
    found, _ = run(tmp_path, requests("c"))  # the others were finished before
    assert list(found) == ["c"]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["any name.jsonl", "requests_00001.jsonl"]


def test_files_without_an_answer_wait_and_what_is_missing_is_written_again(tmp_path):
    asked = requests(*"abcdef")
    run(tmp_path, asked, per_file=3)
    found, said = run(tmp_path, asked, per_file=3)  # nothing is written twice
    assert found == {} and len(list(tmp_path.iterdir())) == 2
    assert said[0] == f"{tmp_path}: 0 answers read; requests_00001.jsonl, requests_00002.jsonl not answered yet"
    assert "run-batch -i" in said[1] and "requests_00001.jsonl" in said[1]

    write(tmp_path / "answers_00001.jsonl", output("a"), EXPIRED)  # c is not there at all
    found, said = run(tmp_path, asked, per_file=3)
    assert list(found) == ["a"]
    assert [line["custom_id"] for line in lines(tmp_path / "requests_00003.jsonl")] == ["b", "c"]
    assert said[:2] == [
        f"{tmp_path}: answers 1 with an error of the server's own (too late), not used",
        f"{tmp_path}: 1 answers read; requests_00002.jsonl not answered yet; 2 requests written to requests_00003.jsonl"
        " (2 of them again: their file is answered without them)",
    ]
    found, _ = run(tmp_path, asked, per_file=3)  # and that only once
    assert len(list(tmp_path.iterdir())) == 4

    write(tmp_path / "answers_00003.jsonl", output("b"), output("c"))
    write(tmp_path / "answers_00002.jsonl", output("e"), output("d"), output("f"))
    found, said = run(tmp_path, asked, per_file=3)
    assert sorted(found) == [*"abcdef"] and len(list(tmp_path.iterdir())) == 6
    assert said[-1] == f"{tmp_path}: 6 answers read"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_error_of_the_server_is_no_answer(tmp_path, status):
    asked = requests("a", "b")
    run(tmp_path, asked)
    write(tmp_path / "answers.jsonl", output("a"), output("b", Reply(status, {"error": {"message": "busy"}})))
    found, _ = run(tmp_path, asked)
    assert list(found) == ["a"]
    assert [line["custom_id"] for line in lines(tmp_path / "requests_00002.jsonl")] == ["b"]


def test_doubled_and_unknown_lines_are_counted_and_a_good_answer_counts_more_than_a_failure(tmp_path):
    asked = requests("a", "b")
    run(tmp_path, asked)
    bad = Reply(400, {"error": {"message": "refused\nby a rule"}})
    write(tmp_path / "one.jsonl", output("a", bad), output("b", "first"), output("zz"), output("yy"))
    write(tmp_path / "two.jsonl", output("b", "second"), output("a", "good"))
    found, said = run(tmp_path, asked)
    assert {name: answer.text for name, answer in found.items()} == {"a": "good", "b": "first"}
    assert said[0] == (
        f"{tmp_path}: answers 2 with an id that no request has (zz), not used; 2 for a request that has one already, "
        "not used"
    )
    (tmp_path / "two.jsonl").unlink()
    found, _ = run(tmp_path, asked)
    assert found["a"].failed == "refused by a rule"


def test_all_requests_too_long_are_a_mistake_of_the_command(tmp_path):
    asked = requests("a", "b")
    run(tmp_path, asked)
    write(tmp_path / "answers.jsonl", output("a", TOO_LONG["openai"]), output("b", TOO_LONG["openai"]))
    with pytest.raises(RecipeError) as error:
        run(tmp_path, asked)
    assert "not one of 2 requests is answered" in str(error.value) and "4096 tokens" in str(error.value)
    assert str(error.value).endswith("or give the model a longer context, and choose another folder")


def test_a_folder_of_another_run_is_refused(tmp_path):
    run(tmp_path, requests("a"))
    with pytest.raises(RecipeError, match=r"requests_00001.jsonl: a was written with another text, model or sampling"):
        run(tmp_path, requests("a", user="another"))


def test_a_kill_while_writing_leaves_nothing_half_written(tmp_path):
    asked = requests("a", "b")

    def killed():
        yield asked[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(batch_engine(tmp_path, "some/model", SAMPLING).answers(killed()))
    assert [path.name for path in tmp_path.iterdir()] == [".requests_00001.jsonl.writing"]
    run(tmp_path, asked)
    assert [path.name for path in tmp_path.iterdir()] == ["requests_00001.jsonl"]
    assert len(lines(tmp_path / "requests_00001.jsonl")) == 2


def test_a_malformed_line_is_named_and_a_file_that_grows_is_read_so_far(tmp_path):
    asked = requests("a", "b")
    run(tmp_path, asked)
    path = tmp_path / "answers.jsonl"
    write(path, output("a"))
    path.write_text(path.read_text() + '\n{"custom_id": "b", "resp')  # a blank line, too
    found, _ = run(tmp_path, asked)
    assert list(found) == ["a"]
    path.write_text('[1]\n{"custom_id"\n')
    with pytest.raises(RecipeError) as error:
        run(tmp_path, asked)
    assert str(error.value) == f"{path}: line 1: is no JSON object; mend it, or take it out"
    path.rename(tmp_path / "requests_00009.jsonl")
    (tmp_path / "requests_00009.jsonl").write_text("{}\n" * 2 + '{"a": 1}\n')
    with pytest.raises(RecipeError, match=r"requests_00009.jsonl: holds no requests"):
        run(tmp_path, asked)


def test_the_path_of_a_file_leaves_the_others_of_its_folder_alone(tmp_path):
    (tmp_path / "queries.jsonl").write_text("not JSON at all\n")
    asked = requests("a")
    run(tmp_path / "batch.jsonl", asked)
    assert [line["custom_id"] for line in lines(tmp_path / "batch_requests_00001.jsonl")] == ["a"]
    write(tmp_path / "batch_answers_00001.jsonl", output("a"))
    found, said = run(tmp_path / "batch.jsonl", asked)
    assert found["a"].text == "fine" and said == [f"{tmp_path}: 1 answers read"]
    with pytest.raises(RecipeError, match="is a file; name a folder"):
        batch_engine(tmp_path / "queries.jsonl" / "deeper.jsonl", "m", SAMPLING)


@pytest.mark.parametrize(
    "line",
    [
        {"response": {"status_code": "400", "body": {"error": "odd"}}},
        {"response": {"status_code": None, "body": {"error": "odd"}}},
        {"response": "odd"},
        {"response": None, "error": "odd"},
        {"response": {"status_code": 200, "body": {"error": {"message": "odd"}}}},
    ],
)
def test_odd_answers_are_counted_with_what_they_say_and_written_again(tmp_path, line):
    run(tmp_path, requests("a"))
    write(tmp_path / "answers.jsonl", {"custom_id": "a", **line})
    found, said = run(tmp_path, requests("a"))
    assert found == {} and said[0] == f"{tmp_path}: answers 1 with an error of the server's own (odd), not used"
    assert (tmp_path / "requests_00002.jsonl").is_file()


def test_answers_that_are_nested_too_deep_are_an_error_with_the_line(tmp_path):
    run(tmp_path, requests("a"))
    (tmp_path / "answers.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(RecipeError, match=r"answers.jsonl: line 1: is no JSON object"):
        run(tmp_path, requests("a"))


def test_a_full_disk_is_one_line_and_leaves_no_file_of_requests(tmp_path, monkeypatch):
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(batch_file, "sync", full)
    with pytest.raises(RecipeError, match=r"requests_00001.jsonl: cannot be written \(No space left on device\); what"):
        run(tmp_path, requests("a"))
    assert not list(tmp_path.glob("*.jsonl"))
    monkeypatch.undo()
    run(tmp_path, requests("a"))
    assert [path.name for path in tmp_path.iterdir()] == ["requests_00001.jsonl"]


def test_it_says_which_model_answered(tmp_path):
    engine = batch_engine(tmp_path, "some/model", SAMPLING, say=lambda line: None)
    list(engine.answers(requests("a")))
    write(tmp_path / "answers.jsonl", output("a"))
    list(engine.answers(requests("a")))
    assert engine.describe() == {"engine": "batch file", "model": "some/model", "answered_as": ["stub-1"]}
