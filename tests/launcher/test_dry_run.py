"""--dry-run of every shipped recipe, on folders that hold only a config.json of the true shapes."""

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from launcher import run as launcher

RECIPES = Path(__file__).parent.parent.parent / "recipes"
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
}  # fmt: skip
# Published sizes without the output head (for tied models the head is the embedding).
PARAMETERS = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "mistralai/Mistral-7B-v0.1": 7_110_660_096,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, (kind, shape) in SHAPES.items():
        made[name] = tmp_path_factory.mktemp(kind) / name.split("/")[1]
        AutoConfig.for_model(kind, **shape).save_pretrained(made[name])
    return made


def dry_run(path: Path, monkeypatch: pytest.MonkeyPatch, capsys, *options: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["run.py", str(path), "--dry-run", *options])
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    code = launcher.main()
    return code, *capsys.readouterr()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("revela_*.json")), ids=lambda path: path.stem)
def test_paper_recipes_resolve(path: Path, folders: dict[str, Path], monkeypatch, capsys) -> None:
    stage = json.loads(path.read_text())["stages"][0]
    model, reader = stage["start"]["hub"], stage["objective"]["language_model"]["start"]["hub"]
    local = {name: json.dumps({"folder": str(folder)}) for name, folder in folders.items()}
    code, output, _ = dry_run(
        path, monkeypatch, capsys, "--set", f"stages.0.start={local[model]}",
        "--set", f"stages.0.objective.language_model.start={local[reader]}",
    )  # fmt: skip
    assert code == 0
    numbers = dict(
        line.strip().split("  ", 1) for line in output.splitlines() if line.startswith("  ") and "  " in line.strip()
    )
    numbers = {key: value.strip() for key, value in numbers.items()}
    assert numbers["language model parameters"].startswith("1,")
    assert numbers["slices"] == "none: all activations are kept" and numbers["steps"].startswith(
        str(stage["optim"]["steps"])
    )
    total = int(numbers["retriever parameters"].replace(",", ""))
    trainable = int(numbers["retriever trainable"].replace(",", ""))
    assert total - trainable == PARAMETERS[model]
    config = json.loads(output[output.index("\n{") :])
    rows = stage["batch"]["pool"] * stage["batch"]["pools_per_step"]
    assert config["train_batch_size"] == rows and config["bf16"]["enabled"]
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 4 == rows


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
