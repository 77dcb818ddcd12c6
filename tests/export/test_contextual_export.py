"""A retriever in two stages after its export: the same vectors by our loader and by sentence-transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contextual_retrievers import CASES, MadeContextual, make_contextual
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from tiny_retriever import TEXTS
from transformers import AutoModel

from toolkit.export.check import check_export
from toolkit.export.write import load_export
from toolkit.models.in_context import KEPT, InContext, in_context, read_vectors, without_context, write_vectors
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.evaluation import EvalSettings
from toolkit.retrieval.context import draw, embed_context, in_own_context
from toolkit.retrieval.embed import checkpoint_digest, embed_texts
from toolkit.retrieval.retrievers import load_any
from toolkit.retrieval.sentence_module import ContextualRetriever, sentence_transformer
from toolkit.retrieval.settings import with_settings

CPU = torch.device("cpu")
BOUND = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MadeContextual]:
    return {name: make_contextual(case, tmp_path_factory.mktemp(name)) for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_loaded_export_gives_the_live_vectors(made: dict[str, MadeContextual], name: str, tmp_path: Path):
    one = made[name]
    folder = one.write(tmp_path / "export")
    retriever, bound = load_export(folder, CPU), BOUND[one.case.dtype]
    reads = in_context(retriever, embed_context(retriever, one.context, "test"))
    for kind in ("query", "passage"):
        np.testing.assert_allclose(embed_texts(retriever, TEXTS, kind), one.live[kind], atol=bound)
        found = embed_texts(reads, TEXTS, kind)
        np.testing.assert_allclose(found, one.live[f"{kind}_in_context"], atol=bound)
        assert np.abs(found - one.live[kind]).max() > 10 * bound  # the context is read
    assert load_any(str(folder), None, EvalSettings.model_validate({}), CPU).retriever.first is not None
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".md", ".txt"}


@pytest.mark.parametrize("name", ["modernbert", "llama_adapters"])
def test_a_fresh_process_proves_the_export_with_context_and_without(
    made: dict[str, MadeContextual], name: str, tmp_path: Path
):
    one = made[name]
    folder = one.write(tmp_path / "export")
    figures = check_export(folder, TEXTS, one.live, "cpu", one.context)
    assert set(figures) == {"query", "passage", "query_in_context", "passage_in_context"}
    with pytest.raises(ValueError, match="the export is not the trained model: query_in_context differs by"):
        check_export(folder, TEXTS, one.live, "cpu", ["another"] * len(one.context))


def test_sentence_transformers_reads_without_and_with_a_context_and_keeps_it(
    made: dict[str, MadeContextual], tmp_path: Path
):
    one = made["bert"]
    folder = one.write(tmp_path / "export")
    with pytest.raises(ValueError, match="ContextualRetriever"):  # as any class that is not its own
        SentenceTransformer(str(folder))
    model = sentence_transformer(folder, "cpu")
    by_its_name = SentenceTransformer(modules=[ContextualRetriever.load(str(folder))], device="cpu")
    np.testing.assert_allclose(by_its_name.encode(TEXTS), model.encode(TEXTS), atol=2e-6)
    module: Any = model[0]
    np.testing.assert_allclose(model.encode_query(TEXTS), one.live["query"], atol=2e-6)
    np.testing.assert_allclose(model.encode_document(TEXTS), one.live["passage"], atol=2e-6)
    assert module.context_documents == 6 and model.get_embedding_dimension() == 32
    module.set_context(one.context)
    np.testing.assert_allclose(model.encode_query(TEXTS), one.live["query_in_context"], atol=2e-6)
    module.set_context(None)
    np.testing.assert_allclose(model.encode_query(TEXTS), one.live["query"], atol=2e-6)
    with pytest.raises(ValueError, match="5 context documents, where the model reads 6; give as many"):
        module.set_context(one.context[:5])
    with pytest.raises(ValueError, match="there is no context; set_context sets one"):
        module.write_context()
    module.set_context(one.context)
    module.write_context(tmp_path / "kept.safetensors")
    module.set_context(None)
    module.read_context(tmp_path / "kept.safetensors")
    np.testing.assert_allclose(model.encode_query(TEXTS), one.live["query_in_context"], atol=2e-6)
    model.save(str(tmp_path / "saved"))
    module.write_context()
    for place in (folder, tmp_path / "saved"):
        again = sentence_transformer(place, "cpu")
        np.testing.assert_allclose(again.encode_document(TEXTS), one.live["passage_in_context"], atol=2e-6)
        retriever = load_export(place, CPU)
        assert isinstance(retriever.encoder, InContext)
        np.testing.assert_allclose(embed_texts(retriever, TEXTS, "query"), one.live["query_in_context"], atol=2e-6)
        null = without_context(retriever)
        np.testing.assert_allclose(embed_texts(null, TEXTS, "query"), one.live["query"], atol=2e-6)
        assert checkpoint_digest(null) != checkpoint_digest(retriever)


def test_peft_loads_both_adapters(made: dict[str, MadeContextual], tmp_path: Path):
    one = made["llama_adapters"]
    folder = one.write(tmp_path / "export")
    base = AutoModel.from_pretrained(one.base.folder)
    model = PeftModel.from_pretrained(base, str(folder))
    model.load_adapter(str(folder / "first"), "first")
    found = dict(model.named_parameters())
    trained = {name.removeprefix("backbone."): w for name, w in one.parts.state.items() if "lora_" in name}
    assert {name for name in trained if ".first." in name} and {name for name in trained if ".default." in name}
    for name, weight in trained.items():
        torch.testing.assert_close(found[name], weight)


def test_merged_weights_have_a_first_stage_too(made: dict[str, MadeContextual], tmp_path: Path):
    one = made["qwen3_small_first"]
    folder = one.write(tmp_path / "export", merged=True)
    retriever = load_export(folder / "merged", CPU)
    reads = in_context(retriever, embed_context(retriever, one.context, "test"))
    np.testing.assert_allclose(embed_texts(reads, TEXTS, "query"), one.live["query_in_context"], atol=1e-5)


def test_the_card_says_how_the_context_is_used(made: dict[str, MadeContextual], tmp_path: Path):
    text = (made["modernbert"].write(tmp_path / "export") / "README.md").read_text()
    assert "vectors of 3 documents of the collection" in text and "model[0].set_context(random.choices(" in text
    assert "--context corpus --context none" in text and "AutoModel" not in text


def test_a_context_is_a_function_of_the_seed_drawn_with_replacement(made: dict[str, MadeContextual]):
    texts = [str(number) for number in range(5)]
    assert draw(texts, 5, 64, 0) == draw(iter(texts), 5, 64, 0) != draw(texts, 5, 64, 1)
    assert set(draw(texts, 5, 64, 0)) == set(texts) and draw(["a"], 1, 3, 0) == ["a", "a", "a"]
    with pytest.raises(ValueError, match="there is no text to draw a context from"):
        draw([], 0, 2, 0)
    one = made["bert"].retriever
    reads = in_own_context(one, TEXTS, len(TEXTS), "test", 3)
    assert isinstance(reads.encoder, InContext)
    about = reads.encoder.kept.about
    assert about == about | {"documents": 6, "drawn_from": len(TEXTS), "of": "test", "seed": 3, "model": "live"}


def test_files_that_are_no_context_of_this_model_are_one_line(made: dict[str, MadeContextual], tmp_path: Path):
    one, other = (made[name].write(tmp_path / name) for name in ("bert", "modernbert"))
    retriever = load_export(one, CPU)
    path = tmp_path / "kept.safetensors"
    write_vectors(path, embed_context(retriever, made["bert"].context, "here"))
    assert read_vectors(path, retriever).about["of"] == "here"
    with pytest.raises(RecipeError, match=r"kept\.safetensors: is the context of another model \([0-9a-f]{16}, this "):
        read_vectors(path, load_export(other, CPU))
    path.write_bytes(path.read_bytes()[:-8] + b"\0" * 8)
    with pytest.raises(RecipeError, match="differs from its digest; embed its documents again"):
        read_vectors(path, retriever)
    for wrong in (tmp_path / "none", one / "context.safetensors", one / "config.json"):
        with pytest.raises(RecipeError, match="holds no context"):
            read_vectors(wrong, retriever)


def test_what_is_altered_or_missing_is_one_line(made: dict[str, MadeContextual], tmp_path: Path):
    folder = made["bert"].write(tmp_path / "export")
    whole = folder / "first" / "model.safetensors"
    kept = whole.read_bytes()
    whole.write_bytes(kept[:-4] + b"\0\0\0\1")
    with pytest.raises(RecipeError, match="the weights differ from the digest"):
        load_export(folder, CPU)
    whole.write_bytes(kept)
    (folder / KEPT).parent.mkdir()
    (folder / KEPT).write_bytes(b"nothing")
    with pytest.raises(RecipeError, match="holds no context"):
        load_export(folder, CPU)
    shutil.rmtree((folder / KEPT).parent)
    record = json.loads((folder / "context.json").read_text())
    (folder / "context.json").write_text(json.dumps(record | {"settings": {}}))
    with pytest.raises(RecipeError, match=r"context\.json: cannot be read"):
        load_export(folder, CPU)


def test_other_settings_keep_the_context(made: dict[str, MadeContextual]):
    one = made["bert"]
    reads = in_own_context(one.retriever, TEXTS, len(TEXTS), "test", 0)
    raw = with_settings(reads, EvalSettings.model_validate({"normalize": False, "max_tokens": 9}))
    assert isinstance(raw.encoder, InContext) and raw.settings.eval_max_tokens == 9
    vectors = embed_texts(raw, TEXTS[3:4], "query")
    assert abs(np.linalg.norm(vectors) - 1) > 1e-3
    same = embed_texts(reads, TEXTS[3:4], "query")
    np.testing.assert_allclose(vectors / np.linalg.norm(vectors), same, atol=1e-5)
    with pytest.raises(RecipeError, match="a contextual retriever pools as it was trained to"):
        with_settings(reads, EvalSettings.model_validate({"pooling": "cls"}))
