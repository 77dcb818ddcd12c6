"""The tiny recipes in this process on one rank, with golden losses (on two ranks: test_end_to_end)."""

import functools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import check_golden, write_library
from in_process import start
from recipe_changes import RECIPES
from safetensors.torch import load_file

from toolkit.data import stdlib_corpus

STEPS = 4
SCALARS = {
    "contrastive": {"accuracy", "temperature", "padding"},
    "recontriever": {"pair_nll", "accuracy", "negative_weights", "std_weights", "std_query", "std_key", "padding"},
    "sycl": {"wasserstein", "kl", "accuracy", "pair_order", "padding"},
}


@pytest.fixture
def made_up_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A small library in place of Python's own, which differs between versions and takes a minute to read."""
    part = stdlib_corpus._read(write_library(tmp_path / "library"))
    monkeypatch.setattr(stdlib_corpus, "_read", lambda _: part)
    monkeypatch.setattr(stdlib_corpus, "_queries", functools.cache(stdlib_corpus._queries.__wrapped__))
    stdlib_corpus.summary.cache_clear()
    yield
    stdlib_corpus.summary.cache_clear()


@pytest.mark.parametrize("method", SCALARS)
@pytest.mark.usefixtures("made_up_corpus")
def test_a_tiny_recipe_trains_and_exports(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    recipe = json.loads((RECIPES / "tiny" / f"{method}.json").read_text())
    assert start(tmp_path, recipe, monkeypatch, checked=True) == 0, capsys.readouterr().err
    check_golden(method, tmp_path / "run")
    first, second = (tmp_path / "run" / f"stage_{i}_{stage['name']}" for i, stage in enumerate(recipe["stages"]))
    for folder in (first, second):
        done = json.loads((folder / "done.json").read_text())
        assert done["steps"] == STEPS and done["tokens"] > 0
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps: list[dict[str, Any]] = [line for line in logged if line["stage"] == second.name.removeprefix("stage_1_")]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        assert SCALARS[method] <= line.keys() and all(math.isfinite(line[key]) for key in ("loss", "grad_norm"))
        assert line["loss"] > 0 and line["grad_norm"] > 0
    assert len({line["loss"] for line in steps}) == STEPS
    adapter = load_file(second / "export" / "adapter_model.safetensors")
    moved = [name for name, weight in adapter.items() if "lora_B" in name and bool(weight.any())]
    assert len(moved) == 2 * 2  # the adapters of two layers, zero before training
    before = load_file(first / "export" / "model.safetensors")
    after = load_file(second / "export" / "merged" / "model.safetensors")
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert changed and all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in changed)


@pytest.mark.usefixtures("made_up_corpus")
def test_golden_losses_of_two_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Both adapters of one backbone move, and its export is the model that was trained, with a context and without."""
    recipe = json.loads((RECIPES / "tiny" / "cde.json").read_text())
    assert start(tmp_path, recipe, monkeypatch, checked=True) == 0, capsys.readouterr().err
    check_golden("cde", tmp_path / "run")
    folder = tmp_path / "run" / "stage_1_contextual"
    adapters = [load_file(folder / "export" / part / "adapter_model.safetensors") for part in ("", "first")]
    for adapter in adapters:
        moved = [name for name, weight in adapter.items() if "lora_B" in name and bool(weight.any())]
        assert len(moved) == 2 * 2  # the adapters of two layers, zero before training
    check = json.loads((folder / "export" / "export.json").read_text())["check"]["figures"]
    assert {"query", "passage", "query_in_context", "passage_in_context"} <= check.keys()
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in logged if line["stage"] == "contextual"]
    assert {"accuracy", "temperature", "padding", "context_repeated"} <= steps[0].keys()
    assert all(step["tokens_prefix"] == 2 * (6 + 8) for step in steps)  # of two pools, once for all their texts
    sides = ("tokens_query", "tokens_document", "tokens_context")
    assert all(step["tokens"] == sum(step[side] for side in sides) for step in steps)


@pytest.mark.usefixtures("made_up_corpus")
def test_golden_losses_of_revela_and_of_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    recipe = json.loads((RECIPES / "tiny" / "revela.json").read_text())
    assert start(tmp_path, recipe, monkeypatch) == 0, capsys.readouterr().err
    check_golden("revela", tmp_path / "run")
    monkeypatch.delenv("UPDATE_GOLDEN", raising=False)
    log = tmp_path / "run" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[-1]["loss"] *= 1 + 5e-4  # control
    log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.raises(AssertionError):
        check_golden("revela", tmp_path / "run")


@pytest.mark.usefixtures("made_up_corpus")
def test_neighbours_and_near_duplicates_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """BM25 for the language model, embeddings and masks for Revela; the log tells the share of masked pairs."""
    recipe = json.loads((RECIPES / "tiny" / "revela.json").read_text())
    first, second = recipe["stages"]
    first["data"]["neighbours"] = {"by": "bm25", "text": "code"}
    second["data"] |= {"neighbours": {"by": "embeddings"}, "near_duplicates": {"ngram": 1, "threshold": 0.2}}
    assert start(tmp_path, recipe, monkeypatch, checked=True) == 0, capsys.readouterr().err
    check_golden("neighbours", tmp_path / "run")
    assert len(list((tmp_path / "run" / "prepared").glob("bundles_*"))) == 2
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [1, 2, 3, 4] * 2
    assert all("near_duplicates" not in line for line in logged[:STEPS])
    shares = [line["near_duplicates"] for line in logged[STEPS:]]
    assert all(0 <= share <= 1 for share in shares) and sum(shares) > 0
    assert all(line["loss"] > 0 and math.isfinite(line["grad_norm"]) for line in logged)


@pytest.mark.usefixtures("made_up_corpus")
def test_a_stage_on_negatives_that_the_one_before_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Train, mine, train; then on from the middle of the last stage, whose rows are mined again."""
    recipe = json.loads((RECIPES / "tiny" / "mined.json").read_text())
    assert start(tmp_path, recipe, monkeypatch, checked=True) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.count("data.sources.0: mined: ") == 1
    run = tmp_path / "run"
    check_golden("mined", run)
    last = run / "stage_2_mined"
    weights = load_file(last / "export" / "adapter_model.safetensors")
    (mined,) = (run / "prepared").glob("mined_*")
    record = json.loads((mined / "0" / "mined.json").read_text())
    before = json.loads((run / "stage_1_supervised" / "export" / "export.json").read_text())
    assert record["by"]["weights_sha256"] == before["weights_sha256"] and record["counts"]["mined"] > 100
    stores = [json.loads(path.read_text()) for path in (tmp_path / "prepared").glob("pairs_*/meta.json")]
    assert sorted(store["hard_negatives"] for store in stores) == [0, record["counts"]["mined"]]

    def log() -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        return [line for line in lines if line["stage"] == "mined"]

    first = log()
    assert [line["step"] for line in first] == [1, 2, 3, 4]
    (last / "done.json").unlink()
    shutil.rmtree(last / "checkpoints" / "step_00000004")
    shutil.rmtree(mined)
    assert start(tmp_path, recipe, monkeypatch, checked=True) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.count("data.sources.0: mined: ") == 1
    for line, again in zip(first, log()[-4:], strict=True):
        assert all(line[key] == again[key] for key in ("loss", "grad_norm", "rows"))
    resumed = load_file(last / "export" / "adapter_model.safetensors")
    assert all(torch.equal(weight, resumed[name]) for name, weight in weights.items())
