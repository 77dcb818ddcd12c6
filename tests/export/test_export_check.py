"""A fresh process gets the live vectors from an export, and a wrong export is noticed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tiny_retriever import CASES, TEXTS, Made, make

from toolkit.export.check import COSINE_LIMITS, NORM_LIMITS, check_export, compare, encode_in_fresh_process
from toolkit.export.write import load_export
from toolkit.recipe.errors import RecipeError


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Made]:
    return {name: make(case, tmp_path_factory.mktemp("base") / name) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def exports(made, tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("exports")
    return {name: model.write(place / name) for name, model in made.items()}


def test_sentence_transformers_in_a_fresh_process_gives_the_live_vectors(made, exports):
    folders = dict(exports)
    folders |= {f"{name}/merged": path / "merged" for name, path in exports.items() if made[name].case.lora}
    assert len(folders) == 19 + 10
    loaded = encode_in_fresh_process(list(folders.values()), TEXTS, "cpu")
    for (name, path), vectors in zip(folders.items(), loaded, strict=True):
        live, dtype = made[name.split("/")[0]].live, json.loads((path / "export.json").read_text())["dtype"]
        for kind in ("query", "passage"):
            distance, norm = compare(live[kind], vectors[kind])
            assert distance <= COSINE_LIMITS[dtype], name
            assert norm <= NORM_LIMITS[dtype], name
        assert compare(live["query"], vectors["passage"])[0] > 10 * COSINE_LIMITS[dtype], name  # the prefix is seen
        if made[name.split("/")[0]].settings.normalize:
            np.testing.assert_allclose(np.linalg.norm(vectors["query"], axis=1), 1, atol=5e-3)


def test_check_export_passes_then_sees_a_changed_adapter_and_a_changed_prefix(made, exports, tmp_path):
    live = made["llama_lora"].live
    folder = Path(shutil.copytree(exports["llama_lora"], tmp_path / "export"))
    figures = check_export(folder, TEXTS, live, "cpu")
    assert figures.keys() == {"query", "passage", "merged_query", "merged_passage"}
    assert max(figures.values()) <= 1e-5
    assert json.loads((folder / "export.json").read_text())["check"]["figures"] == figures

    shutil.rmtree(folder / "merged")
    layout = folder / "config_sentence_transformers.json"
    content = layout.read_text()
    layout.write_text(content.replace("find: ", "find:"))
    with pytest.raises(ValueError, match=r"export: the export is not the trained model: query differs by .* 1e-05"):
        check_export(folder, TEXTS, live, "cpu")
    layout.write_text(content)

    weights = load_file(folder / "adapter_model.safetensors")
    weights[min(weights)] *= 1.1
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the export is not the trained model: query differs"):
        check_export(folder, TEXTS, live, "cpu")
    with pytest.raises(RecipeError, match=r"export: the weights differ from the digest in export\.json"):
        load_export(folder, "cpu")


def test_check_export_without_normalisation_compares_norms(made, exports, monkeypatch, tmp_path):
    live = made["qwen2_full"].live
    folder = Path(shutil.copytree(exports["qwen2_full"], tmp_path / "export"))
    monkeypatch.setattr("toolkit.export.check.encode_in_fresh_process", lambda *_: [live])
    assert check_export(folder, TEXTS, live, "cpu").keys() == {"query", "passage", "query_norm", "passage_norm"}
    monkeypatch.setattr(
        "toolkit.export.check.encode_in_fresh_process", lambda *_: [live | {"passage": 1.001 * live["passage"]}]
    )
    with pytest.raises(ValueError, match=r"passage_norm differs by 0\.001"):
        check_export(folder, TEXTS, live, "cpu")
    monkeypatch.setattr(
        "toolkit.export.check.encode_in_fresh_process", lambda *_: [live | {"query": np.nan * live["query"]}]
    )
    with pytest.raises(ValueError, match="query differs by nan"):
        check_export(folder, TEXTS, live, "cpu")


def test_fresh_process_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")  # a launcher's variables do not reach it
    with pytest.raises(ValueError, match=r"nothing: a fresh process cannot load the export:\n(.|\n)*nothing"):
        encode_in_fresh_process([tmp_path / "nothing"], TEXTS, "cpu")
