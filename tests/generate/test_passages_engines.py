"""The command `toolkit.generate passages` with its real engines: a chat server in a thread, and batch files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from distributed import rank_environment
from scripted_engine import WORDS, passage
from stub_server import TOO_LONG, Reply, StubServer, closed, completion, cut_off, failure, too_many

from toolkit.generate import order, server
from toolkit.generate.__main__ import main
from toolkit.generate.written import finished


@pytest.fixture
def queries(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(order, "RESAMPLES", 99)
    path = tmp_path / "q.jsonl"
    path.write_text(
        "".join(json.dumps({"_id": f"q{i}", "text": f"how is {word}"}) + "\n" for i, word in enumerate(WORDS))
    )
    return path


def answer(body: dict[str, Any]) -> Reply:
    """A right answer to a chat, by the word of the query in it."""
    asked = body["messages"][-1]["content"]
    place = next(i for i, word in enumerate(WORDS) if f"how is {word}" in asked)
    return completion(json.dumps({f"grade_{grade}": passage(f"q{place}", grade) for grade in (3, 2, 1, 0)}))


def _first(left: set[str], body: dict[str, Any]) -> bool:
    """Whether a chat is the first about one of these queries."""
    found = {query for query in left if query in body["messages"][-1]["content"]}
    left -= found
    return bool(found)


def given(queries: Path, output: Path, *more: str) -> list[str]:
    return ["passages", "--queries", str(queries), "--output", str(output), "--seed", "1", *more]


def test_a_server_with_faults_writes_what_one_without_does(queries: Path, tmp_path: Path, capsys):
    with StubServer(answer) as stub:
        assert main(given(queries, tmp_path / "plain", "--server", stub.url)) == 0
        seen = len(stub.seen)
        assert seen == len(WORDS) and stub.seen[0]["response_format"]["type"] == "json_schema"
        cut = {"how is kelp"}
        stub.answer = lambda body: cut_off('{"grade_3": "half') if _first(cut, body) else answer(body)
        stub.script += [completion("no object"), too_many("0"), closed(), failure(500, "x")]
        assert main(given(queries, tmp_path / "faults", "--server", stub.url)) == 0
        assert len(stub.seen) == 2 * seen + 5
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv"):
        assert (tmp_path / "faults" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    record = json.loads((tmp_path / "faults" / "generated.json").read_text())
    assert record["rejections"] == {"grade missing": 1, "cut off": 1} and record["counts"]["at_second"] == 2
    assert record["engines"][0]["engine"] == "server" and record["engines"][0]["answered_as"] == ["stub-1"]
    with StubServer(answer, models=("other",)) as stub:
        assert main(given(queries, tmp_path / "plain", "--server", stub.url, "--model", "other")) == 2
        assert stub.seen == []
    assert "was begun with model stub, now other" in capsys.readouterr().err


def test_a_slow_server_is_given_the_time_that_the_command_says(queries: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(server, "TRIES", 1)
    monkeypatch.setattr(server, "GIVEN_UP", 1)
    with StubServer(lambda body: answer(body)._replace(seconds=1.0)) as stub:
        assert main(given(queries, tmp_path / "out", "--server", stub.url, "--request-timeout", "0.3")) == 2
        assert "no answer within 0.3 s; the server is overloaded, or stands still, or is slow: raise --request" in (
            capsys.readouterr().err
        )
        assert main(given(queries, tmp_path / "out", "--server", stub.url, "--request-timeout", "30")) == 0


def test_what_a_killed_run_left_may_be_all_too_long(queries: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(server, "FIRST_PAUSE", 0.01)

    def some(body: dict[str, Any]) -> Reply:
        return TOO_LONG["vllm"] if "how is kelp" in body["messages"][-1]["content"] else answer(body)

    output = tmp_path / "out"
    with StubServer(some) as stub:
        assert main(given(queries, output, "--server", stub.url)) == 0
        whole = (output / "passages.jsonl").read_bytes()
        (part,) = (output / ".journal").glob("part_*.jsonl")
        part.write_text("".join(line for line in part.open() if json.loads(line)["kept"]))
        assert main(given(queries, output, "--server", stub.url)) == 0
        assert (output / "passages.jsonl").read_bytes() == whole
        stub.answer = lambda body: failure(500, "still loading")
        capsys.readouterr()
        assert main(given(queries, tmp_path / "new", "--server", stub.url)) == 2
        assert "still loading" in capsys.readouterr().err and finished(tmp_path / "new") == {}  # none is dropped


def test_batch_files_go_round_until_every_query_is_finished(queries: Path, tmp_path: Path, capsys):
    folder, output = tmp_path / "batch", tmp_path / "out"
    command = given(queries, output, "--batch-file", str(folder), "--model", "stub")
    for number in (1, 2):
        assert main(command) == 4
        assert "requests have no answer yet; give the same command again" in capsys.readouterr().out
        with (folder / f"answers_{number}.jsonl").open("w") as file:
            for line in map(json.loads, (folder / f"requests_{number:05d}.jsonl").read_text().splitlines()):
                reply = answer(line["body"]) if line["custom_id"] != "q2/all/0" else completion("no object")
                response = {"status_code": 200, "body": reply.body}
                file.write(json.dumps({"custom_id": line["custom_id"], "response": response, "error": None}) + "\n")
    assert main(command) == 0
    record = json.loads((output / "generated.json").read_text())
    assert record["counts"]["kept"] == len(WORDS) and record["counts"]["calls"] == len(WORDS) + 1
    assert record["rejections"] == {"grade missing": 1}


def test_ctrl_c_ends_a_command_that_waits_for_a_server(queries: Path, tmp_path: Path):
    def some(body: dict[str, Any]) -> Reply:
        reply = answer(body)
        return reply if f"how is {WORDS[-1]}" not in body["messages"][-1]["content"] else reply._replace(seconds=60)

    output = tmp_path / "out"
    with StubServer(some) as stub:
        command = [sys.executable, "-m", "toolkit.generate", *given(queries, output, "--server", stub.url)]
        process = subprocess.Popen(command, env=rank_environment(), stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while not output.is_dir() or len(finished(output)) < len(WORDS) - 1:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.2)
        os.kill(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "\ninterrupted; what is finished is kept, and the same command goes on from there\n"
