"""A stage that leaves out false negatives by a surrogate: trained, resumed, and the same on two ranks as on one."""

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import pooled
from golden import write_library
from in_process import start
from recipe_changes import RECIPES
from safetensors.torch import load_file
from surrogates import rows_of_topics, write_source
from tiny import save_model

from toolkit.data import stdlib_corpus

PREVIOUS = {"by": "previous"}
BM25 = {"by": "bm25", "text": "code", "svd": 24}


@pytest.fixture
def made_up_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    part = stdlib_corpus._read(write_library(tmp_path / "library"))
    monkeypatch.setattr(stdlib_corpus, "_read", lambda _: part)
    monkeypatch.setattr(stdlib_corpus, "_queries", functools.cache(stdlib_corpus._queries.__wrapped__))
    stdlib_corpus.summary.cache_clear()
    yield
    stdlib_corpus.summary.cache_clear()


def recipe_with(rule: dict[str, Any]) -> dict[str, Any]:
    recipe = json.loads((RECIPES / "tiny" / "contrastive.json").read_text())
    recipe["stages"][1]["objective"]["false_negatives"] = rule
    return recipe


def logged(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == "supervised"]


@pytest.mark.parametrize(
    "rule",
    [{"surrogate": PREVIOUS, "rule": "relative", "eps": 0.0}, {"surrogate": BM25, "rule": "absolute", "cut": 0.05}],
    ids=["previous", "bm25"],
)
@pytest.mark.usefixtures("made_up_corpus")
def test_a_stage_with_false_negatives_trains_and_goes_on_from_its_middle(
    rule: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    recipe = recipe_with(rule)
    assert start(tmp_path, recipe, monkeypatch) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.count("surrogate: ") == 1
    run = tmp_path / "run"
    last = run / "stage_1_supervised"
    weights, first = load_file(last / "export" / "adapter_model.safetensors"), logged(run)
    assert [line["step"] for line in first] == [1, 2, 3, 4]
    assert any(0 < line["masked"] < 1 for line in first), [line["masked"] for line in first]
    assert all(0 <= line["rows_all_masked"] <= 1 for line in first)
    (last / "done.json").unlink()
    shutil.rmtree(last / "checkpoints" / "step_00000004")
    assert start(tmp_path, recipe, monkeypatch) == 0, capsys.readouterr().err
    for line, again in zip(first[2:], logged(run)[-2:], strict=True):
        assert all(line[key] == again[key] for key in ("step", "loss", "grad_norm", "masked"))
    resumed = load_file(last / "export" / "adapter_model.safetensors")
    assert all(torch.equal(weight, resumed[name]) for name, weight in weights.items())


@pytest.mark.usefixtures("made_up_corpus")
def test_the_masks_change_the_loss_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    found = {}
    for name, cut in (("all", -0.99), ("none", 1.0)):
        folder = tmp_path / name
        folder.mkdir()
        recipe = recipe_with({"surrogate": PREVIOUS, "rule": "absolute", "cut": cut})
        assert start(folder, recipe, monkeypatch) == 0, capsys.readouterr().err
        found[name] = logged(folder / "run")[0]
    assert found["all"]["masked"] == found["all"]["rows_all_masked"] == 1 and found["all"]["loss"] == 0
    assert found["none"]["masked"] == found["none"]["rows_all_masked"] == 0 and found["none"]["loss"] > 0
    assert found["all"]["rows"] == found["none"]["rows"]


def test_two_ranks_leave_out_what_one_does(tmp_path: Path) -> None:
    """From the files of the pairs on, in pools that span the ranks: the same rows, masks and losses."""
    model, source = save_model(tmp_path / "model", "bert"), write_source(tmp_path / "pairs", rows_of_topics(40))
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # drawn anew on each rank
    (model / "config.json").write_text(json.dumps(config))
    encoder = {"pooling": "mean", "normalize": True, "append_eos": None, "query_prefix": "", "passage_prefix": ""}
    recipe = recipe_with({"surrogate": {"by": "bm25", "text": "prose", "svd": 8}, "rule": "relative", "eps": 0.0})
    stage = recipe["stages"][1] | {
        "start": {"folder": str(model)},
        "encoder": encoder | {"max_tokens": 32, "eval_max_tokens": 32},
        "lora": None,
        "data": {"sources": [source], "negatives": 1},
        "optim": recipe["stages"][1]["optim"] | {"steps": 2},
        "export": {"merged": False},
    }
    stage["objective"] |= {"equal_queries": "joint"}
    found = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        path = folder / "recipe.json"
        path.write_text(json.dumps(recipe | {"stages": [stage]}))
        done = pooled("launcher/run.py", ranks, str(path), "--output", str(folder / "runs" / "run"), timeout=500)
        assert done.returncode == 0, done.stderr
        found[ranks] = logged(folder / "runs" / "run")
    for one, two in zip(found[1], found[2], strict=True):
        assert one["rows"] == two["rows"] and 0 < one["masked"] < 1
        assert one["masked"] == pytest.approx(two["masked"], rel=1e-12)
        assert one["rows_all_masked"] == two["rows_all_masked"]
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-5) and one["loss"] > 0
