"""Mistakes in data, suites and hub ids are found before anything is trained, in --dry-run too, and all at once."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from beir import write_beir, write_hub_layout
from in_process import start
from pairs import write
from recipe_changes import RECIPES
from tiny_retriever import small_model

from launcher import ahead
from launcher.ahead import look_ahead
from launcher.stages import check_ahead, unfinished
from toolkit.data import hub
from toolkit.data.tokens import tokenize
from toolkit.models.backbone import load_tokenizer
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.schema import load_recipe

PAIRS = [{"anchor": f"q{i}", "positive": f"good {i}", "negative_1": f"bad {i}", "score": i} for i in range(20)]
PLAIN = [{"anchor": f"q{i}", "positive": f"good {i}", "hard_negs": [f"bad {i}"]} for i in range(20)]
TINY = Path(__file__).parent.parent.parent / "recipes" / "tiny" / "contrastive.json"


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """Two contrastive stages on twenty pairs, from a model with its tokenizer in a folder."""
    small_model("llama", tmp_path / "model", "bos")
    path = write(tmp_path / "pairs.jsonl", *PAIRS)
    written = json.loads(TINY.read_text())
    first = written["stages"][1] | {"name": "one", "start": {"folder": str(tmp_path / "model")}, "lora": None}
    first["data"] = {"sources": [{"folder": str(path), "format": "pairs"}], "negatives": 1}
    first["encoder"] = first["encoder"] | {"query_prefix": "query: ", "max_tokens": 8, "eval_max_tokens": 8}
    second = copy.deepcopy(first) | {"name": "two", "start": "previous", "eval": {"suites": []}}
    return written | {"stages": [first, second]}


def loaded(folder: Path, recipe: dict[str, Any]) -> Any:
    path = folder / "r.json"
    path.write_text(json.dumps(recipe))
    return load_recipe(path)


def dry(folder: Path, recipe: dict[str, Any], monkeypatch, capsys) -> tuple[int, list[str], list[str]]:
    capsys.readouterr()
    code = start(folder, recipe, monkeypatch, "--dry-run")
    said = capsys.readouterr()
    assert not (folder / "run").exists()
    return code, said.out.splitlines(), said.err.splitlines()


def test_a_dry_run_shows_columns_rows_epochs_and_a_row_as_tokens(tmp_path: Path, recipe, monkeypatch, capsys) -> None:
    code, said, error = dry(tmp_path, recipe, monkeypatch, capsys)
    path = tmp_path / "pairs.jsonl"
    line = f"data: {path}: query = anchor, positive = positive, negatives = negative_1; not used: score"
    assert (code, error) == (0, []) and said.count(line) == 1
    numbers = {line.strip().split("  ")[0]: line.split("  ")[-1].strip() for line in said if line.startswith("  ")}
    assert numbers["pool"].startswith("8 queries with 1 positive and at most 1 hard negatives each")
    assert numbers["data rows"] == "20 (by counting lines)"
    assert numbers["epochs"].startswith("3.20 ")  # 4 steps of 2 pools of 8 are 64 rows
    tokenizer = load_tokenizer(tmp_path / "model")
    texts = {"query": "query: q0", "positive": "good 0", "negative": "bad 0"}
    for name, text in texts.items():
        kept, whole = (tokenize(tokenizer, [text], "", most, append_eos=True)[0] for most in (8, 100))
        count = f"{len(kept)} tokens" if kept == whole else f"{len(kept)} of {len(whole)} tokens"
        assert numbers[f"example {name}"] == f"{count}: {tokenizer.decode(kept)}"
    assert numbers["example query"].startswith("8 of 10 tokens: <s>") and numbers["example query"].endswith("</s>")


def test_every_mistake_is_one_line_with_its_place(tmp_path: Path, recipe, monkeypatch, capsys) -> None:
    plain = write(tmp_path / "plain.jsonl", *PLAIN)
    collection = write_beir(tmp_path / "small")
    folder = tmp_path / "both"
    folder.mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        write(folder / name, *PAIRS)
    one, two = recipe["stages"]
    one["data"]["sources"][0]["fields"] = {"weight": "w"}
    source = {"folder": str(folder), "format": "pairs"}
    two["data"] = {"sources": [{"folder": str(plain), "format": "pairs"}], "negatives": 2}
    three = two | {"name": "three", "data": {"sources": [source, source | {"split": "dev"}], "mix": "rows"}}
    four = two | {"name": "four", "data": {"sources": [source | {"split": "test", "limit": 21}]}}
    one["eval"]["suites"] = ["NFCorpuss", str(tmp_path / "none"), f"{collection}:train", "quick:nowhere"]
    two["eval"] = {"suites": [str(folder), f"SciFact={tmp_path / 'none'}"]}
    recipe["stages"] = [one, two, three, four]
    code, said, error = dry(tmp_path, recipe, monkeypatch, capsys)
    assert (code, said) == (2, [])
    expected = {
        "stages.0.data.sources.0": "no column 'w'; set fields.weight to one of anchor, positive, negative_1, score",
        "stages.1.data.negatives": "(columns anchor, positive, hard_negs) has any; did you mean fields.negatives",
        "stages.2.data.sources.0": "holds files of several splits (test: test.jsonl; train: train.jsonl); set split to",
        "stages.2.data.sources.1": "has no split 'dev'; set split to test or train",
        "stages.3.data.sources.0": "limit: 21 rows are more than the source's 20; lower or remove it",
        "stages.0.eval.suites.0": "suite NFCorpuss: no folder and no mteb task or benchmark of this name; did you mean",
        "stages.0.eval.suites.1": "no such folder; name a folder with corpus.jsonl, queries.jsonl and qrels/",
        "stages.0.eval.suites.2": f"name one of its splits; found {collection}:dev, {collection}:test",
        "stages.0.eval.suites.3": "suite quick:nowhere: no such folder",
        "stages.1.eval.suites.0": "corpus.jsonl is missing; a BEIR folder has",
        "stages.1.eval.suites.1": "names no folder; write NAME=FOLDER",
    }
    assert [line.split(": ")[0] for line in error] == list(expected)
    for line, told in zip(error, expected.values(), strict=True):
        assert told in line
    with pytest.raises(RecipeError) as caught:  # as the first rank does before the first stage
        check_ahead(loaded(tmp_path, recipe), 1)
    assert str(caught.value).splitlines() == error


@pytest.mark.parametrize("part", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
def test_a_collection_s_first_rows_and_judgements_are_looked_at(tmp_path: Path, recipe, part: str) -> None:
    folder = write_beir(tmp_path / "small")
    recipe["stages"][1]["eval"] = {"suites": [f"{folder}:test", f"quick:{folder}:dev"]}
    assert not look_ahead(loaded(tmp_path, recipe), dry=True).problems
    (folder / part).write_text("query-id\tcorpus-id\tscore\n[1, 2]\n")
    problems = look_ahead(loaded(tmp_path, recipe), dry=True).problems
    assert problems[0].startswith(f"stages.1.eval.suites.0: {folder / part}: line ")


def test_the_hub_s_layout_is_checked_for_its_split(tmp_path: Path, recipe) -> None:
    folder = write_hub_layout(tmp_path / "as_hub", write_beir(tmp_path / "small"))
    recipe["stages"][0]["eval"]["suites"] = [f"{folder}:test", f"{folder}:train"]
    (problem,) = look_ahead(loaded(tmp_path, recipe), dry=True).problems
    assert problem.startswith("stages.0.eval.suites.1: ") and "name one of its splits; found" in problem


def test_a_context_that_is_not_there_is_found(tmp_path: Path) -> None:
    recipe = json.loads((RECIPES / "tiny" / "cde.json").read_text())
    recipe["stages"][1]["eval"] = {"suites": [], "context": {"beside": ["none", str(tmp_path)]}}
    (problem,) = look_ahead(loaded(tmp_path, recipe), dry=True).problems
    assert problem.startswith(f"stages.1.eval.context.from: {tmp_path}/corpus.jsonl does not exist; name corpus, none")
    recipe["stages"][1]["eval"]["context"]["beside"] = ["none", "none"]
    (problem,) = look_ahead(loaded(tmp_path, recipe), dry=True).problems
    assert problem.startswith("stages.1.eval.context.beside: context none is there twice; keep one")


def test_a_prompt_for_no_task_is_found(tmp_path: Path, recipe) -> None:
    recipe["stages"][1]["eval"] = {"suites": [], "prompts": {"Clusterin": "x"}}
    (problem,) = look_ahead(loaded(tmp_path, recipe), dry=True).problems
    assert problem.startswith("stages.1.eval.prompts: Clusterin: no task or type of task of this name; did you mean")


# --------------------------------------------------------------------------- the hub


def on_hub(recipe: dict[str, Any], name: str = "nobody/nothing") -> dict[str, Any]:
    recipe["stages"][0]["data"]["sources"] = [{"hub": name, "format": "pairs"}]
    return recipe


def test_without_the_hub_a_dry_run_says_what_it_did_not_check(tmp_path: Path, recipe, monkeypatch, capsys) -> None:
    recipe = on_hub(recipe)
    recipe["stages"][1]["eval"] = {"suites": ["SciFact", "beir"]}
    code, said, error = dry(tmp_path, recipe, monkeypatch, capsys)
    assert (code, error) == (0, [])
    assert [line for line in said if line.startswith("not checked: ")] == [
        "not checked: stages.0.data.sources.0: hub: nobody/nothing: the hub cannot be reached",
        "not checked: stages.1.eval.suites.0: SciFact: dataset mteb/scifact: the hub cannot be reached",
        "not checked: stages.1.eval.suites.1: beir: 26 datasets, the first of them mteb/trec-covid: the hub cannot be "
        "reached",
    ]
    assert not any("example negative" in line for line in said[: said.index("stage 1 two: contrastive")])
    with pytest.raises(RecipeError) as caught:  # a run would end there
        check_ahead(loaded(tmp_path, recipe), 1)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("stages.0.data.sources.0: dataset nobody/nothing: the hub cannot be reached (")
    assert lines[1].startswith("stages.1.eval.suites.0: dataset mteb/scifact: the hub cannot be reached (")


def test_what_a_finished_or_another_stage_read_may_be_gone(tmp_path: Path, recipe, monkeypatch, capsys) -> None:
    whole = loaded(tmp_path, on_hub(recipe))
    run = tmp_path / "resumed"
    assert [unfinished(whole, run, only) for only in (None, 0, 1)] == [[0, 1], [0], [1]]
    with pytest.raises(RecipeError, match=r"stages.0.data.sources.0: dataset nobody/nothing: the hub cannot be"):
        check_ahead(whole, 1, [0, 1])
    check_ahead(whole, 1, unfinished(whole, run, 1))
    (run / "stage_0_one").mkdir(parents=True)
    (run / "stage_0_one" / "done.json").write_text("{}")
    assert unfinished(whole, run, None) == [1]
    check_ahead(whole, 1, unfinished(whole, run, None))
    capsys.readouterr()
    assert start(tmp_path, recipe, monkeypatch, "--dry-run", "--stage", "1") == 0
    assert "not checked" not in capsys.readouterr().out


def test_a_wrong_id_is_an_error_where_the_hub_answers(tmp_path: Path, recipe, monkeypatch) -> None:
    class DatasetNotFoundError(Exception):
        pass

    def missing(*_: Any, **__: Any) -> Any:
        raise DatasetNotFoundError("not there")

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(ahead, "reachable", lambda: True)
    monkeypatch.setattr("datasets.load_dataset", missing)
    monkeypatch.setattr("datasets.get_dataset_config_names", missing)
    recipe = on_hub(recipe)
    recipe["stages"][1]["eval"] = {"suites": ["SciFact"]}
    problems = look_ahead(loaded(tmp_path, recipe), dry=True).problems
    assert [line.split("; ")[0] for line in problems] == [
        "stages.0.data.sources.0: dataset nobody/nothing: not found on the hub",
        "stages.1.eval.suites.0: dataset mteb/scifact: not found on the hub",
    ]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: iter(PLAIN))  # an endless one would do
    (problem, _) = look_ahead(loaded(tmp_path, on_hub(recipe, "some/pairs")), dry=True).problems
    assert problem.startswith(
        "stages.0.data.negatives: 1 are asked for, but no row of dataset some/pairs, split train ("
    )
    (problem, _) = look_ahead(loaded(tmp_path, on_hub(recipe, "no id")), dry=True).problems
    assert problem.startswith("stages.0.data.sources.0: dataset no id: cannot be loaded (Repo id must")


def test_what_only_mteb_can_tell_ends_no_run(tmp_path: Path, recipe, monkeypatch) -> None:
    """Of tasks that are not searched mteb may load the data in its own ways; of searched ones nobody else does."""

    def odd(*_: Any, **__: Any) -> None:
        raise RuntimeError("scripts are no longer supported")

    monkeypatch.setattr(ahead, "reachable", lambda: True)
    monkeypatch.setattr("datasets.get_dataset_config_names", odd)
    recipe["stages"][0]["eval"] = {"suites": ["Banking77Classification", "SciFact"]}
    for dry_run, place in ((True, "unchecked"), (False, "warnings")):
        found = look_ahead(loaded(tmp_path, recipe), dry_run)
        (told,) = (line for line in getattr(found, place) if "suites.0" in line)
        assert told.startswith("stages.0.eval.suites.0: dataset mteb/banking77: only mteb can tell")
        assert [line.split(": ")[0] for line in found.problems] == ["stages.0.eval.suites.1"]


def test_a_slice_of_a_split_is_looked_at_as_the_split(tmp_path: Path, recipe, monkeypatch) -> None:
    asked = []

    def load(*_: Any, split: str, **__: Any) -> Any:
        asked.append(split)
        return iter(PLAIN)

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(ahead, "reachable", lambda: True)
    monkeypatch.setattr("datasets.load_dataset", load)
    source = {"hub": "some/pairs", "split": "train[10%:20%](pct1_dropremainder)+test", "format": "pairs"}
    recipe["stages"][0]["data"] = {"sources": [source], "negatives": 0}
    assert look_ahead(loaded(tmp_path, recipe), dry=False).problems == [] and set(asked) == {"train+test"}


def test_some_rows_without_negatives_are_a_warning(tmp_path: Path, recipe, monkeypatch, capsys) -> None:
    rows = [row | {"negative_1": None} if i % 4 else row for i, row in enumerate(PAIRS)]
    write(tmp_path / "pairs.jsonl", *rows)
    code, said, error = dry(tmp_path, recipe, monkeypatch, capsys)
    line = "15 of 20 rows looked at (75.0%) have fewer than data.negatives = 1, 15 of them none (at most 1)"
    assert (code, error) == (0, [])
    assert f"warning: stages.0.data.sources.0: {line}; their slots stay empty" in said
