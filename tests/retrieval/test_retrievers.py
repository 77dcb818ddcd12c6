"""Any retriever: the vectors of whoever made it, its settings in the result, and one line for what cannot be run."""

import json
import shutil
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
import torch
from beir import write_beir, write_hub_layout, write_questions
from distributed import run_on_ranks
from retrievers import ragged_texts, tiny_retriever
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tiny_retriever import CASES, Made, make, small_model

from eval.evaluate import evaluate
from eval.run import main
from toolkit.data.tokens import frame
from toolkit.export.write import load_export
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.evaluation import EvalSettings
from toolkit.retrieval.embed import checkpoint_digest, embed_texts, encode
from toolkit.retrieval.retrievers import load_any
from toolkit.retrieval.settings import with_settings

CPU = torch.device("cpu")
TEXTS = [*ragged_texts(12), "return the largest of two numbers", "x"]


def changes(**values: Any) -> EvalSettings:
    return EvalSettings(**values)


def save(
    folder: Path, kind: str, tokenizer: str, *more: Any, pooling: str = "cls", by: Any = None, **options: Any
) -> Path:
    """A folder by sentence-transformers itself, with random weights; `by` is its similarity function."""
    transformer = Transformer(str(small_model(kind, folder / "base", tokenizer)), max_seq_length=24)
    if transformer.tokenizer.pad_token is None:
        transformer.tokenizer.pad_token = transformer.tokenizer.eos_token
    modules = [transformer, Pooling(32, pooling, **options), *more]  # pyright: ignore[reportArgumentType]
    prompts = {"query": "find: ", "document": "text: ", "Clustering": "group: "}
    model = SentenceTransformer(modules=modules, prompts=prompts, device="cpu", similarity_fn_name=by)
    model.save(str(folder / "model"))
    return folder / "model"


def linear(dim: int, bias: bool = False, seed: int = 1) -> Dense:
    torch.manual_seed(seed)
    return Dense(32, dim, bias=bias, activation_function=torch.nn.Identity())


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


# --------------------------------------------------------------------------- sentence-transformers


@pytest.mark.parametrize(
    ("kind", "tokenizer", "pooling", "normalize"),
    [
        ("bert", "wordpiece", "cls", True),
        ("roberta", "roberta", "mean", False),
        ("qwen3", "bos_eos", "lasttoken", True),
        ("nomic_bert", "wordpiece", "mean", True),
        ("t5", "t5", "mean", True),
    ],
)
def test_a_sentence_transformers_folder(kind: str, tokenizer: str, pooling: str, normalize: bool, tmp_path: Path):
    by = None if normalize else "dot"
    folder = save(tmp_path, kind, tokenizer, *([Normalize()] * normalize), pooling=pooling, by=by)
    retriever, prompts = load_any(str(folder), None, changes(), CPU)
    settings = retriever.settings
    assert prompts == {"Clustering": "group: "}
    assert (settings.query_prefix, settings.passage_prefix, settings.eval_max_tokens) == ("find: ", "text: ", 24)
    assert (settings.pooling, settings.normalize) == ({"lasttoken": "eos"}.get(pooling, pooling), normalize)
    model: Any = SentenceTransformer(str(folder), device="cpu")
    theirs = {"query": model.encode_query(TEXTS), "passage": model.encode_document(TEXTS)}
    for side in ("query", "passage"):
        assert distance(embed_texts(retriever, TEXTS, side), theirs[side]) < 1e-5
    assert distance(theirs["query"], theirs["passage"]) > 1e-3  # the prefixes are seen
    for other in ({"pooling": "mean" if pooling == "cls" else "cls"}, {"max_tokens": 6}):
        changed = with_settings(retriever, changes(**other))
        texts = {str(i): text for i, text in enumerate(TEXTS)}
        vectors = encode(changed, texts, "query", may_collapse=True)  # as the first token of a causal model does
        assert distance(vectors.array(), theirs["query"]) > 1e-3


