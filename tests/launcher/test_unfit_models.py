"""What --dry-run and the start of training say of models that do not fit: one line, before anything is trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from recipe_changes import LM_START, changed, write
from safetensors.torch import load_file
from tiny import build_objective, save_model
from tiny_retriever import small_model, small_tokenizer
from transformers import AutoModelForCausalLM

import launcher.dry_run
from launcher.ahead import Ahead
from launcher.dry_run import describe, stage_parameters
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.schema import load_recipe
from toolkit.recipe.stage import Stage

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["q_proj", "down_proj"]}
NOTHING_SEEN = Ahead([], [], [], [], {})  # of the data


@pytest.fixture
def fine(tmp_path: Path) -> Path:
    return small_model("llama", tmp_path / "fine", "bos")


def stage(folder: Path, start: Path, lm: Path, lora: Any = None) -> tuple[Any, Stage]:
    recipe = changed(
        ("stages.1.start", {"folder": str(start)}), (LM_START, {"folder": str(lm)}), ("stages.1.lora", lora)
    )
    loaded = load_recipe(write(folder, recipe))
    return loaded, loaded.stages[1]


def said(folder: Path, start: Path, lm: Path, lora: Any = None) -> str:
    recipe, _ = stage(folder, start, lm, lora)
    with pytest.raises(RecipeError) as caught:
        describe(recipe, 1, 1, NOTHING_SEEN)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize("changes", [{"is_causal": False}, {"text_config": {"is_causal": False}}])
def test_a_language_model_that_sees_its_targets_is_refused(changes: Any, fine: Path, tmp_path: Path) -> None:
    """Also where training builds the objective: in-batch attention would be causal or not by the padding of a slice."""
    lm = change_config(small_model("qwen3", tmp_path / "lm", "bos"), **changes)
    line = said(tmp_path, fine, lm)
    assert f"{lm}: config.json says " in line and "is_causal: false, so the model reads both ways" in line
    _, loaded = stage(tmp_path, fine, lm)
    with pytest.raises(ValueError, match="reads both ways and predicts no next token"):
        build_objective(loaded, 0, "cpu", fine, None, lm)  # pyright: ignore[reportArgumentType]


def test_a_tokenizer_of_another_model_is_named_for_both_models_of_a_stage(fine: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", "llama")  # of 96 tokens
    small_tokenizer("bos").save_pretrained(other)
    describe(stage(tmp_path, fine, fine)[0], 1, 1, NOTHING_SEEN)
    for start, lm in ((other, fine), (fine, other)):
        line = said(tmp_path, start, lm)
        assert (
            f": {other}: " in line and "tokens have ids (" in line and "as config.json says vocab_size 96; put" in line
        )


def test_a_tokenizer_of_another_model_is_named_where_the_cache_has_both(
    fine: Path, tmp_path: Path, monkeypatch
) -> None:
    other = save_model(tmp_path / "other", "llama")  # of 96 tokens
    monkeypatch.setattr(launcher.dry_run, "hf_hub_download", lambda *_: str(other / "config.json"))
    recipe = changed(("stages.1.start", {"hub": "owner/other"}), (LM_START, {"folder": str(fine)}))
    loaded = load_recipe(write(tmp_path, recipe))
    stage_parameters(loaded, 1)  # no tokenizer is there yet
    small_tokenizer("bos").save_pretrained(other)
    with pytest.raises(ValueError, match=f"{other}: .* tokens have ids .* vocab_size 96; put the tokenizer beside"):
        stage_parameters(loaded, 1)


def test_weights_in_a_pickle_are_named_with_the_way_out(fine: Path, tmp_path: Path) -> None:
    other = small_model("llama", tmp_path / "other", "bos")
    torch.save(load_file(other / "model.safetensors"), other / "pytorch_model.bin")
    (other / "model.safetensors").unlink()
    for start, lm in ((other, fine), (fine, other)):
        assert f"{other}: holds its weights as pytorch_model*.bin, which can run code" in said(tmp_path, start, lm)


def test_an_adapter_is_held_against_its_base_and_the_lora_section(fine: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r"model\.layers\.\d+\..*(q|down)_proj", task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(fine), config).save_pretrained(adapter)  # pyright: ignore
    describe(stage(tmp_path, adapter, fine, LORA)[0], 1, 1, NOTHING_SEEN)
    line = said(tmp_path, adapter, fine, LORA | {"targets": ["q_proj"]})
    assert line.endswith("and start from those full weights, or set lora to rank 4, alpha 8, targets down_proj, q_proj")
    change_config(fine, num_hidden_layers=3, layer_types=None)
    line = said(tmp_path, adapter, fine, LORA)
    assert (
        "2 modules (layers.2.mlp.down_proj, layers.2.self_attn.q_proj) that adapter_config.json names have no" in line
    )
