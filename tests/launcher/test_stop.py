"""eval.stop_if_worse: which drop stops a run, what is left then, and how a user goes on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from beir import write_beir
from distributed import launch
from in_process import one_stage, start
from recipe_changes import RECIPES

from eval.significance import compare
from launcher.stop import check_stops, reason_to_stop
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.schema import Recipe, recipe_type
from toolkit.training import loop

QUERIES = 40


def write_scores(folder: Path, scores: dict[str, np.ndarray]) -> None:
    """A result, as eval.run leaves it."""
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    same = {"main_score": "ndcg_at_10", "documents": 9, "queries": QUERIES, "revision": "r"}
    same |= {"ignore_identical_ids": False}
    rows = {name: same | {"ndcg_at_10": float(values.mean())} for name, values in scores.items()}
    per_query = {name: {"ndcg_at_10": dict(enumerate(values.tolist()))} for name, values in scores.items()}
    (folder / "eval" / "metrics.json").write_text(json.dumps({"collections": rows}))
    (folder / "eval" / "per_query.json").write_text(json.dumps(per_query))


def changed(base: dict[str, np.ndarray], **gains: float) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(1).normal(0, 0.05, QUERIES)
    noise -= noise.mean()
    return {name: values + gains.get(name, 0.0) + noise for name, values in base.items()}


BASE = {name: np.random.default_rng(0).uniform(0.3, 0.6, QUERIES) for name in ("a", "b", "c")}


def recipe_with(than: str, by: float = 0.0) -> Recipe:
    raw = json.loads((RECIPES / "quickstart.json").read_text())
    raw["stages"][1]["eval"]["stop_if_worse"] = {"than": than, "by": by}
    return recipe_type().model_validate(raw)


@pytest.mark.parametrize(
    ("than", "folder", "label"),
    [
        ("bm25", "bm25", "BM25"),
        ("start", "start", "its start (untrained)"),
        ("previous", "stage_0_language_model", "stage 0 language_model"),
    ],
)
def test_it_is_compared_with_the_system_named(than: str, folder: str, label: str, tmp_path: Path) -> None:
    stage = tmp_path / "stage_1_revela"
    for name in ("bm25", "start", "stage_0_language_model"):
        write_scores(tmp_path / name, changed(BASE, a=-0.3, b=-0.3, c=-0.3))
    write_scores(tmp_path / folder, BASE)
    write_scores(stage, changed(BASE, b=-0.06, c=0.2))
    assert reason_to_stop(recipe_with(than), 1, tmp_path) == ""  # not finished
    (stage / "done.json").write_text("{}")
    reason = reason_to_stop(recipe_with(than), 1, tmp_path)
    assert reason.startswith(f"stage 1 revela is worse than {label} on b: nDCG@10 ") and "\n" not in reason
    assert reason.endswith("; the run stops here, to go on: --set stages.1.eval.stop_if_worse=null")
    assert "-0.0600 [" in reason and "p < 0.001 after Holm over 3 collections" in reason
    assert reason == reason_to_stop(recipe_with(than), 1, tmp_path)
    assert reason_to_stop(recipe_with(than), 0, tmp_path) == ""
    for other in {"bm25", "start", "previous"} - {than}:
        assert reason_to_stop(recipe_with(other), 1, tmp_path) == ""


def test_what_counts_as_worse(tmp_path: Path) -> None:
    """A drop within `by`, one that may be chance, and one that is clear only before the correction all pass."""
    stage = tmp_path / "stage_1_revela"
    write_scores(tmp_path / "bm25", BASE)
    stage.mkdir()
    (stage / "done.json").write_text("{}")

    def stops(by: float, **gains: float) -> bool:
        write_scores(stage, changed(BASE, **gains))
        return reason_to_stop(recipe_with("bm25", by), 1, tmp_path) != ""

    assert stops(0.0, a=-0.05) and stops(0.04, a=-0.05) and not stops(0.06, a=-0.05)
    assert not stops(0.0, a=0.05, b=0.05) and not stops(0.0, a=-0.005)
    drop = next(-d / 1000 for d in range(5, 40) if eval_p(changed(BASE, a=-d / 1000)) < 0.045)
    assert eval_p(changed(BASE, a=drop)) > 0.05 / 3 and not stops(0.0, a=drop)
    both = reason_after(stage, tmp_path, a=-0.05, b=-0.1)
    assert "on b: " in both and ", and on 1 more;" in both


def eval_p(scores: dict[str, np.ndarray]) -> float:
    return compare(BASE["a"], scores["a"], seed=0).p_value


def reason_after(stage: Path, run: Path, **gains: float) -> str:
    write_scores(stage, changed(BASE, **gains))
    return reason_to_stop(recipe_with("bm25"), 1, run)


def test_a_bm25_that_finds_nothing_is_no_silent_bar(tmp_path: Path, capsys) -> None:
    """No stage is worse than nothing: the run goes on, and says again what its comparison is worth."""
    stage, metrics = tmp_path / "stage_1_revela", tmp_path / "bm25" / "eval" / "metrics.json"
    write_scores(tmp_path / "bm25", {name: values * 0 for name, values in BASE.items()})
    assert reason_after(stage, tmp_path) == ""
    (stage / "done.json").write_text("{}")
    for lost, warned in ((QUERIES // 2, []), (QUERIES // 2 + 1, ["b"])):
        written = json.loads(metrics.read_text())
        for name, without in (("a", 3), ("b", lost)):
            written["collections"][name] |= {"bm25_language": "english", "queries_without_documents": without}
        metrics.write_text(json.dumps(written))
        assert reason_after(stage, tmp_path) == ""
        said = capsys.readouterr().err.splitlines()
        assert [line.startswith("warning: BM25 finds nothing for 21 of 40 queries of b: ") for line in said] == [
            True for _ in warned
        ]


def test_nothing_to_compare_is_an_error(tmp_path: Path) -> None:
    write_scores(tmp_path / "bm25", {"other": BASE["a"]})
    write_scores(tmp_path / "stage_1_revela", BASE)
    (tmp_path / "stage_1_revela" / "done.json").write_text("{}")
    with pytest.raises(ValueError, match="stage 1 revela and BM25 have no collection of two queries in common"):
        reason_to_stop(recipe_with("bm25"), 1, tmp_path)


def test_a_start_that_is_not_scored_is_refused() -> None:
    raw = json.loads((RECIPES / "fewshot.json").read_text())
    raw["stages"][1]["eval"]["stop_if_worse"] = {"than": "start"}
    check_stops(recipe_type().model_validate(raw))
    raw["stages"][1]["start"] = {"folder": "elsewhere"}
    with pytest.raises(RecipeError, match=r"^stages.1.eval.stop_if_worse.than: the model that this stage starts from"):
        check_stops(recipe_type().model_validate(raw))


@pytest.fixture
def worse(tmp_path: Path) -> dict[str, Any]:
    """Two stages of one step; the first stops the run if it is worse than BM25."""
    suite = str(write_beir(tmp_path / "small", num_queries=40))
    recipe = one_stage(tmp_path, ("stages.0.eval", {"suites": [suite], "stop_if_worse": {"than": "bm25"}}))
    first = recipe["stages"][0]
    recipe["stages"].append(first | {"name": "again", "eval": {"suites": [suite]}})
    return recipe


def test_a_run_that_stops_and_goes_on(worse, tmp_path: Path, monkeypatch, capsys) -> None:
    """Exit code 3 and one line after export, scores and report; the same again; --set goes on, --stage does not."""
    monkeypatch.setattr(loop, "check_export", lambda *_: {})
    run, last = tmp_path / "run", "stage_1_again"
    assert start(tmp_path, worse, monkeypatch) == 3
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("stage 0 language_model is worse than BM25 on small:test: nDCG@10 ")
    for name in ("export/model.safetensors", "eval/metrics.json", "done.json"):
        assert (run / "stage_0_language_model" / name).is_file()
    report = (run / "report.md").read_text()
    assert f"> **Stopped.** {said}" in report and "0 language_model" in report and not (run / last).exists()
    for options in ((), ("--stage", "1"), ("--stage", "0")):
        assert start(tmp_path, worse, monkeypatch, *options) == 3
        assert capsys.readouterr().err.strip().splitlines()[-1] == said and not (run / last).exists()
    go_on = ("--set", "stages.0.eval.stop_if_worse=null")
    assert start(tmp_path, worse, monkeypatch, *go_on) == 0
    assert (run / last / "done.json").is_file() and "Stopped" not in (run / "report.md").read_text()
    assert start(tmp_path, worse, monkeypatch, *go_on, "--set", "stages.0.optim.lr=0.5") == 2
    assert "was made by a different recipe (stages.0.optim.lr" in capsys.readouterr().err


def test_a_stage_that_is_no_worse_lets_the_run_go_on(worse, tmp_path: Path, monkeypatch) -> None:
    """Also after the last stage the rule holds: there it decides the exit code."""
    monkeypatch.setattr(loop, "check_export", lambda *_: {})
    worse["stages"][0]["eval"]["stop_if_worse"]["by"] = 1.0
    worse["stages"][1]["eval"]["stop_if_worse"] = {"than": "bm25"}
    assert start(tmp_path, worse, monkeypatch) == 3
    assert (tmp_path / "run" / "stage_1_again" / "done.json").is_file()


@pytest.mark.full
def test_under_deepspeed_the_line_is_said_once_and_the_code_comes_through(worse, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(worse))
    output = ["--output", str(tmp_path / "run")]
    done = launch("launcher/run.py", 2, str(tmp_path / "recipe.json"), *output, timeout=500)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "is worse than BM25" in line]
    assert done.returncode == 3, (done.stdout + done.stderr)[-3000:]
    assert len(said) == 1 and said[0].startswith("stage 0 language_model is worse") and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "stage_1_again").exists()
