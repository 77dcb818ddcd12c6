"""The command `toolkit.generate passages`: what it writes, going on, what it refuses, dry runs, progress, Ctrl-C."""

import errno
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from beir import write_beir
from distributed import rank_environment
from markdown_it import MarkdownIt
from scripted_engine import ScriptedEngine, passage, right
from sources import folder_source

from toolkit.data.beir import read_beir_texts, read_judgements
from toolkit.data.pair_records import read_pairs
from toolkit.generate import order, passages, progress, written
from toolkit.generate.__main__ import main
from toolkit.generate.requests import Answer, Request
from toolkit.recipe.errors import RecipeError
from toolkit.retrieval import retrievers

Opened = Callable[[ScriptedEngine], ScriptedEngine]


@pytest.fixture
def opened(monkeypatch) -> Opened:
    """Sets the engine that commands open."""
    monkeypatch.setattr(order, "RESAMPLES", 99)

    def set_engine(engine: ScriptedEngine) -> ScriptedEngine:
        monkeypatch.setattr(passages, "open_engine", lambda *_: engine)
        return engine

    set_engine(ScriptedEngine())
    return set_engine


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    rows = [{"_id": f"q{i}", "text": f"how is number {i} | <b>naïve 東京</b>"} for i in range(12)]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(queries: Path, output: Path, *more: str, seed: str = "1", model: str = "m") -> int:
    given = ["--queries", str(queries), "--output", str(output), "--seed", seed, "--model", model]
    return main(["passages", *given, *more])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def record(output: Path) -> dict[str, Any]:
    return json.loads((output / "generated.json").read_text(encoding="utf-8"))


def test_the_folder_is_rows_of_graded_passages_and_a_beir_folder(opened, queries: Path, tmp_path: Path, capsys):
    output = tmp_path / "out"
    assert run(queries, output) == 0
    assert (
        "12 queries have a passage of every grade, 0 are dropped; 0 of 12 answers were refused"
        in capsys.readouterr().out
    )
    there = sorted(path.name for path in output.iterdir())
    files = ["corpus.jsonl", "generated.json", "passages.jsonl", "qrels", "queries.jsonl", "report.md"]
    assert there == [".journal", *files]
    corpus, asked = read_beir_texts(output / "corpus.jsonl"), read_beir_texts(output / "queries.jsonl")
    judged = read_judgements(output / "qrels" / "train.tsv", asked)
    assert list(asked) == [f"q{i}" for i in range(12)] and len(corpus) == 48
    for row in lines(output / "passages.jsonl"):
        name = row["query_id"]
        assert row["query"] == asked[name] and set(row["attributes"]) == {"length", "level", "register"}
        for one, grade in zip(row["passages"], (3, 2, 1, 0), strict=True):
            assert one["id"] == f"{name}_l_{grade}_d_0" and one["grade"] == judged[name][one["id"]] == grade
            assert one["text"] == corpus[one["id"]] == passage(name, grade)
            assert one["template"] == record(output)["begun_with"]["template (hash)"] and one["model"] == "m"
    pairs = read_pairs(folder_source(folder=str(output), format="beir"), Counter())
    assert [len(pair.positives) for pair in pairs] == [3] * 12


def test_a_finished_folder_asks_nothing_and_stays_the_same(opened: Opened, queries: Path, tmp_path: Path, capsys):
    output = tmp_path / "out"
    run(queries, output)
    before = {path: path.read_bytes() for path in sorted(output.rglob("*.*l")) if ".journal" not in path.parts}
    assert run(queries, output) == 0
    assert "all 12 queries are finished; nothing is asked" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    engine = opened(ScriptedEngine())
    assert run(queries, output) == 0 and engine.asked == []