@pytest.mark.parametrize("bias", [False, True])
def test_a_dense_layer_is_applied_or_left_out(bias: bool, tmp_path: Path):
    """The parts of GTR: a T5 encoder, mean pooling, a dense layer without activation, normalisation."""
    folder = save(tmp_path, "t5", "t5", linear(20, bias), Normalize(), pooling="mean")
    retriever = load_any(str(folder), None, changes(), CPU).retriever
    model: Any = SentenceTransformer(str(folder), device="cpu")
    whole = model.encode_document(TEXTS)
    assert whole.shape[1] == 20 and distance(embed_texts(retriever, TEXTS, "passage"), whole) < 1e-5
    raw = with_settings(retriever, changes(normalize=False))
    assert distance(embed_texts(raw, TEXTS, "passage"), whole) > 1e-2
    assert embed_texts(raw, TEXTS, "passage").shape[1] == 20
    pooled = load_any(str(folder), None, changes(), CPU, dense=False).retriever
    bare: Any = SentenceTransformer(modules=list(model)[:2], prompts=model.prompts, device="cpu")
    plain = with_settings(pooled, changes(normalize=False))
    assert distance(embed_texts(plain, TEXTS, "passage"), bare.encode_document(TEXTS)) < 1e-5
    assert len({checkpoint_digest(each) for each in (retriever, pooled, raw)}) == 3
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(RecipeError, match=r"2_Dense: has no model\.safetensors; where you trust"):
        load_any(str(folder), None, changes(), CPU)


def test_a_dense_layer_that_is_not_there_cannot_be_left_out(tmp_path: Path):
    with pytest.raises(RecipeError, match="has no dense layer that could be left out; remove dense"):
        load_any(str(save(tmp_path, "bert", "wordpiece")), None, changes(), CPU, dense=False)


@pytest.mark.parametrize(("by", "cosine"), [(None, True), ("cosine", True), ("dot", False)])
def test_raw_vectors_are_compared_as_their_folder_says(by: str | None, cosine: bool, tmp_path: Path):
    folder = save(tmp_path, "bert", "wordpiece", pooling="mean", by=by)
    config = folder / "config_sentence_transformers.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"similarity_fn_name": by}))
    retriever = load_any(str(folder), None, changes(), CPU).retriever
    queries, passages = (embed_texts(retriever, TEXTS, side) for side in ("query", "passage"))
    model: Any = SentenceTransformer(str(folder), device="cpu")
    theirs = model.similarity(model.encode_query(TEXTS), model.encode_document(TEXTS)).numpy()
    assert retriever.settings.normalize == cosine and distance(queries @ passages.T, theirs) < 1e-5
    other = with_settings(retriever, changes(normalize=not cosine))
    queries, passages = (embed_texts(other, TEXTS, side) for side in ("query", "passage"))
    assert distance(queries @ passages.T, theirs) > 1e-2


@pytest.mark.parametrize("by", ["euclidean", "manhattan"])
def test_distances_are_refused(by: str, tmp_path: Path):
    folder = save(tmp_path, "bert", "wordpiece", Normalize(), by=by)
    with pytest.raises(RecipeError, match=f"compares by {by} distance .*; run are similarity_fn_name cosine and dot$"):
        load_any(str(folder), None, changes(), CPU)


@pytest.mark.parametrize("name", ["llama_lora", "bert_full", "qwen3_full", "mistral_full"])
def test_our_export_as_sentence_transformers_reads_it(name: str, tmp_path: Path):
    folder = make(CASES[name], tmp_path / "base").write(tmp_path / "export")
    ours = load_any(str(folder), None, changes(), CPU).retriever
    assert ours.settings == load_export(folder, CPU).settings
    (folder / "export.json").unlink()
    read = load_any(str(folder), None, changes(), CPU).retriever
    other = {"max_tokens", "append_eos"}
    assert read.settings.model_dump(exclude=other) == ours.settings.model_dump(exclude=other)
    assert frame(read.tokenizer, read.settings.append_eos) == frame(ours.tokenizer, ours.settings.append_eos)
    limit = 1e-5 if CASES[name].dtype == torch.float32 else 3e-2
    for side in ("query", "passage"):
        assert distance(embed_texts(read, TEXTS, side), embed_texts(ours, TEXTS, side)) < limit


