"""What a user reads when something is wrong: one line each, exit code 2, nothing overwritten, no traceback."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_changes import changed
from tiny import save_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from launcher import run as launcher

REPOSITORY = Path(__file__).parent.parent.parent
QUICKSTART = REPOSITORY / "recipes" / "quickstart.json"


def one_stage(folder: Path, *changes: tuple[str, Any]) -> dict[str, Any]:
    """The first stage of the tiny recipe on a folder of 12 short documents."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    lines = [json.dumps({"text": "\n".join(f"def f{i}_{j}(x): return x" for j in range(6))}) for i in range(12)]
    (data / "documents.jsonl").write_text("\n".join(lines) + "\n")
    recipe = changed(
        ("stages.0.data.sources", [{"folder": str(data)}]),
        ("stages.0.optim.steps", 1),
        ("stages.0.export.merged", False),
    )
    recipe["stages"] = recipe["stages"][:1]
    for key, value in changes:
        *parents, last = key.split(".")
        node: Any = recipe
        for part in parents:
            node = node[int(part)] if part.isdecimal() else node[part]
        node[last] = value
    return recipe


def start(folder: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    """launcher/run.py in this process."""
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    monkeypatch.setattr(sys, "argv", ["run.py", str(path), "--output", str(folder / "run"), *options])
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if not torch.distributed.is_initialized():
            monkeypatch.delenv(name, raising=False)
    return launcher.main()


def files_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_typo_is_answered_at_once_and_alone() -> None:
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "launcher/run.py", str(QUICKSTART), "--dry-run", "--set", "stages.0.optim.warmup_step=3"],
        cwd=REPOSITORY, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=False,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"{QUICKSTART}: stages.0.optim.warmup_step: unknown key; did you mean warmup_steps?\n"
    assert seconds < 2, seconds


def test_ranks_but_the_first_say_nothing(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / "none.json")])
    monkeypatch.setenv("RANK", "1")
    assert launcher.main() == 2 and capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    assert launcher.main() == 2
    assert capsys.readouterr().err == (
        f"{tmp_path}/none.json: cannot be read (No such file or directory); give the path of a recipe\n"
    )


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
    assert capsys.readouterr().err == (
        "stage language_model: 3 ranks do not divide batch.pool = 8 (span world); use 1, 2, 4, 8 ranks or "
        "change batch.pool\n"
    )


def test_a_folder_of_another_run_is_left_alone(tmp_path, monkeypatch, capsys) -> None:
    recipe = one_stage(tmp_path, ("stages.0.eval.suites", []))
    assert start(tmp_path, recipe, monkeypatch) == 0
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
