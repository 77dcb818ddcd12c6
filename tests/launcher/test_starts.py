"""The models before training: which are evaluated, once, under which name, and what is compared with them."""

import json
from pathlib import Path
from typing import Any

import pytest
from beir import write_beir
from in_process import one_stage, start
from recipe_changes import RECIPES

from launcher import stages, starts
from launcher.starts import origin, start_label, with_suites
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.schema import Recipe, load_recipe, recipe_type
from toolkit.training import loop


@pytest.mark.parametrize(
    ("name", "origins", "labels"),
    [
        ("quickstart", [0, 0, 2, 2], {0: "untrained", 2: "untrained (stage 2)"}),
        ("crops_compared", [0, 0, 0], {0: "untrained"}),
        ("fewshot", [0, 0, 0], {0: "before training"}),
        ("sycl_compared", [0, 0, 0, 0], {0: "before training"}),
        ("cde_compared", [0, 0, 0, 0], {0: "before training"}),
        ("revela_7b", [0], {0: "before training"}),
    ],
)
def test_stages_go_back_to_these_starts(name: str, origins: list[int], labels: dict[int, str]) -> None:
    recipe = load_recipe(RECIPES / f"{name}.json")
    assert [origin(recipe, index) for index in range(len(recipe.stages))] == origins
    assert {first: start_label(recipe, first) for first in origins} == labels


@pytest.mark.parametrize("key", ["start", "data", "encoder", "precision"])
def test_a_build_that_differs_is_another_start(key: str) -> None:
    raw = json.loads((RECIPES / "crops_compared.json").read_text())
    part: Any = raw["stages"][1]
    changes = {"start": ("layers", 2), "data": ("delete", 0.2), "encoder": ("pooling", "eos")}
    if key == "precision":
        part[key] = "bf16"
    else:
        part = {"start": lambda: part["start"]["build"], "data": lambda: part["data"]["crops"]}.get(
            key, lambda: part["encoder"]
        )()
        name, value = changes[key]
        assert part[name] != value
        part[name] = value
    assert [origin(recipe_type().model_validate(raw), index) for index in range(3)] == [0, 1, 0]


def test_a_prompt_for_no_task_is_told_before_the_first_stage() -> None:
    raw = json.loads((RECIPES / "fewshot.json").read_text())
    raw["stages"][1]["eval"]["prompts"] = {"Retrieval": "query: "}
    with_suites(recipe_type().model_validate(raw))
    raw["stages"][1]["eval"]["prompts"] = {"Retrieva": "query: "}
    with pytest.raises(RecipeError, match="prompts: Retrieva: no task or type of task of this name; did you mean Retr"):
        with_suites(recipe_type().model_validate(raw))


def test_a_later_model_that_is_not_built_has_no_row() -> None:
    raw = json.loads((RECIPES / "fewshot.json").read_text())
    raw["stages"][1]["start"] = {"folder": "elsewhere"}
    assert [origin(recipe_type().model_validate(raw), index) for index in range(3)] == [0, None, 0]