@pytest.mark.parametrize(
    ("more", "options", "message"),
    [
        ([Dense(32, 16)], {}, "its Dense has activation Tanh; run is a linear layer of the pooled vector alone"),
        ([Normalize(), linear(32)], {}, "consists of Transformer, Pooling (cls), Normalize, Dense; run are"),
        ([], {"pooling": "max"}, "consists of Transformer, Pooling (max); run are"),
        (
            [],
            {"include_prompt": False},
            "its cls pooling leaves the tokens of the prompt out (include_prompt is false)",
        ),
    ],
)
def test_what_cannot_be_run_is_refused(more: list[Any], options: dict[str, Any], message: str, tmp_path: Path):
    folder = save(tmp_path, "bert", "wordpiece", *more, **options)
    with pytest.raises(RecipeError) as caught:
        load_any(str(folder), None, changes(), CPU)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_vectors_that_are_not_those_of_sentence_transformers_are_refused(tmp_path: Path, monkeypatch):
    """Whatever a later version of it does beside what is known here."""
    folder = save(tmp_path, "bert", "wordpiece")
    forward = Pooling.forward
    monkeypatch.setattr(
        Pooling, "forward", lambda self, features, **_: {
            key: value.flip(-1) if key == "sentence_embedding" else value
            for key, value in forward(self, features).items()
        },
    )  # fmt: skip
    with pytest.raises(RecipeError, match="our vectors are not those of sentence-transformers"):
        load_any(str(folder), None, changes(), CPU)


def test_pickled_weights_are_not_read(tmp_path: Path):
    folder = save(tmp_path, "bert", "wordpiece")
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"holds its weights as pytorch_model\*\.bin, .* python -c "):
        load_any(str(folder), None, changes(), CPU)


# --------------------------------------------------------------------------- models and adapters


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> tuple[Made, Path]:
    """A retriever with an adapter, and the adapter alone."""
    place = tmp_path_factory.mktemp("adapter")
    made = make(CASES["llama_lora"], place / "base")
    export = made.write(place / "export")
    bare = place / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(export / name, bare)
    return made, bare


def test_a_base_model_with_an_adapter(adapter: tuple[Made, Path]):
    made, bare = adapter
    how = {"pooling": "eos", "normalize": True, "max_tokens": 24, "query_prefix": "find: "}
    how = changes(**how, passage_prefix="text:\n")
    texts = TEXTS[:5]
    expected = embed_texts(load_export(bare.parent / "export", CPU), texts, "query")
    for what, added in ((str(made.base.folder), str(bare)), (str(bare), None)):
        retriever = load_any(what, added, how, CPU).retriever
        assert distance(embed_texts(retriever, texts, "query"), expected) < 1e-6
        assert retriever.settings.append_eos
    alone = load_any(str(made.base.folder), None, how, CPU).retriever
    assert distance(embed_texts(alone, texts, "query"), expected) > 1e-2


def test_a_model_alone_says_what_it_needs(adapter: tuple[Made, Path]):
    made, bare = adapter
    for what in (str(made.base.folder), str(bare)):
        with pytest.raises(RecipeError, match=r"add --normalize, --max-tokens$"):
            load_any(what, None, changes(pooling="mean"), CPU)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("/no/such/folder", "/no/such/folder: no such folder; name"),
        ("a/b/c", "a/b/c: no such folder; name"),
        ("owner/name", "owner/name: no such folder, not bm25, and as a hub id: the hub cannot be reached"),
    ],
)
def test_what_is_not_there(what: str, message: str):
    with pytest.raises(RecipeError) as caught:
        load_any(what, None, changes(), CPU)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "tokenizer", "usable"), [("bert", "wordpiece", 64), ("roberta", "roberta", 62)])
