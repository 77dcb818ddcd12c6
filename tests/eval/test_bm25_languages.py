"""BM25 on collections in many languages: detected, named, written down; what finds nothing is said."""

import json
from pathlib import Path

import pytest
from beir import write_beir
from distributed import run_on_ranks
from languages import QUERIES, SENTENCES, write_language
from recipe_changes import changed

from eval.evaluate import evaluate_bm25
from eval.run import main
from launcher.starts import bm25_is_scored, score_bm25
from toolkit.recipe.evaluation import EvalSettings
from toolkit.recipe.schema import recipe_type

WARNING = "warning: BM25 finds nothing for "


def read(output: Path) -> dict:
    return json.loads((output / "metrics.json").read_text())


def noted(output: Path, key: str) -> dict:
    """What the records of all collections say under a key."""
    return {name: about[key] for name, about in read(output)["collections"].items()}


@pytest.mark.parametrize("name", sorted(QUERIES))
def test_what_a_query_asks_for_is_found(name: str, tmp_path: Path, capsys):
    """Every query's sentence comes first; read as English (control) few or none are found."""
    folder, expected = write_language(tmp_path / name, name), SENTENCES[name][0]
    assert evaluate_bm25([str(folder)], tmp_path / "out")[f"{name}:test"]["ndcg_at_10"] == 1.0
    assert noted(tmp_path / "out", "bm25_language") == {f"{name}:test": expected}
    assert noted(tmp_path / "out", "queries_without_documents") == {f"{name}:test": 0}
    said = capsys.readouterr()
    assert said.out.startswith(f"BM25 reads {name}:test as {expected}, ") and said.err == ""
    arguments = ["bm25", "--suite", str(folder), "--output", str(tmp_path / "as_english"), "--bm25-language", "english"]
    assert main(arguments) == 0
    control, said = read(tmp_path / "as_english")["collections"][f"{name}:test"], capsys.readouterr()
    assert control["bm25_language"] == "english" and "BM25 reads" not in said.out
    score, lost = control["ndcg_at_10"], control["queries_without_documents"]
    assert score == 0 if name in ("chinese", "japanese", "korean") else score < 0.8
    assert lost == 4 if score == 0 else lost > 0
    expected_line = f"{WARNING}{lost} of 4 queries of {name}:test: read as english they share no word with a document; "
    assert said.err.startswith(expected_line) if lost > 2 else said.err == ""
    assert said.err.count("\n") == (lost > 2)


def test_each_collection_has_its_own_language_and_index(tmp_path: Path, capsys):
    suites = [str(write_language(tmp_path / name, name)) for name in ("thai", "german")]
    suites.append(str(write_beir(tmp_path / "small")))
    cache, languages = tmp_path / "cache", {"thai:test": "ngrams", "german:test": "german", "small:test": "english"}
    first = evaluate_bm25(suites, tmp_path / "out", cache=cache)
    assert noted(tmp_path / "out", "bm25_language") == languages
    assert len(list(cache.iterdir())) == 3
    assert evaluate_bm25(suites, tmp_path / "again", cache=cache) == first
    assert len(list(cache.iterdir())) == 3
    named = EvalSettings.model_validate({"bm25_language": "none"})
    other = evaluate_bm25(suites, tmp_path / "none", named, cache)
    assert len(list(cache.iterdir())) == 6 and other["german:test"] != first["german:test"]
    assert evaluate_bm25(suites, tmp_path / "none_uncached", named) == other
    capsys.readouterr()


def test_code_has_no_language(tmp_path: Path, capsys):
    folder = write_language(tmp_path / "chinese", "chinese")
    arguments = ["bm25", "--suite", str(folder), "--bm25-text", "code", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0 and noted(tmp_path / "out", "bm25_language") == {"chinese:test": None}
    assert "BM25 reads" not in capsys.readouterr().out
    assert read(tmp_path / "out")["collections"]["chinese:test"]["ndcg_at_10"] == 1.0  # in pairs of characters too
    assert main([*arguments, "--bm25-language", "ngrams"]) == 2
    assert capsys.readouterr().err.startswith("error: --bm25-language: code is read without a language; ")


def test_flags_that_nothing_reads_or_knows_are_refused(tmp_path: Path, capsys):
    suite = ["--suite", str(write_beir(tmp_path / "small")), "--output", str(tmp_path / "out")]
    for given, problem in (
        (
            ["bm25", "--bm25-language", "klingon"],
            "error: --bm25-language: Input should be 'none', 'ngrams', 'arabic', ",
        ),
        (["any", "--no-bm25", "--bm25-language", "german"], "error: --no-bm25: nothing reads --bm25-text and --bm25-"),
        (["any", "--no-bm25", "--bm25-text", "prose"], "error: --no-bm25: nothing reads --bm25-text and --bm25-lang"),
    ):
        assert main([*given, *suite]) == 2
        error = capsys.readouterr().err
        assert error.startswith(problem) and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_scores_bm25_anew_for_another_language(tmp_path: Path, capsys):
    folder, run = write_language(tmp_path / "japanese", "japanese"), tmp_path / "runs" / "one"

    def scored(language: str | None) -> dict:
        raw = changed(("stages.0.eval", {"suites": [str(folder)], "bm25_language": language}))
        raw["stages"] = raw["stages"][:1]
        recipe = recipe_type().model_validate(raw)
        score_bm25(recipe, run)
        assert bm25_is_scored(recipe, run)
        return read(run / "bm25" / "eval")

    assert scored(None)["collections"]["japanese:test"]["ndcg_at_10"] == 1.0
    assert capsys.readouterr().out.count("BM25 reads japanese:test as ngrams") == 1
    scored(None)
    assert capsys.readouterr().out == ""  # found
    found = scored("english")
    assert found["collections"]["japanese:test"]["bm25_language"] == "english"
    assert found["collections"]["japanese:test"]["ndcg_at_10"] == 0.0 and WARNING in capsys.readouterr().err


def test_two_ranks_count_and_say_the_same_once(tmp_path: Path, capfd):
    folder = write_language(tmp_path / "thai", "thai")
    evaluate_bm25([str(folder)], tmp_path / "one")
    capfd.readouterr()
    request = {"suite": str(folder), "output": str(tmp_path / "two")}
    both = run_on_ranks("bm25_ranks.py", 2, request, tmp_path, timeout=120)
    assert both[0] == both[1]
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert one["system"] == two["system"] and json.loads(both[0][0]) == {
        "thai:test": {key: one["collections"]["thai:test"][key] for key in ("ndcg_at_10", "recall_at_100", "mrr_at_10")}
    }
