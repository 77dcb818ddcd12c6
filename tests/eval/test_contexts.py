"""Scores with a context: of the collection, of another one, of a file, or none; and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from beir import write_beir
from contextual_retrievers import CASES, make_contextual
from distributed import run_on_ranks
from retrievers import tiny_retriever

from eval.contexts import check_context
from eval.evaluate import evaluate
from eval.run import main
from toolkit.data.beir import read_beir_texts
from toolkit.export.write import load_export
from toolkit.mine import main as mine
from toolkit.models.in_context import read_vectors
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.evaluation import EvalSettings
from toolkit.retrieval.context import draw, embed_context


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("contextual")
    return make_contextual(CASES["bert"], root).write(root / "export")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("collections")
    return write_beir(root / "small"), write_beir(root / "other", num_documents=45)


def settings(**context: Any) -> EvalSettings:
    return EvalSettings.model_validate({"context": context} if context else {})


def scored(export: Path, folder: Path, output: Path, **context: Any) -> dict[str, Any]:
    retriever = load_export(export, torch.device("cpu"))
    evaluate(retriever, [f"{folder}:test"], output, label="x", step=None, changes=settings(**context))
    metrics = json.loads((output / "metrics.json").read_text())
    runs = json.loads((output / "per_query.json").read_text())[f"{folder.name}:test"]["ndcg_at_10"]
    return metrics | {"row": metrics["collections"][f"{folder.name}:test"], "runs": runs}


def test_a_collection_is_read_with_documents_of_its_own_and_the_result_says_so(export: Path, folders, tmp_path, capsys):
    small, other = folders
    found = scored(export, small, tmp_path / "out", **{"from": "corpus"})
    retriever, texts = load_export(export, torch.device("cpu")), list(read_beir_texts(small / "corpus.jsonl").values())
    expected = embed_context(retriever, draw(texts, len(texts), 6, 0), "small:test", 0, len(texts))
    kept = read_vectors(tmp_path / "out" / "context" / "small_test.safetensors", retriever)
    np.testing.assert_allclose(kept.vectors, expected.vectors, atol=1e-6)
    assert kept.about | {"digest": ""} == expected.about | {"digest": ""} and kept.digest == found["row"]["context"]
    about = {"documents": 6, "from": "corpus", "seed": 0, "content": ""}
    assert found["system"]["context"] == about and "context" not in found["system"]["settings"]
    line = f"small:test: context of small:test, 6 documents drawn from 60, digest {kept.digest}"
    assert line in capsys.readouterr().out.splitlines()
    others = {
        "seed": scored(export, small, tmp_path / "seed", **{"from": "corpus", "seed": 1}),
        "folder": scored(export, small, tmp_path / "folder", **{"from": str(other)}),
        "none": scored(export, small, tmp_path / "none", **{"from": "none"}),
    }
    assert others["none"]["runs"] != found["runs"]
    assert len({one["row"].get("context") for one in others.values()} | {kept.digest}) == 4
    assert others["none"]["runs"] == scored(export, small, tmp_path / "plain")["runs"]
    assert len(others["folder"]["system"]["context"]["content"]) == 16
    assert "note: evaluated without context; eval.context (--context) sets one" in capsys.readouterr().out
    again = scored(export, small, tmp_path / "again", **{"from": str(tmp_path / "out/context/small_test.safetensors")})
    assert again["runs"] == found["runs"] and again["row"]["context"] == kept.digest


def test_another_context_in_the_same_folder_is_scored_anew(export: Path, folders, tmp_path: Path, capsys):
    small, _ = folders
    first = scored(export, small, tmp_path, **{"from": "corpus"})
    capsys.readouterr()
    assert scored(export, small, tmp_path, **{"from": "corpus"})["runs"] == first["runs"]
    assert "small:test: scored before (same weights, settings and data)" in capsys.readouterr().out
    second = scored(export, small, tmp_path, **{"from": "corpus", "seed": 1})
    assert "scored before" not in capsys.readouterr().out and second["row"]["context"] != first["row"]["context"]


def test_what_does_not_fit_is_one_line(export: Path, folders, tmp_path: Path):
    small, _ = folders
    cases: list[tuple[dict[str, Any], str]] = [
        ({"documents": 5}, r"eval\.context\.documents: 5, but the model reads 6 context documents; write 6, or leave"),
        ({"from": str(tmp_path)}, r"eval\.context\.from: .*corpus\.jsonl does not exist; name corpus, none, a folder"),
        ({"from": "x.safetensors"}, r"eval\.context\.from: x\.safetensors does not exist"),
        ({"from": str(export / "context.safetensors")}, r"context\.safetensors: holds no context"),
    ]
    for context, problem in cases:
        with pytest.raises(RecipeError, match=problem):
            scored(export, small, tmp_path / "out", **context)
    with pytest.raises(RecipeError, match=r"^eval\.context: the retriever reads no context; leave the key"):
        evaluate(tiny_retriever(), [str(small)], tmp_path / "out", label="", step=None, changes=settings(seed=0))
    with pytest.raises(RecipeError, match=r"eval\.context\.beside: context none is there twice; keep one"):
        check_context(settings(**{"from": "none", "beside": ["none"]}))
    assert not (tmp_path / "out").exists()


def test_the_command_sets_contexts_side_by_side_and_compares_them(export: Path, folders, tmp_path: Path, capsys):
    small, other = folders
    given = [str(export), "--suite", f"{small}:test", "--output", str(tmp_path / "out"), "--no-bm25"]
    assert main([*given, "--context", "corpus", "--context", "none", "--context", str(other)]) == 0
    said = capsys.readouterr().out
    for name in ("", "context none", "context other"):
        folder = tmp_path / f"out{'_' * bool(name)}{name.replace(' ', '_')}"
        assert json.loads((folder / "metrics.json").read_text())["label"] == f"{export}{', ' * bool(name)}{name}"
        assert not name or f"out_{name.replace(' ', '_')}" in said.replace("\n", "")  # compared with it
    assert main([*given, "--context-seed", "1"]) == 2
    assert "--context-seed: draws a context; add --context, or leave it out" in capsys.readouterr().err
    assert main(["bm25", *given[1:-1], "--context", "none"]) == 2
    assert "drop their flags" in capsys.readouterr().err


def test_two_ranks_read_with_one_context(export: Path, folders, tmp_path: Path):
    small, _ = folders
    answers = run_on_ranks("evaluate_ranks.py", 2, [f"{small}:test", str(tmp_path), str(export)], tmp_path)
    assert answers[0] == answers[1]
    alone = scored(export, small, tmp_path / "alone", **{"from": "corpus"})
    kept = (tmp_path / name / "context" / "small_test.safetensors" for name in ("read", "alone"))
    one, two = (read_vectors(path, load_export(export, torch.device("cpu"))) for path in kept)
    np.testing.assert_allclose(one.vectors, two.vectors, atol=1e-6)
    assert answers[0][2]["small:test"]["ndcg_at_10"] == pytest.approx(alone["row"]["ndcg_at_10"])


def test_an_adapter_of_two_stages_is_named_alone(tmp_path: Path, capsys):
    made = make_contextual(CASES["llama_adapters"], tmp_path)
    export = made.write(tmp_path / "export")
    given = ["--suite", "stdlib:dev", "--no-bm25", "--pooling", "eos", "--normalize", "true", "--max-tokens", "9"]
    assert main([str(made.base.folder), "--adapter", str(export), *given]) == 2
    assert "reads texts with a context, which --adapter would lose; name it in place of" in capsys.readouterr().err


def test_mining_reads_with_passages_of_the_pairs(export: Path, folders, tmp_path: Path):
    small, _ = folders
    given = ["--pairs", str(small), "--split", "test", "--output", str(tmp_path / "mined"), "--seed", "3"]
    assert mine([str(export), *given, "--ranks", "1", "5", "--negatives", "2"]) == 0
    about = json.loads((tmp_path / "mined" / "mined.json").read_text())["by"]["context"]
    assert about == about | {"documents": 6, "seed": 3, "of": str(small)} and about["drawn_from"] > 6