def test_a_length_above_the_positions_is_cut_and_said(kind: str, tokenizer: str, usable: int, tmp_path: Path, capsys):
    folder = save(tmp_path, kind, tokenizer, Normalize(), pooling="mean")
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 100}))
    options = folder / "sentence_bert_config.json"
    options.write_text(json.dumps(json.loads(options.read_text()) | {"max_seq_length": 100}))
    retriever = load_any(str(folder), None, changes(), CPU).retriever
    assert retriever.settings.eval_max_tokens == usable
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith(f"note: {folder}: names a max_seq_length of 100 (") and f"for {usable} tokens; {usable}" in line
    )
    texts = ["return " * 90, "x"]
    model: Any = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = usable
    assert distance(embed_texts(retriever, texts, "query"), model.encode_query(texts)) < 1e-5
    shorter = load_any(str(folder), None, changes(max_tokens=9), CPU).retriever
    assert shorter.settings.eval_max_tokens == 9 and capsys.readouterr().err == ""
    for place in (folder, tmp_path / "base"):
        whole = changes(max_tokens=65, pooling="mean", normalize=True)
        with pytest.raises(RecipeError, match=rf"positions for {usable} tokens; set --max-tokens to at most {usable}"):
            load_any(str(place), None, whole, CPU)


def test_the_flag_of_a_length_is_named_for_an_export_too(tmp_path: Path):
    folder = make(CASES["bert_full"], tmp_path / "base").write(tmp_path / "export")
    assert load_any(str(folder), None, changes(max_tokens=64), CPU)
    with pytest.raises(RecipeError, match="set --max-tokens to at most 64 "):
        load_any(str(folder), None, changes(max_tokens=65), CPU)


@pytest.mark.parametrize(("by", "more"), [(None, [Normalize()]), ("cosine", []), ("dot", [])])
def test_vectors_are_cut_to_the_dimensions_that_a_folder_names(by: str | None, more: list[Any], tmp_path: Path):
    folder = save(tmp_path, "bert", "wordpiece", *more, pooling="mean", by=by)
    config = folder / "config_sentence_transformers.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"truncate_dim": 8}))
    retriever = load_any(str(folder), None, changes(), CPU).retriever
    queries, passages = (embed_texts(retriever, TEXTS, side) for side in ("query", "passage"))
    assert queries.shape == (len(TEXTS), 8) and retriever.settings.truncate_dim == 8
    model: Any = SentenceTransformer(str(folder), device="cpu")
    theirs = model.similarity(model.encode_query(TEXTS), model.encode_document(TEXTS)).numpy()
    assert distance(queries @ passages.T, theirs) < 1e-5
    whole = retriever._replace(settings=retriever.settings.model_copy(update={"truncate_dim": None}))
    assert checkpoint_digest(whole) != checkpoint_digest(retriever)  # their vectors are kept apart
    shorter = with_settings(retriever, changes(max_tokens=6))
    assert embed_texts(shorter, TEXTS, "query").shape == (len(TEXTS), 8)


def test_a_class_of_its_own_is_said_and_not_run(tmp_path: Path, capfd):
    folder = save(tmp_path, "bert", "wordpiece", Normalize())
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoModel": "modeling_own.Own"}}))
    (folder / "modeling_own.py").write_text("raise SystemExit('foreign code ran')")
    load_any(str(folder), None, changes(), CPU)
    line = f"warning: {folder}: config.json names a class of its own (modeling_own.Own), whose code is not run; the "
    assert capfd.readouterr().err.count(line + "standard BertModel is used, so check that its vectors are those ") == 1


