"""The export: what is on disk, what loads it, what refuses it."""

import copy
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_retriever import CASES, TARGETS, TEXTS, Made, make, small_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    T5EncoderModel,
)

from toolkit.data.tokens import frame
from toolkit.export import write as export
from toolkit.export.write import load_export
from toolkit.models.backbone import adapted, add_lora, load_causal_lm, load_encoder_backbone, load_tokenizer
from toolkit.prepare import models
from toolkit.prepare.models import ModelSource, resolve_model
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.models import FolderStart, Lora
from toolkit.retrieval.embed import embed_texts


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Made]:
    return {name: make(case, tmp_path_factory.mktemp("base") / name) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def exports(made, tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("exports")
    return {name: model.write(place / name) for name, model in made.items()}


@pytest.mark.parametrize("name", CASES)
def test_load_export_gives_the_live_vectors(made, exports, name):
    retriever = load_export(exports[name], "cpu")
    assert retriever.settings == made[name].settings
    assert next(retriever.encoder.parameters()).dtype == made[name].case.dtype
    for kind, live in made[name].live.items():
        np.testing.assert_array_equal(embed_texts(retriever, TEXTS, kind), live)


# ----------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.lora])
def test_adapter_loads_by_peft_with_every_weight(made, exports, name, recwarn):
    model, folder = made[name], exports[name]
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == model.base.name
    options = json.loads((folder / "sentence_bert_config.json").read_text())["model_kwargs"]
    loader = T5EncoderModel if model.case.kind == "t5" else AutoModel
    assert f"base = {loader.__name__}.from_pretrained" in (folder / "README.md").read_text()
    base = loader.from_pretrained(model.base.folder, **options)  # as the model card says
    assert base.dtype == model.case.dtype
    loaded = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
    found = {key: value for key, value in loaded.named_parameters() if "lora_" in key}
    assert found.keys() == model.state.keys()
    assert all(torch.equal(found[key], model.state[key]) for key in found)
    assert not [str(item.message) for item in recwarn if "adapter keys" in str(item.message)]
    per_layer = {"bert": 6, "roberta": 6, "modernbert": 3}.get(model.case.kind, 2)  # linear modules with an adapter
    assert len(load_file(folder / "adapter_model.safetensors")) == len(model.state) == 2 * 2 * per_layer
    if model.case.kind == "bert":  # control: a pooling layer would want an adapter that was never trained
        PeftModel.from_pretrained(AutoModel.from_pretrained(model.base.folder), folder)
        assert [str(item.message) for item in recwarn if "adapter keys" in str(item.message)]


def test_merged_weights_are_base_plus_adapter(made, exports):
    model = made["llama_lora"]
    merged, base = load_file(exports["llama_lora"] / "merged" / "model.safetensors"), load_file(
        model.base.folder / "model.safetensors"
    )  # fmt: skip
    changed = {name for name in merged if not torch.equal(merged[name], base[f"model.{name}"])}
    assert len(changed) == 4
    for name in changed:
        a, b = (model.state[f"base_model.model.{name[:-7]}.lora_{x}.default.weight"] for x in "AB")
        torch.testing.assert_close(merged[name], base[f"model.{name}"] + 2.0 * b @ a, rtol=0, atol=1e-6)


def test_continued_adapter_keeps_the_first_base(made, exports, tmp_path):
    model = made["llama_lora"]
    base = load_encoder_backbone(model.base.folder, torch.float32)
    backbone = PeftModel.from_pretrained(base, exports["llama_lora"], is_trainable=True)
    state = {name: 2 * weight.detach() for name, weight in backbone.named_parameters() if weight.requires_grad}
    source = ModelSource(model.base.folder, model.base.name, exports["llama_lora"])
    folder = model.write(tmp_path / "export", backbone=backbone, state=state, base=source, merged=False)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == model.base.name
    assert not (folder / "merged").exists()
    old, new = (load_file(path / "adapter_model.safetensors") for path in (exports["llama_lora"], folder))
    assert all(torch.equal(new[name], 2 * old[name]) for name in old)


@pytest.mark.parametrize("hub", [True, False])
@pytest.mark.parametrize("name", ["llama_lora", "bert_lora"])
def test_a_stage_that_starts_from_an_export_goes_on_and_names_the_first_base(
    name, hub, made, exports, monkeypatch, tmp_path
):
    model, start = made[name], exports[name]
    if hub:
        start = model.write(tmp_path / "start", base=model.base._replace(name="a/b"), merged=False)
        monkeypatch.setattr(models, "snapshot_download", lambda *_, **__: str(model.base.folder))
    source = resolve_model(FolderStart(folder=str(start)), previous=None, previous_kind="encoder", built=None)
    first = "a/b" if hub else model.base.name
    assert source == ModelSource(model.base.folder, first, start)
    lora = Lora(rank=4, alpha=8.0, dropout=0.25, targets=TARGETS[model.case.kind])
    backbone = load_encoder_backbone(source.folder, model.case.dtype)
    backbone = adapted(backbone, lora, source.adapter, causal=False, seed=9)
    trained = {key: weight.detach() for key, weight in backbone.named_parameters() if weight.requires_grad}
    assert trained.keys() == model.state.keys()
    assert all(torch.equal(trained[key], model.state[key]) for key in trained)  # and not fresh ones
    assert {module.p for name, module in backbone.named_modules() if name.endswith("lora_dropout.default")} == {0.25}
    state = {key: 2 * weight for key, weight in trained.items()}
    folder = model.write(tmp_path / "export", backbone=backbone, state=state, base=source)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == first
    assert json.loads((folder / "export.json").read_text())["base"] == first
    for part in (folder, folder / "merged"):
        assert f"| Base model | `{first}` |" in (part / "README.md").read_text()
        assert str(start) not in (part / "README.md").read_text()


def test_a_stage_that_starts_from_merged_weights_names_them(made, exports, tmp_path):
    start = exports["bert_lora"] / "merged"
    source = resolve_model(FolderStart(folder=str(start)), previous=None, previous_kind="encoder", built=None)
    backbone = add_lora(load_encoder_backbone(start, torch.float32), 2, 4.0, 0.0, ["query"], False, 0)
    state = {key: weight.detach() for key, weight in backbone.named_parameters() if weight.requires_grad}
    folder = made["bert_lora"].write(tmp_path / "export", backbone=backbone, state=state, base=source)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(start)
    vectors = embed_texts(load_export(folder, "cpu"), TEXTS, "query")  # new adapters change nothing yet
    np.testing.assert_allclose(vectors, made["bert_lora"].live["query"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            None,
            "lora is null; name .*merged .full weights., or set lora to rank 4, alpha 8, targets down_proj, q_proj$",
        ),
        ({"rank": 8}, "lora has rank 8, alpha 8, targets down_proj, q_proj; name .* set lora to rank 4, alpha 8, "),
        ({"alpha": 4.0}, "lora has rank 4, alpha 4, "),
        ({"targets": ["q_proj"]}, "lora has rank 4, alpha 8, targets q_proj; name "),
    ],
)
def test_an_adapter_that_is_not_the_recipes_is_refused_in_one_line(made, exports, change, message):
    settings: Any = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["down_proj", "q_proj"]}
    backbone = load_encoder_backbone(made["llama_lora"].base.folder, torch.float32)
    lora = None if change is None else Lora(**(settings | change))
    with pytest.raises(ValueError, match=message) as caught:
        adapted(backbone, lora, exports["llama_lora"], causal=False, seed=0)
    assert str(caught.value).startswith(f"{exports['llama_lora']}: holds an adapter, and ")
    assert "\n" not in str(caught.value)
    adapted(backbone, Lora(**settings), exports["llama_lora"], causal=False, seed=0)


