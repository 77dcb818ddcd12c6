"""Folders whose weights are not in safetensors: what is said, and that the command in it mends them."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_retriever import TEXTS, small_model
from transformers import AutoModel

from toolkit.models.backbone import load_adapted, load_causal_lm, load_encoder_backbone
from toolkit.models.formats import pickled_model
from toolkit.prepare.models import base_of_adapter, resolve_model
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.evaluation import EvalSettings
from toolkit.recipe.models import FolderStart
from toolkit.retrieval.embed import embed_texts
from toolkit.retrieval.retrievers import load_any

ALONE = EvalSettings(pooling="mean", normalize=True, max_tokens=16)


def to_pickle(folder: Path, name: str, pickled: str) -> dict[str, torch.Tensor]:
    weights = load_file(folder / name)
    torch.save(weights, folder / pickled)
    (folder / name).unlink()
    return weights


def run_what_it_says(line: str) -> None:
    assert "\n" not in line
    python, option, code = shlex.split(line[line.index("python -c ") :])
    assert (python, option) == ("python", "-c")
    exec(code, {})  # as a process of its own would, but for its imports, which take ten seconds


def load_by_name(folder: Path) -> None:
    load_any(str(folder), None, ALONE, torch.device("cpu"))


def start_from(folder: Path) -> None:
    resolve_model(FolderStart(folder=str(folder)), previous=None, previous_kind="encoder", built=None)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_folder_of_pickles_says_how_to_convert_it_and_that_works(kind: str, tmp_path: Path) -> None:
    folder = small_model(kind, tmp_path / "it's a model", "plain" if kind == "llama" else "wordpiece")
    weights = to_pickle(folder, "model.safetensors", "pytorch_model.bin")
    lines = []
    for load in (load_by_name, start_from, lambda at: load_encoder_backbone(at, torch.float32)):
        with pytest.raises(
            (RecipeError, ValueError), match=r"holds its weights as pytorch_model\*\.bin, which"
        ) as caught:
            load(folder)
        lines.append(str(caught.value).removeprefix("start: "))
    assert len(set(lines)) == 1 and lines[0].startswith(f"{folder}: ")
    run_what_it_says(lines[0])
    found = load_file(folder / "model.safetensors")
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in found)
    start_from(folder)
    load_by_name(folder)
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:  # as a download without pickles
        path.unlink()
    with pytest.raises(RecipeError, match=r"holds no weights in safetensors .*; a pytorch_model\.bin becomes that by "):
        load_by_name(folder)


def test_the_head_of_a_language_model_is_converted_too(tmp_path: Path) -> None:
    folder = small_model("llama", tmp_path / "m", "plain")
    to_pickle(folder, "model.safetensors", "pytorch_model.bin")
    run_what_it_says(pickled_model(folder))
    load_causal_lm(folder, torch.float32, "sdpa")


def test_a_model_of_a_class_that_transformers_lacks_is_converted_as_its_type(tmp_path: Path) -> None:
    """Contriever's config.json names a class of its own code."""
    folder = small_model("bert", tmp_path / "m", "wordpiece")
    weights = to_pickle(folder, "model.safetensors", "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Contriever"]}))
    run_what_it_says(pickled_model(folder))
    assert load_file(folder / "model.safetensors").keys() == weights.keys()


@pytest.mark.parametrize("place", [".", "0_Transformer"])
def test_a_sentence_transformers_folder_of_pickles_says_so(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    small_model("bert", folder / place, "wordpiece")
    (folder / "modules.json").write_text("[]")
    to_pickle(folder / place, "model.safetensors", "pytorch_model.bin")
    with pytest.raises(RecipeError, match=r"holds its weights as pytorch_model\*\.bin, which .* python -c "):
        load_by_name(folder)


def test_a_sentence_transformers_folder_of_other_weights_is_refused(tmp_path: Path) -> None:
    folder = small_model("bert", tmp_path / "model", "wordpiece")
    (folder / "modules.json").write_text("[]")
    config = json.loads((folder / "config.json").read_text())
    for layers, words in ((1, "holds 16 weights that have no place in a BertModel"), (3, "lacks 16 weights of a Bert")):
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        with pytest.raises(RecipeError, match=words):
            load_by_name(folder)


def test_an_adapter_in_a_pickle_says_how_to_convert_it_and_that_works(tmp_path: Path) -> None:
    base, adapter = small_model("llama", tmp_path / "base", "plain"), tmp_path / "adapter"
    model = get_peft_model(AutoModel.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(adapter)
    expected = embed_texts(load_any(str(adapter), None, ALONE, torch.device("cpu")).retriever, TEXTS, "query")
    to_pickle(adapter, "adapter_model.safetensors", "adapter_model.bin")
    lines = []
    for load in (
        load_by_name,
        start_from,
        base_of_adapter,
        lambda at: load_any(str(base), str(at), ALONE, torch.device("cpu")),
        lambda at: load_adapted(base, at, torch.float32, "cpu"),
    ):
        with pytest.raises(
            (RecipeError, ValueError), match=r"holds its weights as adapter_model\.bin, which"
        ) as caught:
            load(adapter)
        lines.append(str(caught.value))
    assert len(set(lines)) == 1
    run_what_it_says(lines[0])
    found = embed_texts(load_any(str(adapter), None, ALONE, torch.device("cpu")).retriever, TEXTS, "query")
    assert (found == expected).all()