@pytest.mark.parametrize("place", ["export.json", "config_sentence_transformers.json"])
@pytest.mark.parametrize("name", ["llama_lora", "bert_full", "qwen2_full"])
def test_vectors_of_an_export_are_cut_as_its_files_say(name: str, place: str, tmp_path: Path):
    folder = make(CASES[name], tmp_path / "base").write(tmp_path / "export")
    whole = embed_texts(load_export(folder, CPU), TEXTS, "query")
    config = folder / place
    raw = json.loads(config.read_text())
    at = raw["settings"] if place == "export.json" else raw
    at["truncate_dim"] = 8
    config.write_text(json.dumps(raw))
    retriever = load_any(str(folder), None, changes(), CPU).retriever
    wanted = whole[:, :8] / (np.linalg.norm(whole[:, :8], axis=1, keepdims=True) if CASES[name].normalize else 1)
    np.testing.assert_allclose(embed_texts(retriever, TEXTS, "query"), wanted, rtol=0, atol=1e-6)
    assert retriever.settings.truncate_dim == 8
    if place == "config_sentence_transformers.json":
        model: Any = SentenceTransformer(str(folder), device="cpu")
        theirs = model.similarity(model.encode_query(TEXTS), model.encode_query(TEXTS)).numpy()
        assert distance(wanted @ wanted.T, theirs) < 1e-5
        config.write_text(json.dumps(raw | {"truncate_dim": "8"}))
        with pytest.raises(RecipeError, match='json: truncate_dim "8" is no number of dimensions; write one, or null'):
            load_any(str(folder), None, changes(), CPU)


def test_unit_vectors_that_are_cut_and_multiplied_are_refused(tmp_path: Path):
    folder = save(tmp_path, "bert", "wordpiece", Normalize(), by="dot")
    config = folder / "config_sentence_transformers.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"truncate_dim": 8}))
    with pytest.raises(RecipeError, match=r"cuts vectors of unit length \(truncate_dim\) and compares the rest by dot"):
        load_any(str(folder), None, changes(), CPU)


def test_a_pooling_without_the_prompt_is_run_where_there_is_none(tmp_path: Path):
    folder = save(tmp_path, "bert", "wordpiece", Normalize(), pooling="mean", include_prompt=False)
    with pytest.raises(RecipeError, match='set its prompts or both prefixes to "", or include_prompt to true'):
        load_any(str(folder), None, changes(query_prefix="", prompts={"Clustering": ""}), CPU)
    none = changes(query_prefix="", passage_prefix="", prompts={"Clustering": ""})
    retriever = load_any(str(folder), None, none, CPU).retriever
    model: Any = SentenceTransformer(str(folder), device="cpu")
    assert distance(embed_texts(retriever, TEXTS, "query"), model.encode(TEXTS)) < 1e-5
    last = save(tmp_path / "last", "qwen3", "bos_eos", Normalize(), pooling="lasttoken", include_prompt=False)
    assert load_any(str(last), None, changes(), CPU).retriever.settings.query_prefix == "find: "