def test_an_interrupted_command_goes_on(opened: Opened, queries: Path, tmp_path: Path, capsys):
    def interrupted(request: Request) -> str:
        if len(engine.asked) > 6:
            raise KeyboardInterrupt
        return right(request)

    output = tmp_path / "out"
    engine = opened(ScriptedEngine(interrupted))
    assert run(queries, output) == 130
    assert capsys.readouterr().err == (
        "\ninterrupted; what is finished is kept, and the same command goes on from there\n"
    )
    done = written.finished(output)
    assert 0 < len(done) < 12 and not (output / "generated.json").exists()
    engine = opened(ScriptedEngine())
    assert run(queries, output) == 0
    assert {request.name.split("/")[0] for request in engine.asked} == {f"q{i}" for i in range(12)} - done.keys()
    fresh = tmp_path / "fresh"
    assert run(queries, fresh) == 0
    for name in ("corpus.jsonl", "queries.jsonl", "passages.jsonl", "qrels/train.tsv"):
        assert (output / name).read_bytes() == (fresh / name).read_bytes()
    assert len(record(output)["engines"]) == 1 and record(output)["counts"]["calls"] == 12


def test_engines_are_told_once_and_a_killed_session_s_that_knew_less_not():
    killed = {"engine": "server", "model": "m", "answered_as": [], "response_format": None}
    whole = killed | {"answered_as": ["m-1"], "response_format": "none"}
    other = whole | {"model": "n"}
    assert passages._each_once([killed, whole, killed, other, whole]) == [whole, other]
    assert passages._each_once([killed, killed]) == [killed]


