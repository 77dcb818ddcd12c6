"""A real server, `transformers serve`, with a tiny model: its answers, garbage, come through the server engine."""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_models import save_chat_model
from distributed import free_port, rank_environment

from toolkit.generate.__main__ import main
from toolkit.generate.requests import Request, Sampling
from toolkit.generate.server import server_engine
from toolkit.recipe.errors import RecipeError

SAMPLING = Sampling(max_tokens=16, temperature=0.8, top_p=0.95)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address and the model's folder; the server is ended by its process id."""
    home = tmp_path_factory.mktemp("serve")
    folder = save_chat_model(home / "model", do_sample=True, max_new_tokens=16)
    port = free_port()
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder), "--device", "cpu"]
    log = (home / "log").open("wb")
    environment = rank_environment(HF_HOME=str(home / "hub"), HF_HUB_OFFLINE="1")
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", port], env=environment, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        _wait(server, f"http://127.0.0.1:{port}/health", home / "log")
        yield f"http://127.0.0.1:{port}/v1", folder
    finally:
        server.terminate()
        server.wait(30)
        log.close()


def _wait(server: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                assert json.load(response) == {"status": "ok"}
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the server does not come up:\n{log.read_text(errors='replace')[-4000:]}")


def test_its_answers_come_through(served):
    url, folder = served
    said: list[str] = []
    engine = server_engine(url, str(folder), SAMPLING, say=said.append)
    schema = {"type": "object", "properties": {"text": {"type": "string"}}}
    requests = [Request(f"q{i}", "be good", f"write about {i}", schema, i) for i in range(6)]
    answers = {answer.name: answer for answer in engine.answers(requests)}
    assert sorted(answers) == [f"q{i}" for i in range(6)]
    for answer in answers.values():
        assert not answer.failed and 0 < answer.tokens <= 16 and answer.prompt_tokens > 10
        assert answer.cut == (answer.tokens == 16)
    assert len({answer.text for answer in answers.values()}) > 1
    (named,) = engine.describe()["answered_as"]
    assert named.startswith(str(folder)) and said == []


SHORT = """
[grades]
"3" = "a"
"2" = "b"
"1" = "c"
"0" = "d"
[one_by_one]
system = "be good"
user = "$query $wanted $attributes $examples"
example = "$example_query $answer"
[attributes]
"""


def test_its_garbage_is_refused_and_counted(served, tmp_path, capsys):
    url, folder = served
    (tmp_path / "short.toml").write_text(SHORT)
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"query": f"how is {i}"}) + "\n" for i in range(2)))
    asked = ["--queries", str(tmp_path / "q.jsonl"), "--seed", "1", "--form", "one-by-one", "--max-tokens", "16"]
    by = ["--server", url, "--model", str(folder), "--template", str(tmp_path / "short.toml")]
    assert main(["passages", "--output", str(tmp_path / "out"), *asked, *by]) == 2
    assert "no query has a passage of every grade; see report.md there" in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "generated.json").read_text())
    assert found["counts"]["dropped"] == 2
    assert 8 <= sum(found["rejections"].values()) <= found["counts"]["calls"] <= 16  # now and then one may pass
    assert "no answer" not in found["rejections"] and found["counts"]["tokens"] > 16
    assert (tmp_path / "out" / "passages.jsonl").read_text() == ""


def test_another_model_than_the_one_it_serves(served):
    url, folder = served
    with pytest.raises(RecipeError) as error:
        list(server_engine(url, "other/model", SAMPLING).answers([Request("q", "", "text", None, 1)]))
    assert "does not know the model 'other/model'" in str(error.value) and str(folder) in str(error.value)
