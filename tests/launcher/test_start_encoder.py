"""A run that leaves its encoder section to the model it starts from: trained, exported and scored as that model is."""

import json
from pathlib import Path

import pytest
from beir import write_beir
from in_process import start
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tiny_retriever import small_model

from eval.run import main
from toolkit.export.write import read_settings

RECIPES = Path(__file__).parent.parent.parent / "recipes"


@pytest.mark.parametrize(
    ("kind", "tokenizer"),
    [("bert", "wordpiece"), ("t5", "t5"), pytest.param("nomic_bert", "wordpiece", marks=pytest.mark.full)],
)
def test_the_start_scores_as_the_model_itself(
    kind: str, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    base = small_model(kind, tmp_path / "base", tokenizer)
    model = SentenceTransformer(
        modules=[Transformer(str(base), max_seq_length=24), Pooling(32, "mean"), Normalize()],
        prompts={"query": "find: ", "document": "text: "},
        device="cpu",
    )
    model.save(str(tmp_path / "model"))
    suite = str(write_beir(tmp_path / "small"))
    pairs = [json.dumps({"query": f"w{i}", "positive": f"w{i} w{i + 1}"}) for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(pairs) + "\n")
    recipe = json.loads((RECIPES / "tiny" / "contrastive.json").read_text())
    stage = recipe["stages"][1] | {"name": "one", "start": {"folder": str(tmp_path / "model")}, "lora": None}
    del stage["encoder"]
    stage["data"] = {"sources": [{"folder": str(tmp_path / "pairs.jsonl"), "format": "pairs"}]}
    stage["batch"] = {"pool": 4, "span": "rank", "pools_per_step": 1}
    stage["optim"] |= {"steps": 1, "warmup_steps": 0}
    stage |= {"eval": {"suites": [suite]}, "precision": "fp32"}
    recipe["stages"] = [stage, stage | {"name": "two", "start": "previous", "encoder": {"pooling": "cls"}}]
    assert start(tmp_path, recipe, monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "  encoder.pooling                mean (1_Pooling/config.json)\n" in printed
    line = "note: stages.1.encoder.pooling is cls; the stage before was trained with mean (stages.0.encoder)"
    assert printed.count(line) == 1
    assert main([str(tmp_path / "model"), "--suite", suite, "--output", str(tmp_path / "own"), "--no-bm25"]) == 0
    own, first = (json.loads((tmp_path / at / "per_query.json").read_text()) for at in ("own", "run/start/eval"))
    assert first["small:test"]["ndcg_at_10"] == own["small:test"]["ndcg_at_10"]
    assert set(own["small:test"]["ndcg_at_10"].values()) != {0.0}
    wanted = {
        "pooling": "mean", "normalize": True, "append_eos": None, "query_prefix": "find: ", "passage_prefix": "text: ",
        "max_tokens": 24, "eval_max_tokens": 24,
    }  # fmt: skip
    written = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert [one["encoder"] for one in written["stages"]] == [wanted, wanted | {"pooling": "cls"}]
    exported = read_settings(tmp_path / "run" / "stage_1_two" / "export").model_dump(exclude_none=True)
    assert exported == {key: value for key, value in (wanted | {"pooling": "cls"}).items() if value is not None}
    assert start(tmp_path, recipe, monkeypatch) == 0  # nothing to do
    assert line not in capsys.readouterr().out
    pooling = tmp_path / "model" / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps(json.loads(pooling.read_text()) | {"pooling_mode": "lasttoken"}))
    assert start(tmp_path, recipe, monkeypatch) == 2  # as if the recipe had said so
    assert (
        'was made by a different recipe (stages.0.encoder.pooling: "mean" there, "eos" here)' in capsys.readouterr().err
    )