@pytest.mark.parametrize("pooling", ["lasttoken", "mean"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_end_that_a_template_appends_is_the_end(side: str, pooling: str, tmp_path: Path):
    """As Qwen3-Embedding: what comes after a text is not eos_token; and a config that cuts and pads on the left."""
    folder = save(tmp_path, "qwen3", "bos_eos", Normalize(), pooling=pooling)
    for place in (folder, tmp_path / "base"):
        config = place / "tokenizer_config.json"
        changed = {"eos_token": "<s>", "padding_side": side, "truncation_side": side}
        config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    model: Any = SentenceTransformer(str(folder), device="cpu")
    model.tokenizer.truncation_side = "right"
    theirs = model.encode_query(TEXTS)
    found = load_any(str(folder), None, changes(pooling="eos" if pooling == "lasttoken" else None), CPU).retriever
    assert found.tokenizer.eos_token == "<s>" and distance(embed_texts(found, TEXTS, "query"), theirs) < 1e-5
    flags = changes(
        pooling={"lasttoken": "eos"}.get(pooling, pooling), normalize=True, max_tokens=24, query_prefix="find: "
    )
    plain = load_any(str(tmp_path / "base"), None, flags, CPU).retriever
    assert distance(embed_texts(plain, TEXTS, "query"), theirs) < 1e-5


def test_a_folder_that_is_no_model(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"is no export \(export.json\), no sentence-transformers model"):
        load_any(str(tmp_path), None, changes(), CPU)


def test_rank_zero_decides_what_a_name_is(adapter: tuple[Made, Path], tmp_path: Path):
    """A folder that only one of the ranks has, or of which they have different parts, is an error on both."""
    _, bare = adapter
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        shutil.copytree(bare, tmp_path / place / "everywhere")
    shutil.copytree(bare, tmp_path / "a" / "first")
    shutil.copytree(bare, tmp_path / "b" / "second")
    shutil.copytree(bare, tmp_path / "a" / "parts")
    (tmp_path / "b" / "parts").mkdir()
    request = {
        "places": [str(tmp_path / "a"), str(tmp_path / "b")],
        "names": ["first", "second", "parts", "everywhere"],
    }
    one, other = run_on_ranks("retriever_ranks.py", 2, request, tmp_path, timeout=500)
    assert one == other
    first, second, parts, everywhere = one
    assert first.startswith("first is not on ") and first.endswith("; put it on a disk that all nodes share")
    assert second.startswith("second: no such folder, not bm25, and as a hub id: the hub cannot be reached")
    assert "adapter" in parts and everywhere == "loaded"


# --------------------------------------------------------------------------- settings


def test_settings_of_an_evaluation():
    retriever = tiny_retriever()
    assert with_settings(retriever, changes()) is retriever
    raw = with_settings(retriever, changes(normalize=False))
    vectors = embed_texts(raw, TEXTS, "query")
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    assert norms.std() > 1e-3 and distance(vectors / norms, embed_texts(retriever, TEXTS, "query")) < 1e-6
    two = with_settings(retriever, changes(query_prefix="w3  "))  # spaces count as they stand
    assert two.settings.query_prefix == "w3  "
    first = with_settings(retriever, changes(pooling="cls"))
    states = first.encoder.backbone(**_tokens(first, "w0 w5")).last_hidden_state[0, 0]
    found = embed_texts(first, ["w5"], "query")[0]
    np.testing.assert_allclose(found, torch.nn.functional.normalize(states, dim=0).detach().numpy(), atol=1e-6)
    revisions = {checkpoint_digest(model) for model in (retriever, raw, two, first)}
    assert len(revisions) == 4 and checkpoint_digest(tiny_retriever()) == checkpoint_digest(retriever)
    bert = tiny_retriever()
    bert.encoder.backbone.config.update({"model_type": "bert", "max_position_embeddings": 64})
    with pytest.raises(RecipeError, match=r"eval.max_tokens: the model \(bert\) has learned positions for 64"):
        with_settings(bert, changes(max_tokens=65))


def _tokens(retriever: Any, text: str) -> Any:
    return retriever.tokenizer([text], return_tensors="pt", return_token_type_ids=False)


# --------------------------------------------------------------------------- the command, and official scores


@pytest.mark.parametrize("more", [[Normalize()], []])
def test_an_official_task_from_disk_has_mtebs_score(more: list[Any], tmp_path: Path, monkeypatch):
    """The command on a copy of a task's data, against mteb itself with the model as sentence-transformers runs it."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = save(tmp_path, "bert", "wordpiece", *more, pooling="mean")
    beir = write_beir(tmp_path / "beir")
    hub = write_hub_layout(tmp_path / "hub", beir)
    official: Any = mteb.get_task("SciFact")
    official.metadata = official.metadata.model_copy(update={"dataset": {"path": str(hub), "revision": "local"}})
    model = SentenceTransformer(str(folder), device="cpu")
    done = mteb.evaluate(model, official, cache=None, co2_tracker=False, show_progress_bar=False)
    theirs = done.task_results[0].scores["test"][0]
    assert 0.05 < theirs["ndcg_at_10"] < 0.95
    found = {}
    for place, extra in ((hub, []), (beir, []), (hub, ["--query-prefix", ""])):
        output = tmp_path / f"{place.name}{len(extra)}"
        command = [str(folder), "--suite", f"SciFact={place}", "--output", str(output), *extra]
        assert main(command) == 0
        (written,) = output.glob("results/*/*/SciFact.json")
        found[output.name] = mteb.TaskResult.from_disk(written).scores["test"][0]
    for name in ("hub0", "beir0"):
        compared = [key for key in found[name] if "_at_" in key]
        assert len(compared) == 42
        for key in compared:
            assert found[name][key] == pytest.approx(theirs[key], abs=1.1e-5), key
    assert abs(found["hub2"]["ndcg_at_10"] - theirs["ndcg_at_10"]) > 1e-3  # without the model's own prefix
    written = json.loads((tmp_path / "hub2" / "metrics.json").read_text())["system"]
    assert (written["settings"]["query_prefix"], written["settings"]["passage_prefix"]) == ("", "text: ")
    assert written["prompts"] == {"Clustering": "group: "}


def test_open_questions_end_to_end(tmp_path: Path):
    passages = [("", f"w{i} w{i + 50} answer{i}") for i in range(30)]
    questions = [(f"w{i} w{i + 50}", [f"Answer{i}"]) for i in range(8)]
    folder = write_questions(tmp_path / "qa", passages, [*questions, ("w3 w53", ["nowhere"])])
    found = evaluate(tiny_retriever(), [str(folder)], tmp_path / "out", label="", step=None)["qa"]
    assert list(found) == ["accuracy_at_5", "accuracy_at_20", "accuracy_at_100"]
    assert 0 < found["accuracy_at_5"] <= found["accuracy_at_20"] <= found["accuracy_at_100"] == pytest.approx(8 / 9)
    per_query = json.loads((tmp_path / "out" / "per_query.json").read_text())["qa"]["accuracy_at_100"]
    assert per_query == {f"q{i}": float(i < 8) for i in range(9)}


def test_mistakes_on_the_command_line_are_one_line(tmp_path: Path, capsys):
    suite, file = str(write_beir(tmp_path / "small")), str(tmp_path / "small" / "corpus.jsonl")
    for extra, message in (
        (["--pooling", "max"], "error: --pooling: Input should be 'eos', 'mean' or 'cls'"),
        (["--prompt", "Clustering"], "error: --prompt Clustering: write TASK=TEXT"),
        (["--identical-ids", "no"], "error: --identical-ids: Input should be 'task', 'keep' or 'drop'"),
        (["--suite", "quick:nothing"], "error: suite quick:nothing: no such folder"),
        (["--adapter", "x"], "error: bm25 has no adapter, prefixes, length, pooling, normalisation or vectors; drop"),
        (["--vectors", "x"], "error: bm25 has no adapter, prefixes, length, pooling, normalisation or vectors; drop"),
        (["--prompt", "STS=x"], "error: bm25 has no adapter, prefixes, length, pooling, normalisation or vectors;"),
        (["--bm25-cache", file], f"error: --bm25-cache {file}: {file} is a file; name a folder"),
        (["--output", f"{file}/x"], f"error: --output {file}/x: {file} is a file; name a folder"),
        (["--output", "/proc/none"], "error: /proc/none: No such file or directory; mend it, or name another place"),
    ):
        assert main(["bm25", "--suite", suite, "--output", str(tmp_path / "out"), *extra]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith(message)
    assert not (tmp_path / "out").exists()
    mine = ["--bm25-cache", str(tmp_path / "cache"), "--bm25-text", "code", "--identical-ids", "keep"]  # these BM25 has
    assert main(["bm25", "--suite", suite, "--output", str(tmp_path / "out"), *mine]) == 0
