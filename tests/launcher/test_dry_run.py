"""--dry-run of every shipped recipe, on folders that hold a config.json of the true shapes and a tokenizer alike."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recipe_changes import RECIPES, write
from tiny_retriever import CASES, make, small_tokenizer
from transformers import AutoConfig

from launcher import run as launcher
from launcher.stages import check_ahead
from toolkit.data.tokens import frame
from toolkit.models.backbone import load_tokenizer
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.models import HubStart
from toolkit.recipe.schema import load_recipe

ALL = sorted(RECIPES.rglob("*.json"))
RANKS = 2
LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0}
SHAPES = {
    "Qwen/Qwen2.5-0.5B": ("qwen2", {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }),
    "meta-llama/Llama-3.2-1B": ("llama", LLAMA_3 | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "head_dim": 64, "tie_word_embeddings": True,
    }),
    "meta-llama/Llama-3.2-3B": ("llama", LLAMA_3 | {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "head_dim": 128, "tie_word_embeddings": True,
    }),
    "mistralai/Mistral-7B-v0.1": ("mistral", {"sliding_window": 4096}),
    "Qwen/Qwen3-0.6B-Base": ("qwen3", {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    }),
    "google-bert/bert-base-uncased": ("bert", {}),
    "facebook/contriever": ("bert", {"architectures": ["Contriever"]}),
    "nomic-ai/nomic-bert-2048": ("nomic_bert", {}),
    "answerdotai/ModernBERT-base": ("modernbert", {}),
}  # fmt: skip
# The special ids that each type's tokenizer puts around a text, as a style of small_tokenizer.
TOKENIZERS = {
    "qwen2": "gpt2",
    "qwen3": "gpt2",
    "llama": "bos",
    "mistral": "bos",
    "bert": "wordpiece",
    "nomic_bert": "wordpiece",
    "modernbert": "wordpiece",
}
# Published sizes without the output head (for tied models the head is the embedding) and without BERT's pooling layer.
PARAMETERS = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "mistralai/Mistral-7B-v0.1": 7_110_660_096,
    "Qwen/Qwen3-0.6B-Base": 596_049_920,
    "google-bert/bert-base-uncased": 109_482_240 - (768 + 1) * 768,
    "facebook/contriever": 109_482_240 - (768 + 1) * 768,
    "nomic-ai/nomic-bert-2048": 136_731_648,
    "answerdotai/ModernBERT-base": 149_014_272,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, (kind, shape) in SHAPES.items():
        made[name] = tmp_path_factory.mktemp(kind) / name.split("/")[1]
        AutoConfig.for_model(kind, **shape).save_pretrained(made[name])
        small_tokenizer(TOKENIZERS[kind]).save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def here(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], dict[str, Any]]:
    """A recipe's JSON with hub models, earlier runs' exports and folders of data replaced by what the test made."""
    root = tmp_path_factory.mktemp("earlier")
    export = make(CASES["llama_full"], root / "base").write(root / "export", merged=False)
    (root / "collection" / "qrels").mkdir(parents=True)
    for name in ("corpus", "queries"):
        rows = [{"_id": str(i), "title": f"title {i}", "text": f"some text {i}"} for i in range(200)]
        (root / "collection" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("train", "test"):
        lines = "".join(f"{i}\t{i}\t1\n" for i in range(200))
        (root / "collection" / "qrels" / f"{name}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    for kind in ("graded", "pairs"):
        (root / kind).mkdir()
        rows = [of_kind(kind, i) for i in range(200)]
        (root / kind / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def put(holder: dict[str, Any]) -> None:
        start = holder["start"]
        if "hub" in start:
            holder["start"] = {"folder": str(folders[start["hub"]])}
        elif "folder" in start:
            assert start["folder"].startswith("runs/") and start["folder"].endswith(("/export", "/export/lm"))
            holder["start"] = {"folder": str(export if start["folder"].endswith("/export") else root / "base")}

    def replaced(path: Path) -> dict[str, Any]:
        raw = json.loads(path.read_text(encoding="utf-8"))
        for stage in raw["stages"]:
            put(stage)
            if stage["objective"]["name"] == "revela":
                put(stage["objective"]["language_model"])
            if "start" in stage["objective"].get("first_stage", {}):
                put(stage["objective"]["first_stage"])
            for source in stage["data"]["sources"]:
                if "folder" in source:
                    kind = source.get("format", "graded" if stage["objective"]["name"] == "sycl" else "documents")
                    source["folder"] = str(root / (kind if kind in ("graded", "pairs") else "collection"))
            suites = [suite.replace("data/scifact", str(root / "collection")) for suite in stage["eval"]["suites"]]
            stage["eval"]["suites"] = suites
        return raw

    return replaced


def of_kind(kind: str, number: int) -> dict[str, Any]:
    """A row of pairs or of graded passages, as the query of this number in the collection has them."""
    query = f"title {number} some text {number}"
    if kind == "pairs":
        return {"query": query, "positive": query, "negatives": [f"other text {number + far}" for far in range(1, 4)]}
    passages = [{"text": f"passage {number} of grade {grade}", "grade": grade} for grade in (3, 2, 1, 0)]
    return {"query_id": str(number), "query": query, "passages": passages}


def dry_run(path: Path, monkeypatch: pytest.MonkeyPatch, capsys, *options: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["run.py", str(path), "--dry-run", *options])
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", str(RANKS))
    code = launcher.main()
    return code, *capsys.readouterr()


def numbers_of(output: str) -> dict[str, str]:
    lines = [line.strip() for line in output.splitlines() if line.startswith("  ") and "  " in line.strip()]
    return {key: value.strip() for key, value in (line.split("  ", 1) for line in lines)}


def parts(output: str) -> list[tuple[str, dict[str, str], dict[str, Any]]]:
    """(Title, numbers, DeepSpeed configuration) of each stage that a dry run prints."""
    found = []
    for block in re.split(r"^(?=stage \d+ )", output, flags=re.MULTILINE)[1:]:
        text, _, config = block.partition("  DeepSpeed configuration\n")
        found.append((text.splitlines()[0], numbers_of(text), json.loads(config)))
    return found


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_every_shipped_recipe_resolves(
    path: Path, here: Callable[[Path], dict[str, Any]], tmp_path: Path, monkeypatch, capsys
) -> None:
    shipped = json.loads(path.read_text(encoding="utf-8"))
    code, output, error = dry_run(write(tmp_path, here(path)), monkeypatch, capsys)
    assert (code, error) == (0, "") and "not resolved" not in output
    for index, (stage, (title, numbers, config)) in enumerate(zip(shipped["stages"], parts(output), strict=True)):
        assert title == f"stage {index} {stage['name']}: {stage['objective']['name']}"
        assert numbers["steps"].startswith(f"{stage['optim']['steps']} (")
        rows = stage["batch"]["pool"] * stage["batch"]["pools_per_step"]
        assert config["train_batch_size"] == rows
        assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * RANKS == rows
        assert config["bf16"]["enabled"] is (stage["precision"] == "bf16")
        model = "language model" if stage["objective"]["name"] == "language_model" else "retriever"
        total, trainable = (int(numbers[f"{model} {key}"].replace(",", "")) for key in ("parameters", "trainable"))
        assert 0 < trainable <= total and (trainable == total) is (stage["lora"] is None)
        if isinstance(stage["start"], dict) and "hub" in stage["start"]:
            frozen = total - trainable if stage["lora"] else total
            assert frozen == PARAMETERS[stage["start"]["hub"]]
        if "revela_" in path.stem:
            assert numbers["language model parameters"].startswith("1,")
            assert numbers["slices"] == "none: all activations are kept"


def test_a_misspelt_lora_target_is_seen(here, tmp_path: Path, monkeypatch, capsys) -> None:
    path = write(tmp_path, here(RECIPES / "supervised_7b.json"))
    code, output, error = dry_run(path, monkeypatch, capsys, "--set", 'stages.0.lora.targets=["q_proj", "k_prj"]')
    assert (code, output) == (2, "")
    assert error == (
        "stage supervised: retriever: LoRA targets k_prj match no module; the model has down_proj, gate_proj, k_proj, "
        "o_proj, q_proj, up_proj, v_proj\n"
    )


@pytest.mark.parametrize("name", ["contriever_bert_base", "recontriever_bert_base", "recontriever_qwen_0.6b"])
def test_crops_of_a_hub_model_s_recipe_fit_its_input(name: str, folders: dict[str, Path]) -> None:
    (stage,) = load_recipe(RECIPES / f"{name}.json").stages
    assert isinstance(stage.start, HubStart) and stage.data.crops is not None
    special = frame(load_tokenizer(folders[stage.start.hub]), stage.encoder.append_eos)
    assert sum(map(len, special)) == (2 if "bert" in name else 1)
    longest = int(stage.data.crops.chunk_tokens * stage.data.crops.max_ratio) + sum(map(len, special))
    assert longest <= stage.encoder.max_tokens


def test_a_sliding_window_too_short_is_found_ahead(here, tmp_path: Path, monkeypatch, capsys) -> None:
    raw = here(RECIPES / "revela_7b.json")
    raw["stages"][0]["objective"]["language_model"] |= {"start": raw["stages"][0]["start"], "max_tokens": 4097}
    error = (
        "stage revela: objective.language_model.max_tokens: a sliding window of 4096 tokens is shorter than max_tokens "
        "4097; shorten the input"
    )
    path = write(tmp_path, raw)
    assert dry_run(path, monkeypatch, capsys) == (2, "", f"{error}\n")
    with pytest.raises(RecipeError) as caught:  # as the first rank does before the first stage
        check_ahead(load_recipe(path), RANKS)
    assert error in str(caught.value).splitlines()  # others are the hub's, which cannot be reached
    assert dry_run(path, monkeypatch, capsys, "--set", "stages.0.objective.language_model.max_tokens=4096")[0] == 0


def test_slices_are_counted_where_rows_alone_decide_them(monkeypatch, capsys) -> None:
    path, stage = RECIPES / "tiny" / "contrastive.json", ["--stage", "1", "--set", "stages.1.data.negatives=2"]
    stage += ["--set", 'stages.1.data.mine={"by": "bm25", "text": "code", "ranks": [1, 9], "negatives": 2}']
    by_rows = ["--set", "stages.1.batch.forward_tokens=null", "--set", "stages.1.batch.forward_rows=3"]
    for options, line in (
        (by_rows, "of at most 3 texts; a forward has 2 of queries, 4 of documents"),  # 4 rows a rank, 3 documents each
        ([], "about 128 tokens each, texts sorted by length"),
        (by_rows[:2], "none: all activations are kept"),
    ):
        code, output, _ = dry_run(path, monkeypatch, capsys, *stage, *options)
        assert code == 0 and numbers_of(output)["slices"] == line


def test_what_cannot_be_resolved_is_said(monkeypatch, capsys) -> None:
    code, output, _ = dry_run(RECIPES / "revela_7b.json", monkeypatch, capsys)
    assert code == 0
    assert (
        "not resolved: mistralai/Mistral-7B-v0.1: the hub cannot be reached" in output and "train_batch_size" in output
    )


def test_full_fine_tuning_of_a_large_model_in_slices_is_refused(folders, monkeypatch, capsys) -> None:
    start = json.dumps({"folder": str(folders["mistralai/Mistral-7B-v0.1"])})
    options = ["--set", f"stages.0.start={start}", "--set", f"stages.0.objective.language_model.start={start}"]
    options += ["--set", "stages.0.lora=null", "--set", "stages.0.batch.forward_rows=2"]
    code, _, error = dry_run(RECIPES / "revela_7b.json", monkeypatch, capsys, *options)
    assert code == 2 and "(16 GB a GPU)" in error and "use lora" in error
    assert (
        dry_run(RECIPES / "revela_7b.json", monkeypatch, capsys, *options[:-1], "stages.0.batch.forward_rows=null")[0]
        == 0
    )


def test_quickstart_prints_both_stages(monkeypatch, capsys) -> None:
    code, output, _ = dry_run(RECIPES / "quickstart.json", monkeypatch, capsys)
    assert code == 0 and "stage 0 language_model" in output and "stage 1 revela" in output
    code, output, _ = dry_run(RECIPES / "quickstart.json", monkeypatch, capsys, "--stage", "1")
    assert code == 0 and "stage 0" not in output and "retriever trainable" in output
