"""A stage on pools that are cut from clusters, in this process on one rank: prepared, trained, resumed."""

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import write_library
from in_process import start
from recipe_changes import RECIPES
from safetensors.torch import load_file

from toolkit.data import stdlib_corpus

CLUSTERS: dict[str, Any] = {"size": 16, "iterations": 20, "restarts": 2, "seed": 42}
SURROGATES: dict[str, dict[str, Any]] = {
    "previous": {"by": "previous"},
    "bm25": {"by": "bm25", "text": "code", "svd": 24},
}


@pytest.fixture
def made_up_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    part = stdlib_corpus._read(write_library(tmp_path / "library"))
    monkeypatch.setattr(stdlib_corpus, "_read", lambda _: part)
    monkeypatch.setattr(stdlib_corpus, "_queries", functools.cache(stdlib_corpus._queries.__wrapped__))
    stdlib_corpus.summary.cache_clear()
    yield
    stdlib_corpus.summary.cache_clear()


def recipe_with(surrogate: dict[str, Any], walk: str) -> dict[str, Any]:
    recipe = json.loads((RECIPES / "tiny" / "contrastive.json").read_text())
    recipe["stages"][1]["data"] |= {"clusters": {"surrogate": surrogate, **CLUSTERS}, "packing": {"walk": walk}}
    return recipe


@pytest.mark.parametrize("by", SURROGATES)
@pytest.mark.usefixtures("made_up_corpus")
def test_a_stage_on_clustered_pools_trains_and_goes_on_from_its_middle(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    recipe = recipe_with(SURROGATES[by], "greedy")
    assert start(tmp_path, recipe, monkeypatch) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    (tmp_path / "said.txt").write_text(said)
    assert said.count("clusters of data.sources.0: ") == 2 and said.count("surrogate: ") == 1
    run = tmp_path / "run"
    last = run / "stage_1_supervised"
    weights = load_file(last / "export" / "adapter_model.safetensors")

    def log() -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        return [line for line in lines if line["stage"] == "supervised"]

    first = log()
    assert [line["step"] for line in first] == [1, 2, 3, 4]
    (last / "done.json").unlink()
    shutil.rmtree(last / "checkpoints" / "step_00000004")
    if by == "bm25":  # made anew they are the same, and so is the order
        for path in (tmp_path / "prepared").glob("clusters_*"):
            shutil.rmtree(path)
    assert start(tmp_path, recipe, monkeypatch) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.count("clusters of data.sources.0: ") == (2 if by == "bm25" else 0)
    for line, again in zip(first[2:], log()[-2:], strict=True):
        assert all(line[key] == again[key] for key in ("step", "loss", "grad_norm", "rows"))
    resumed = load_file(last / "export" / "adapter_model.safetensors")
    assert all(torch.equal(weight, resumed[name]) for name, weight in weights.items())
