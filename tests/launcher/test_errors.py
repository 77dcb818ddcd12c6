"""What a user reads when something is wrong: one line each, exit code 2, nothing overwritten, no traceback."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from beir import write_beir
from distributed import WORKERS, launch
from in_process import files_below, one_stage, start
from recipe_changes import changed
from safetensors import SafetensorError
from tiny import save_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from launcher import run as launcher
from launcher import stages
from toolkit.training import loop

REPOSITORY = Path(__file__).parent.parent.parent
QUICKSTART = REPOSITORY / "recipes" / "quickstart.json"


def test_a_typo_is_answered_at_once_and_alone() -> None:
    seconds = []
    for _ in range(3):  # of its CPU, since other work may share the machine
        began = sum(os.times()[2:4])
        done = subprocess.run(
            [sys.executable, "launcher/run.py", str(QUICKSTART), "--dry-run", "--set", "stages.0.optim.warmup_step=3"],
            cwd=REPOSITORY, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            check=False,
        )  # fmt: skip
        seconds.append(sum(os.times()[2:4]) - began)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr == f"{QUICKSTART}: stages.0.optim.warmup_step: unknown key; did you mean warmup_steps?\n"
    assert min(seconds) < 2, seconds


def test_ranks_but_the_first_of_a_machine_say_nothing(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / "none.json")])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launcher.main() == 2 and capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    assert launcher.main() == 2
    assert capsys.readouterr().err == (
        f"{tmp_path}/none.json: cannot be read (No such file or directory); give the path of a recipe\n"
    )


def test_under_deepspeed_a_typo_is_one_line_of_one_rank() -> None:
    done = launch("launcher/run.py", 2, str(QUICKSTART), "--set", "stages.0.optim.warmup_step=3", timeout=500)
    said = (done.stdout + done.stderr).splitlines()
    expected = f"{QUICKSTART}: stages.0.optim.warmup_step: unknown key; did you mean warmup_steps?"
    assert done.returncode == 2 and said.count(expected) == 1, said
    assert not any("Traceback" in line or line.startswith("rank ") for line in said), said


@pytest.mark.parametrize(
    ("ranks", "failing", "speaker"),
    [(2, "0 1", ""), pytest.param(3, "1 2", "rank [12]: ", marks=pytest.mark.full)],
)
def test_an_error_is_told_once_by_whoever_has_it(ranks, failing, speaker, tmp_path) -> None:
    """Of all ranks: by rank 0; of others while rank 0 waits for them: by one of those."""
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(one_stage(tmp_path, ("stages.0.batch.pools_per_step", 6))))
    output = ["--output", str(tmp_path / "run")]
    done = launch(WORKERS / "failing_stage.py", ranks, str(path), *output, timeout=500, FAILING=failing)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "the model is damaged" in line]
    assert done.returncode == 2 and len(said) == 1, done
    assert re.fullmatch(f"{speaker}stage 0 language_model: the model is damaged", said[0]), said
    assert "Traceback" not in done.stdout + done.stderr, done


def malformed(folder: Path) -> list[tuple[str, Any]]:
    (folder / "bad").mkdir()
    (folder / "bad" / "a.jsonl").write_text('{"text": "one"}\n{"text": \n')
    return [("stages.0.data.sources", [{"folder": str(folder / "bad")}])]


def empty(folder: Path) -> list[tuple[str, Any]]:
    (folder / "bad").mkdir()
    (folder / "bad" / "a.jsonl").write_text('{"text": " "}\n')
    return [("stages.0.data.sources", [{"folder": str(folder / "bad")}])]


def too_large_a_pool(folder: Path) -> list[tuple[str, Any]]:
    return [("stages.0.batch.pool", 4096)]


def no_network(folder: Path) -> list[tuple[str, Any]]:
    return [("stages.0.start", {"hub": "nobody/nothing"})]


def no_such_data(folder: Path) -> list[tuple[str, Any]]:
    return [("stages.0.data.sources", [{"hub": "nobody/nothing"}])]


@pytest.mark.parametrize(
    ("mistake", "expected"),
    [
        (malformed, "bad/a.jsonl: line 2: not JSON"),
        (empty, "no text"),
        (too_large_a_pool, "4096"),
        (no_network, "nobody/nothing"),
        (no_such_data, "nobody/nothing"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_mistake_in_data_or_models_is_one_line(mistake, expected, tmp_path, monkeypatch, capsys) -> None:
    recipe = one_stage(tmp_path, *mistake(tmp_path), ("stages.0.eval.suites", []))
    assert start(tmp_path, recipe, monkeypatch) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if expected in line]
    assert len(lines) == 1 and "Traceback" not in error, error
    assert not (tmp_path / "run" / "stage_0_language_model" / "export").exists()


def test_ranks_that_do_not_fit_are_told_those_that_do(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(sys, "argv", ["run.py", str(QUICKSTART), "--dry-run", "--set", "stages.0.batch.pool=8"])
    assert launcher.main() == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == (
        "stage language_model: 3 ranks do not divide batch.pool = 8 (span world); use 1, 2, 4, 8 ranks or "
        "change batch.pool"
    )
    assert len(said) == 3 and all("3 ranks do not divide batch.pool" in line for line in said)  # all stages at once


def test_a_folder_of_another_run_is_left_alone(tmp_path, monkeypatch, capsys) -> None:
    recipe = one_stage(tmp_path, ("stages.0.eval.suites", []))
    assert start(tmp_path, recipe, monkeypatch) == 0
    recipe |= {"description": "Measured.", "time": {"measured": "1 s"}, "sources": {"seed": "ours"}}
    assert start(tmp_path, recipe, monkeypatch) == 0  # what describes a recipe decides nothing
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["time"]["measured"] == "1 s"
    before = {name: (tmp_path / "run" / name).read_bytes() for name in files_below(tmp_path / "run")}
    recipe["stages"][0]["optim"]["lr"] = 0.5
    assert start(tmp_path, recipe, monkeypatch) == 2
    assert "was made by a different recipe (stages.0.optim.lr: 0.001 there, 0.5 here)" in capsys.readouterr().err
    assert {name: (tmp_path / "run" / name).read_bytes() for name in files_below(tmp_path / "run")} == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("x")
    assert start(tmp_path, recipe, monkeypatch, "--output", str(tmp_path / "foreign")) == 2
    assert "is not empty and holds no recipe.json" in capsys.readouterr().err
    assert files_below(tmp_path / "foreign") == ["thesis.txt"]


def test_a_stage_has_begun_with_its_first_step(tmp_path, monkeypatch, capsys) -> None:
    """From then on a changed recipe is refused and nothing of the run is touched; before, it may be mended."""

    def interrupted(*_: Any) -> None:
        raise ValueError("interrupted")

    suites = ("stages.0.eval.suites", [str(write_beir(tmp_path / "small"))])
    run = tmp_path / "run"
    with monkeypatch.context() as before_the_first_checkpoint:
        before_the_first_checkpoint.setattr(loop, "save_checkpoint", interrupted)
        assert start(tmp_path, one_stage(tmp_path, suites, *malformed(tmp_path)), monkeypatch) == 2
        assert "not JSON" in capsys.readouterr().err
        assert start(tmp_path, one_stage(tmp_path, suites), monkeypatch) == 2
        assert "interrupted" in capsys.readouterr().err
    before = {name: (run / name).read_bytes() for name in files_below(run)}
    assert {"start/done.json", "log.jsonl"} < before.keys()
    for key, value in (("stages.0.optim.lr", 0.5), ("name", "another")):
        assert start(tmp_path, one_stage(tmp_path, suites, (key, value)), monkeypatch) == 2
        assert f"was made by a different recipe ({key}: " in capsys.readouterr().err
        assert {name: (run / name).read_bytes() for name in files_below(run)} == before
    recipe = json.loads((run / "recipe.json").read_text())
    data = recipe["stages"][0]["data"]  # as versions wrote it that had one section for all methods
    data |= {"crops": None, "positives": 1, "negatives": 0, "mix": None, "mine": None, "near_duplicates": None}
    data["sources"][0] |= {"weight": None, "limit": None, "query_prefix": None, "passage_prefix": None}
    (run / "recipe.json").write_text(json.dumps(recipe))
    for changes in ((), (("stages.0.optim.lr", 0.5),)):
        assert start(tmp_path, one_stage(tmp_path, suites, *changes), monkeypatch) == 2
        assert (
            "was made by another version of this toolkit, whose recipe.json has other keys" in capsys.readouterr().err
        )
        assert json.loads((run / "recipe.json").read_text()) == recipe
    (run / "recipe.json").write_bytes(before["recipe.json"])
    assert start(tmp_path, one_stage(tmp_path, suites), monkeypatch) == 0


def test_another_recipe_is_refused_before_anything_is_touched(tmp_path, monkeypatch, capsys) -> None:
    """Also where no stage has begun: the scores of the start stay."""
    monkeypatch.setattr(stages, "train_stage", lambda *_: int("no number"))
    suites = ("stages.0.eval.suites", [str(write_beir(tmp_path / "small"))])
    run = tmp_path / "run"
    assert start(tmp_path, one_stage(tmp_path, suites), monkeypatch) == 2
    before = {name: (run / name).read_bytes() for name in files_below(run)}
    assert start(tmp_path, one_stage(tmp_path, suites, ("name", "another")), monkeypatch) == 2
    assert "was made by a different recipe (name: " in capsys.readouterr().err
    assert {name: (run / name).read_bytes() for name in files_below(run)} == before and "start/done.json" in before


def test_a_finished_run_ends_with_a_report_or_one_line(tmp_path, monkeypatch, capsys) -> None:
    """A collection of one judged query has no interval; results that do not belong together are one line."""
    suite = write_beir(tmp_path / "small")
    judgements = (suite / "qrels" / "test.tsv").read_text().splitlines(keepends=True)
    (suite / "qrels" / "test.tsv").write_text("".join(judgements[:2]))
    recipe = one_stage(tmp_path, ("stages.0.eval.suites", [str(suite)]))
    assert start(tmp_path, recipe, monkeypatch) == 0
    assert "0 language_model" in (tmp_path / "run" / "report.md").read_text()
    path = tmp_path / "run" / "start" / "eval" / "metrics.json"
    path.write_text(path.read_text().replace('"revision": "', '"revision": "other '))
    capsys.readouterr()
    assert start(tmp_path, recipe, monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith("report: small:test: untrained and 0 language_model scored different data")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "/disk/shard.npy"), "No space left on device: '/disk/shard.npy'\n"),
        (SafetensorError("I/O error: No space left\non device"), "I/O error: No space left on device\n"),
        (TimeoutError(), "TimeoutError\n"),
    ],
)
def test_a_full_disk_is_one_line(error: Exception, said: str, tmp_path, monkeypatch, capsys) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(stages, "train_stage", fail)
    assert start(tmp_path, one_stage(tmp_path, ("stages.0.eval.suites", [])), monkeypatch) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("stage 0 language_model: ") and printed.endswith(said) and printed.count("\n") == 1


def test_lora_targets_and_model_types_are_checked_against_the_model(tmp_path, monkeypatch, capsys) -> None:
    for kind in ("llama", "gpt2"):
        folder = tmp_path / kind
        save_model(folder, "llama")
        if kind == "gpt2":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
        words = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="a"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)
        recipe = one_stage(tmp_path)
        second = changed()["stages"][1]
        second["start"] = second["objective"]["language_model"]["start"] = {"folder": str(folder)}
        second["lora"]["targets"] = ["q_proj", "query_key_value"]
        recipe["stages"] = [second | {"data": recipe["stages"][0]["data"]}]
        assert start(tmp_path, recipe, monkeypatch, "--output", str(tmp_path / f"run_{kind}")) == 2
        error = capsys.readouterr().err
        expected = (
            "query_key_value match no module; the model has" if kind == "llama" else "llama, mistral, qwen2, qwen3"
        )
        assert sum(expected in line for line in error.splitlines()) == 1 and "Traceback" not in error, error


def test_stages_run_in_order(tmp_path, monkeypatch, capsys) -> None:
    recipe = changed(("stages.0.data", one_stage(tmp_path)["stages"][0]["data"]))
    assert start(tmp_path, recipe, monkeypatch, "--stage", "1") == 2
    assert "the stage before it is not finished" in capsys.readouterr().err
    assert start(tmp_path, recipe, monkeypatch, "--stage", "2") == 2
    assert "the recipe has stages 0 to 1" in capsys.readouterr().err