@pytest.fixture
def two_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Three stages of one step: a build, the same build again, a wider one; the check of the exports is left out."""
    monkeypatch.setattr(loop, "check_export", lambda *_: {})
    recipe = one_stage(tmp_path, ("stages.0.eval.suites", [str(write_beir(tmp_path / "small"))]))
    first = recipe["stages"][0]
    wider = json.loads(json.dumps(first))
    wider["start"]["build"]["hidden_size"] = 64
    recipe["stages"] = [first, first | {"name": "again"}, wider | {"name": "wider"}]
    return recipe


def test_every_build_is_evaluated_once_before_its_stage(two_builds, tmp_path, monkeypatch) -> None:
    """Also if the run is interrupted in the last stage: the starts and BM25 are not evaluated again."""
    evaluated: list[str] = []
    dense, lexical, train = stages.evaluate, starts.evaluate_bm25, stages.train_stage

    def evaluate(*arguments: Any, label: str, step: int, **settings: Any) -> Any:
        evaluated.append(f"{label} at {step}")
        return dense(*arguments, label=label, step=step, **settings)

    def evaluate_bm25(*arguments: Any) -> Any:
        evaluated.append("BM25")
        return lexical(*arguments)

    def interrupted(recipe: Recipe, index: int, *more: Any) -> Any:
        if index == 2:
            raise ValueError("interrupted")
        return train(recipe, index, *more)

    for module in (starts, stages):
        monkeypatch.setattr(module, "evaluate", evaluate)
    monkeypatch.setattr(starts, "evaluate_bm25", evaluate_bm25)
    monkeypatch.setattr(stages, "train_stage", interrupted)
    assert start(tmp_path, two_builds, monkeypatch) == 2
    assert evaluated == ["BM25", "untrained at 0", "language_model at 1", "again at 2", "untrained (stage 2) at 2"]
    monkeypatch.setattr(stages, "train_stage", train)
    for expected in (["wider at 3"], []):
        evaluated.clear()
        assert start(tmp_path, two_builds, monkeypatch) == 0 and evaluated == expected
    lines = (tmp_path / "run" / "report.md").read_text().splitlines()
    table = next(line for line in lines if line.startswith("| collection"))
    systems = [cell.strip() for cell in table.split("|")[4:-1]]
    assert systems == ["BM25", "untrained", "0 language_model", "1 again", "untrained (stage 2)", "2 wider"]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines if line.startswith("| ")]
    compared = [row[0] for row in rows if row[0] in systems and row[1] == "small:test"]
    assert compared == [
        *("BM25", "untrained"),
        *("BM25", "untrained", "0 language_model"),
        *("BM25", "untrained (stage 2)", "1 again"),
    ]
    for stage, folder in (("stage_1_again", "start"), ("stage_2_wider", "start_2")):
        card = (tmp_path / "run" / stage / "export" / "README.md").read_text()
        row = next(line for line in card.splitlines() if "before training" in line)
        scores = json.loads((tmp_path / "run" / folder / "done.json").read_text())["scores"]["small:test"]
        assert f"{scores['ndcg_at_10']:.4f}" in row


def test_a_start_is_evaluated_again_only_if_it_changed(two_builds, tmp_path, monkeypatch) -> None:
    """Before its stage has begun: another learning rate keeps its scores, another width does not."""

    def fail(*_: Any) -> Any:
        raise ValueError("not now")

    monkeypatch.setattr(stages, "train_stage", fail)
    done = tmp_path / "run" / "start" / "done.json"
    assert start(tmp_path, two_builds, monkeypatch) == 2
    written = done.stat().st_mtime_ns
    two_builds["stages"][0]["optim"]["lr"] = 0.5
    assert start(tmp_path, two_builds, monkeypatch) == 2 and done.stat().st_mtime_ns == written
    two_builds["stages"][0]["start"]["build"]["hidden_size"] = 64
    assert start(tmp_path, two_builds, monkeypatch) == 2 and done.stat().st_mtime_ns > written


@pytest.mark.parametrize("split", ["", ":test"])
def test_no_score_is_kept_once_the_collection_changed(split: str, two_builds, tmp_path, monkeypatch) -> None:
    """Neither the start's nor BM25's; the suites `quick` and `stage` stand for the folder that the recipe names."""

    def fail(*_: Any) -> Any:
        raise ValueError("not now")

    monkeypatch.setattr(stages, "train_stage", fail)
    (folder,) = two_builds["stages"][0]["eval"]["suites"]
    two_builds["stages"] = [two_builds["stages"][0], two_builds["stages"][1]]
    two_builds["stages"][0]["eval"] = {"suites": ["quick"], "normalize": False}
    two_builds["stages"][1]["eval"] = {"suites": [folder + split], "normalize": False}
    scores = []
    for text in ("", "", "\n"):
        qrels = Path(folder) / "qrels" / "test.tsv"
        if text:  # the same ids, other grades
            qrels.write_text(qrels.read_text().replace("\t2\n", "\t0\n"))
        assert start(tmp_path, two_builds, monkeypatch) == 2
        found = [
            json.loads((tmp_path / "run" / name / "eval" / "metrics.json").read_text()) for name in ("bm25", "start")
        ]
        assert [list(metrics["collections"]) for metrics in found] == [["quick:small:test", "small:test"]] * 2
        assert found[1]["system"]["settings"]["normalize"] is False
        times = [(tmp_path / "run" / name / "done.json").stat().st_mtime_ns for name in ("bm25", "start")]
        scores.append((times, [metrics["collections"]["small:test"]["recall_at_100"] for metrics in found]))
    assert scores[0] == scores[1]
    for before, after in zip(*(scores[run][0] for run in (1, 2)), strict=True):
        assert before < after
    assert scores[1][1][0] != scores[2][1][0]


def test_a_finished_stage_is_scored_again_once_its_data_changed(two_builds, tmp_path, monkeypatch) -> None:
    """And its start and BM25: all of them can be compared again. Nothing is trained; also if another stage is asked."""
    (folder,) = two_builds["stages"][0]["eval"]["suites"]
    two_builds["stages"] = [stage | {"eval": {"suites": [f"{folder}:test"]}} for stage in two_builds["stages"][:2]]
    done = [tmp_path / "run" / name / "done.json" for name in ("stage_0_language_model", "stage_1_again")]
    evaluated: list[str] = []
    dense = stages.evaluate

    def evaluate(*arguments: Any, label: str, **settings: Any) -> Any:
        evaluated.append(label)
        return dense(*arguments, label=label, **settings)

    for module in (starts, stages):
        monkeypatch.setattr(module, "evaluate", evaluate)
    assert start(tmp_path, two_builds, monkeypatch) == 0
    monkeypatch.setattr(stages, "train_stage", lambda *_: int("trained again"))
    before = [json.loads(path.read_text()) for path in done]
    qrels = Path(folder) / "qrels" / "test.tsv"
    qrels.write_text(qrels.read_text().replace("\t2\n", "\t0\n"))  # the same ids, other grades
    for options, expected in ((("--stage", "1"), ["untrained", "language_model", "again"]), ((), [])):
        evaluated.clear()
        assert start(tmp_path, two_builds, monkeypatch, *options) == 0 and evaluated == expected
    after = [json.loads(path.read_text()) for path in done]
    for old, new in zip(before, after, strict=True):
        assert old["data"] != new["data"] and old["scores"]["small:test"] != new["scores"]["small:test"]
        assert old == new | {key: old[key] for key in ("data", "scores")}
    done[0].write_text(json.dumps({key: value for key, value in after[0].items() if key != "data"}))  # of an older run
    evaluated.clear()
    assert start(tmp_path, two_builds, monkeypatch) == 0 and evaluated == ["language_model"]
    assert json.loads(done[0].read_text()) == after[0]


def test_the_scores_of_a_start_whose_data_changed_are_made_again(
    two_builds: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another text makes another tokenizer, so another model; the recipe is the same."""
    two_builds["stages"] = two_builds["stages"][:1]
    record = tmp_path / "run" / "start" / "done.json"
    with monkeypatch.context() as before_training:
        before_training.setattr(stages, "train_stage", lambda *_: int("stopped"))
        assert start(tmp_path, two_builds, monkeypatch) == 2
        before = json.loads(record.read_text())
        assert start(tmp_path, two_builds, monkeypatch) == 2
        assert json.loads(record.read_text()) == before
        (tmp_path / "data" / "more.jsonl").write_text(json.dumps({"text": "one more\ndocument"}) + "\n")
        assert start(tmp_path, two_builds, monkeypatch) == 2
        after = json.loads(record.read_text())
    assert after["of"] == before["of"] and after["model"] != before["model"]
