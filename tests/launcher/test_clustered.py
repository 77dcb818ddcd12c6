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
from surrogates import rows_of_topics, write_source

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
    assert said.count("clusters of data.sources.0: ") == 2 and said.count("surrogate: 157 query and 157 ") == 1
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


def dry_run(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any, *options: str
) -> tuple[int, list[str], str]:
    code = start(tmp_path, recipe, monkeypatch, "--dry-run", *options)
    said = capsys.readouterr()
    return code, [" ".join(line.split()) for line in said.out.splitlines()], said.err


@pytest.mark.usefixtures("made_up_corpus")
def test_a_dry_run_says_what_clustering_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    recipe = recipe_with(SURROGATES["bm25"], "greedy")
    code, lines, problems = dry_run(tmp_path, recipe, monkeypatch, capsys)
    assert code == 0, problems
    assert (
        sum(
            line.startswith("clusters not known: not all rows are counted; K-means reads 2,000,000 of")
            for line in lines
        )
        == 1
    )
    recipe["stages"][1]["data"]["sources"] = [write_source(tmp_path / "pairs", rows_of_topics(157))]
    code, lines, problems = dry_run(tmp_path, recipe, monkeypatch, capsys)
    assert code == 0, problems
    told = "10 for 157 rows; K-means reads all of them, two points each, 2 times 20 iterations at most, and holds 0 MiB"
    assert f"clusters {told}" in lines
    epochs = f"{4 * 2 / (157 // 8):.2f}"  # steps, pools a step, pools of an epoch
    assert f"epochs {epochs} (more if rows lack a query or positive: they are left out)" in lines
    for change, line in (
        ("size=158", "size: 158 is more than the 157 rows of data.sources.0; lower it"),
        ("sample=9", "sample: 9 rows cannot make the 10 clusters of data.sources.0; raise it, or size"),
    ):
        code, lines, problems = dry_run(
            tmp_path, recipe, monkeypatch, capsys, "--set", f"stages.1.data.clusters.{change}"
        )
        assert (code, problems) == (2, f"stages.1.data.clusters.{line}\n")
    recipe["stages"][1]["batch"]["pool"] = 160
    few = "stages.1.data.sources: 157 rows are fewer than a pool of 160; lower batch.pool or add data\n"
    assert dry_run(tmp_path, recipe, monkeypatch, capsys)[::2] == (2, few)


@pytest.mark.usefixtures("made_up_corpus")
def test_clusters_larger_than_the_data_end_a_run_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    recipe = recipe_with(SURROGATES["bm25"] | {"svd": 1000}, "random")
    assert start(tmp_path, recipe, monkeypatch) == 2
    told = "1000 dimensions cannot be had from 157 different queries of 55 words; lower it to 54 or less"
    assert f"stages.1.data.clusters.surrogate.svd: {told}" in capsys.readouterr().err
    recipe["stages"][1]["data"]["clusters"]["size"] = 158
    assert start(tmp_path, recipe, monkeypatch) == 2
    told = "stages.1.data.clusters.size: 158 is more than the 157 rows of data.sources.0; lower it"
    assert told in capsys.readouterr().err