def test_a_larger_limit_goes_on_and_a_smaller_one_is_refused(opened: Opened, queries: Path, tmp_path: Path, capsys):
    output = tmp_path / "out"
    assert run(queries, output, "--limit", "4") == 0
    first = {row["query_id"] for row in lines(output / "passages.jsonl")}
    engine = opened(ScriptedEngine())
    assert run(queries, output, "--limit", "9") == 0
    assert len(engine.asked) == 5 and first < {row["query_id"] for row in lines(output / "passages.jsonl")}
    capsys.readouterr()
    assert run(queries, output, "--limit", "4") == 2
    assert "was begun with 9 queries, now 4 (--limit); give as many or more" in capsys.readouterr().err
    assert run(queries, output) == 0 and len(lines(output / "passages.jsonl")) == 12


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": "2"}, "seed 1, now 2"),
        ({"model": "other"}, "model m, now other"),
        ({"more": ["--form", "one-by-one"]}, "form together, now one-by-one"),
        ({"more": ["--temperature", "0.1"]}, "temperature 0.8, now 0.1"),
        ({"more": ["--top-p", "1"]}, "top_p 0.95, now 1.0"),
        ({"more": ["--max-tokens", "9"]}, "max_tokens 2048, now 9"),
        ({"more": ["--template", "own.toml"]}, "template (hash) "),
        ({"more": ["--examples", "e.jsonl"]}, "examples (hash) none, now "),
        ({"queries": "other.jsonl"}, "queries (digest) "),
    ],
)
def test_another_run_in_the_folder_is_refused(
    changes: dict[str, Any], named: str, opened: Opened, queries: Path, tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shipped = Path(passages.__file__).parent / "templates" / "passages.toml"
    Path("own.toml").write_text(shipped.read_text().replace("A wrong hit.", "Wrong."))
    graded = [{"text": "t", "grade": grade} for grade in (3, 2, 1, 0)]
    Path("e.jsonl").write_text(json.dumps({"query": "x", "passages": graded}) + "\n")
    Path("other.jsonl").write_text(queries.read_text().replace("number 3", "number three"))
    assert run(queries, Path("out"), "--limit", "2") == 0
    engine = opened(ScriptedEngine())
    more = changes.pop("more", [])
    assert run(Path(changes.pop("queries", queries)), Path("out"), *more, **changes) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: out: was begun with ") and named in said and said.count("\n") == 1
    assert engine.asked == []


def test_a_server_that_has_another_model_now_is_refused(opened: Opened, queries: Path, tmp_path: Path, capsys):
    arguments = ["passages", "--queries", str(queries), "--output", str(tmp_path / "out"), "--seed", "1"]
    arguments += ["--server", "http://localhost:1/v1"]
    opened(ScriptedEngine(model="first"))
    assert main([*arguments, "--limit", "3"]) == 0
    assert lines(tmp_path / "out" / "passages.jsonl")[0]["passages"][0]["model"] == "first"
    engine = opened(ScriptedEngine(model="second"))
    assert main(arguments) == 2 and engine.asked == []
    assert "was begun with model first, now second" in capsys.readouterr().err


def test_a_start_that_came_to_nothing_binds_nobody(opened: Opened, queries: Path, tmp_path: Path, capsys):
    def no_engine(*_: object) -> str:
        raise RecipeError("http://localhost:1/v1: cannot be reached")

    opened(ScriptedEngine(no_engine))
    assert run(queries, tmp_path / "out", "--temperature", "1.9", model="misspelt") == 2
    assert capsys.readouterr().err == "error: http://localhost:1/v1: cannot be reached\n"
    opened(ScriptedEngine())
    assert run(queries, tmp_path / "out") == 0
    assert record(tmp_path / "out")["begun_with"]["temperature"] == 0.8


def test_two_commands_in_one_folder(opened, queries: Path, tmp_path: Path, capsys):
    with written.held(tmp_path / "out"):
        assert run(queries, tmp_path / "out") == 2
    assert "is in use by process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--server", "u", "--batch-file", "b", "--model", "m"], "--server and --batch-file: name one of them"),
        ([], "who writes: name --server URL, --batch-file PATH, or --model FOLDER_OR_HUB_ID"),
        (["--batch-file", "b"], "--batch-file: its requests name a model; add --model NAME"),
        (["--model", "m", "--key-variable", "K"], "--key-variable: only a server is given a key"),
        (["--model", "m", "--request-timeout", "9"], "--request-timeout: only a server is waited for"),
        (["--server", "http://h/v1", "--request-timeout", "0"], "--request-timeout: 0.0 is no number of seconds"),
        (["--server", "http://h/v1", "--request-timeout", "nan"], "--request-timeout: nan is no number of seconds"),
        (["--model", "m", "--tokens-per-second", "9"], "--tokens-per-second: only --dry-run reads it"),
        (["--model", "m", "--limit", "0"], "--limit: 0 is no number of queries"),
        (["--model", "m", "--limit", "13"], "--limit: 13 queries are more than the source's 12"),
        (["--model", "m", "--max-tokens", "0"], "--max-tokens: 0 leaves no room"),
        (["--model", "m", "--temperature", "-1"], "--temperature: -1.0 is not between 0 and 2"),
        (["--model", "m", "--top-p", "0"], "--top-p: 0.0 is not above 0"),
        (["--model", "m", "--template", "none.toml"], "none.toml: cannot be read"),
        (["--model", "m", "--check-by", "./none"], "--check-by ./none: is no retriever that says how it embeds"),
        (
            ["--model", "m", "--dry-run", "--check-by", "./none"],
            "--check-by ./none: is no retriever that says how it embeds",
        ),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_made(arguments, problem, opened, queries, tmp_path, capsys):
    given = ["--queries", str(queries), "--output", str(tmp_path / "out"), "--seed", "1"]
    assert main(["passages", *given, *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {problem}") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_query_without_passages_is_dropped_and_said(opened: Opened, queries: Path, tmp_path: Path, capsys):
    def reply(request: Request) -> str | Answer:
        if request.name.startswith("q3/"):
            return "no object"
        if request.name.startswith("q4/"):
            return Answer(request.name, "", False, 0, 0, "9,000 tokens are too many for | the model")
        return "short" if request.name == "q5/all/0" else right(request)

    opened(ScriptedEngine(reply))
    output = tmp_path / "out"
    assert run(queries, output) == 0
    found = record(output)
    assert (
        "10 queries have a passage of every grade, 2 are dropped; 4 of 14 answers were refused"
        in capsys.readouterr().out
    )
    assert found["counts"]["kept"] == 10 and found["counts"]["dropped"] == 2 and found["counts"]["at_second"] == 1
    assert found["rejections"] == {"grade missing": 3, "no answer": 1}
    assert found["first_dropped"] == {"q3": ["grade missing"] * 2, "q4": ["no answer"]}
    assert {row["_id"] for row in lines(output / "queries.jsonl")} == {f"q{i}" for i in range(12)} - {"q3", "q4"}
    report = (output / "report.md").read_text(encoding="utf-8")
    assert "| grade missing | the answer has no text for some grade | 3 |" in report
    assert "- 9,000 tokens are too many for \\| the model (1)" in report


def test_a_model_that_writes_garbage_leaves_a_report_and_no_source(
    opened: Opened, queries: Path, tmp_path: Path, capsys
):
    opened(ScriptedEngine(lambda _: "\ufffd \x00 garbage {"))
    output = tmp_path / "out"
    assert run(queries, output) == 2
    assert "no query has a passage of every grade; see report.md there for the causes" in capsys.readouterr().err
    assert record(output)["rejections"] == {"grade missing": 24} and record(output)["order"] == []
    assert "0 of them (0.0%)" in (output / "report.md").read_text()


def test_a_full_disk_at_the_end_is_one_line_and_mended_by_the_same_command(
    opened: Opened, queries: Path, tmp_path: Path, capsys, monkeypatch
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    output = tmp_path / "out"
    monkeypatch.setattr(passages, "write_report", full)
    assert run(queries, output) == 2
    said = capsys.readouterr().err
    fix = "what is finished is kept; mend that, and the same command goes on"
    assert said == f"error: {output}: cannot be written (No space left on device); {fix}\n"
    assert not (output / "generated.json").exists()
    monkeypatch.undo()
    assert run(queries, output) == 0 and record(output)["counts"]["kept"] == 12


def test_batch_answers_that_are_not_there_are_waited_for(opened: Opened, queries: Path, tmp_path: Path, capsys):
    class Waiting(ScriptedEngine):
        def answers(self, requests):
            return (self._reply(request) for request in requests if request.name < "q5")

    opened(Waiting())
    assert run(queries, tmp_path / "out") == 4
    assert "waiting: 5 requests have no answer yet; give the same command again" in capsys.readouterr().out
    assert len(written.finished(tmp_path / "out")) == 7 and not (tmp_path / "out" / "report.md").exists()
    engine = opened(ScriptedEngine())
    assert run(queries, tmp_path / "out") == 0 and len(engine.asked) == 5


def test_a_dry_run_asks_and_writes_nothing(opened, queries: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(passages, "open_engine", None)
    assert run(queries, tmp_path / "out", "--dry-run", "--tokens-per-second", "10") == 0
    together = capsys.readouterr().out
    assert "calls: 12 (together), and one more for each answer that is refused" in together
    assert "4 characters a token" in together and " at 10 tokens written a second" in together
    assert "--- system ---\nYou write passages" in together and "Query: how is number 0 | <b>naïve 東京</b>" in together
    assert run(queries, tmp_path / "out", "--dry-run", "--form", "one-by-one") == 0
    single = capsys.readouterr().out
    assert "calls: 48 (one-by-one)" in single and "hours: add --tokens-per-second N" in single
    assert not (tmp_path / "out").exists()
    assert run(queries, tmp_path / "out", "--dry-run", "--tokens-per-second", "0") == 2


def test_a_search_that_the_hub_does_not_have_is_told_before_anything_is_asked(
    opened: Opened, queries: Path, tmp_path: Path, capsys, monkeypatch
):
    def gone(hub: str, **_: Any) -> str:
        raise OSError(f"no {hub} there")

    engine = opened(ScriptedEngine())
    monkeypatch.setattr(retrievers, "snapshot_download", gone)
    assert run(queries, tmp_path / "out", "--check-by", "owner/mistyped") == 2
    assert "owner/mistyped: no such folder, not bm25, and as a hub id: " in capsys.readouterr().err
    monkeypatch.setattr(retrievers, "snapshot_download", lambda *_, **__: str(tmp_path))  # a model, but no retriever
    assert run(queries, tmp_path / "out", "--check-by", "owner/base") == 2
    assert "--check-by owner/base: is no retriever that says how it embeds" in capsys.readouterr().err
    assert engine.asked == [] and not (tmp_path / "out").exists()


def test_help_and_mistyped_flags_wait_for_no_heavy_library():
    code = "import sys, toolkit.generate.__main__; print([name for name in ('torch', 'openai') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], env=rank_environment(), text=True) == "[]\n"


def test_progress_in_a_pipe_is_a_line_now_and_then(opened: Opened, queries: Path, tmp_path: Path, capsys, monkeypatch):
    run(queries, tmp_path / "out", "--limit", "3")
    said = capsys.readouterr()
    assert said.out.startswith("0 of 3 queries are finished; asks for 3\n")
    assert said.out.count(" of 3 queries: ") == 1 and said.err == ""  # the last one
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1)
    opened(ScriptedEngine(lambda request: "short" if request.name == "q0/all/0" else right(request)))
    run(queries, tmp_path / "out")
    said = [line for line in capsys.readouterr().out.splitlines() if " of 12 queries: " in line]
    assert len(said) == 9 and said[0].startswith("4 of 12 queries: ") and said[-1].endswith(", 00:00 left")
    assert "tokens/s, 1 answers refused" in said[-1]


def test_waiting_for_a_slow_model_is_said(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.2)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LOOKS", 0.02)
    said = ""
    with progress.Progress(4, 1, "queries", True) as bar:
        bar.heard()
        deadline = time.monotonic() + 20
        while "none was finished" not in said and time.monotonic() < deadline:
            time.sleep(0.02)
            said += capsys.readouterr().out
        bar.add({"tokens": 50, "causes": []})
    assert "1 of 4 queries: none was finished for 0 s; 1 answers have come\n" in said
    with progress.Progress(4, 1, "queries", False):
        time.sleep(0.5)
    assert "none was finished" not in capsys.readouterr().out  # of another rank


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress.Progress(4, 1, "queries", True) as bar:
        for _ in range(3):
            bar.add({"tokens": 50, "causes": ["too short"]})
    said = capsys.readouterr()
    assert "4/4" in said.err and "tokens/s, 3 refused" in said.err and said.out == ""


def test_the_report_reads_well(opened: Opened, tmp_path: Path):
    folder = write_beir(tmp_path / "small")
    output = tmp_path / "out"
    assert run(folder, output, "--split", "test", "--check-by", "bm25") == 0
    text = (output / "report.md").read_text(encoding="utf-8")
    page = MarkdownIt("commonmark").enable("table").render(text)
    assert (
        page.count("<table>") == 3 and page.count("<strong>Grade 3</strong>") == record(output)["counts"]["kept"] <= 10
    )
    assert "<h2>Do searches find this order?</h2>" in page and "BM25 (english)" in page
    order_of = record(output)["order"][0]
    assert -1 <= order_of["low"] <= order_of["tau"] <= order_of["high"] <= 1
    assert record(output)["source"]["split"] == "test" and record(output)["tokens_per_second"] > 0


def test_texts_in_the_report_are_no_markup(opened: Opened, queries: Path, tmp_path: Path):
    def reply(request: Request) -> str:
        answer = json.loads(right(request))
        return json.dumps({key: f"# <script>x</script>\n| `a` | *b* |\n\n{text}" for key, text in answer.items()})

    opened(ScriptedEngine(reply))
    assert run(queries, tmp_path / "out") == 0
    page = MarkdownIt("commonmark").enable("table").render((tmp_path / "out" / "report.md").read_text())
    assert "<script>" not in page and "<b>" not in page and page.count("<h1>") == 1 and page.count("<h3>") == 10