def test_base_in_a_folder_is_named_by_its_absolute_path(made, monkeypatch, tmp_path):
    model = made["llama_lora"]
    monkeypatch.chdir(model.base.folder.parent)
    source = ModelSource(Path(model.base.folder.name), model.base.folder.name, None)
    folder = model.write(tmp_path / "export", base=source)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == model.base.name


def test_large_models_are_sharded(made, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "SHARD_SIZE", "50KB")
    model = made["qwen2_full"]
    flat = torch.cat([weight.flatten() for weight in model.state.values()])  # one buffer, as ZeRO gathers
    views = flat.split([weight.numel() for weight in model.state.values()])
    state = {name: view.view_as(weight) for (name, weight), view in zip(model.state.items(), views, strict=True)}
    folder = model.write(tmp_path / "export", state=state)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    retriever = load_export(folder, "cpu")
    np.testing.assert_array_equal(embed_texts(retriever, TEXTS, "query"), model.live["query"])


def test_an_export_names_no_class_that_was_not_trained(made, tmp_path):
    backbone = copy.deepcopy(made["qwen2_full"].backbone)
    backbone.config.auto_map = {"AutoModel": "modeling_own.Own"}
    folder = made["qwen2_full"].write(tmp_path / "export", backbone=backbone)
    assert "auto_map" not in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("tied", [True, False])
def test_language_model_with_its_head(tied, made, tmp_path):
    source = small_model("llama", tmp_path / "base", "bos", tied)
    causal_lm: Any = load_causal_lm(source, torch.float32, "sdpa").eval()
    ids = torch.arange(12)[None]
    logits = causal_lm(ids).logits
    state = {name: weight.detach().clone() for name, weight in causal_lm.named_parameters()}
    encoder_state = {name[6:]: weight for name, weight in state.items() if name.startswith("model.")}
    tokenizer = load_tokenizer(source)
    model = made["llama_lora"]._replace(backbone=causal_lm.to("meta").model, state=encoder_state)
    folder = model.write(tmp_path / "export", tokenizer=tokenizer, causal_lm=(causal_lm, state))
    assert ("lm_head.weight" in load_file(folder / "lm" / "model.safetensors")) is not tied
    loaded, report = AutoModelForCausalLM.from_pretrained(folder / "lm", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(loaded.eval()(ids).logits, logits)
    assert "toolkit" not in (folder / "lm" / "config.json").read_text()
    plain = load_tokenizer(folder / "lm")
    assert not frame(plain, None)[1]
    assert plain(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert frame(load_tokenizer(folder), None)[1]
    with_head = {"lm_head.weight": state["model.embed_tokens.weight"]} | state  # named twice, as state_dict() does
    if tied:
        model.write(folder, tokenizer=tokenizer, causal_lm=(causal_lm, with_head))
        assert "lm_head.weight" not in load_file(folder / "lm" / "model.safetensors")


# ----------------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("name", ["llama_lora", "qwen2_full"])
def test_failed_export_leaves_the_old_one(made, name, tmp_path):
    model = made[name]
    folder = model.write(tmp_path / "export")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    state = dict(model.state)
    first = min(state)
    state[first + ".typo"] = state.pop(first)
    with pytest.raises(ValueError, match=r"lack 1 of \d+ names"):
        model.write(folder, state=state)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    model.write(folder)  # what the failed one left is cleared
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before  # and is deterministic


def test_export_json(made, exports):
    record = json.loads((exports["llama_lora"] / "export.json").read_text())
    digest = hashlib.sha256((exports["llama_lora"] / "adapter_model.safetensors").read_bytes()).hexdigest()
    model = made["llama_lora"]
    assert record == {
        "settings": model.settings.model_dump(), "dtype": "fp32", "base": model.base.name, "weights_sha256": digest,
    }  # fmt: skip


def test_load_export_refuses_what_is_no_export(exports, tmp_path):
    with pytest.raises(RecipeError, match=r"is no export \(no export\.json\); give the export/ folder of a stage"):
        load_export(tmp_path, "cpu")
    folder = Path(shutil.copytree(exports["llama_lora"], tmp_path / "export"))
    record = json.loads((folder / "export.json").read_text())

    def refuse(content: str, message: str) -> None:
        (folder / "export.json").write_text(content)
        with pytest.raises(RecipeError, match=message):
            load_export(folder, "cpu")

    refuse("{", r"export\.json: is not valid JSON")
    refuse("[]", r"export\.json: .*missing")
    refuse(json.dumps({**record, "dtype": "int8"}), r"export\.json: dtype is missing or unknown")
    altered = copy.deepcopy(record)
    altered["settings"]["pooling"] = "max"
    refuse(json.dumps(altered), r"export\.json: settings are altered")
    adapter = json.loads((folder / "adapter_config.json").read_text())
    for base, message in ((str(tmp_path / "gone"), "gone is gone; put it back"), ("nobody/gone", "is not on this")):
        (folder / "adapter_config.json").write_text(json.dumps({**adapter, "base_model_name_or_path": base}))
        refuse(json.dumps(record), message)
