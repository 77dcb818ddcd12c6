"""Encoder keys that a recipe leaves out are those of the model a stage starts from; what contradicts it is said."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling, Transformer
from tiny import make_recipe
from tiny_retriever import CASES, make, small_model

import toolkit.models.sentence_settings
import toolkit.prepare.start_settings
from toolkit.prepare.start_settings import Unresolved, resolve, resolve_recipe
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.models import EncoderKeys
from toolkit.recipe.schema import Recipe

RECIPES = Path(__file__).parent.parent.parent / "recipes"
KEYS = {
    "pooling": "mean", "normalize": True, "append_eos": None, "query_prefix": "find: ", "passage_prefix": "text: ",
    "max_tokens": 24, "eval_max_tokens": 24,
}  # fmt: skip


def recipe_of(*stages: tuple[Any, dict[str, Any]]) -> Recipe:
    """Contrastive stages of (start, encoder section)."""
    first = json.loads((RECIPES / "tiny" / "contrastive.json").read_text())["stages"][1] | {"lora": None}
    return make_recipe(
        *(first | {"name": f"s{i}", "start": at, "encoder": keys} for i, (at, keys) in enumerate(stages))
    )


def model(folder: Path, *more: Any, pooling: str = "mean", by: Any = None, kind: str = "bert", **options: Any) -> Path:
    """A folder as sentence-transformers writes it."""
    base = small_model(kind, folder / "base", {"bert": "wordpiece", "roberta": "roberta"}[kind])
    modules = [Transformer(str(base), max_seq_length=24), Pooling(32, pooling, **options), *more]  # pyright: ignore
    prompts = {"query": "find: ", "document": "text: ", "Clustering": "group: "}
    made = SentenceTransformer(modules=modules, prompts=prompts, device="cpu", similarity_fn_name=by)
    made.save(str(folder / "model"))
    return folder / "model"


def change(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def settings(folder: Path, **keys: Any) -> dict[str, Any]:
    return resolve(recipe_of(({"folder": str(folder)}, keys)), 0).encoder.model_dump()


def problem(folder: Path, **keys: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        settings(folder, **keys)
    return str(caught.value)


def test_every_key_that_is_left_out_is_the_model_s(tmp_path: Path):
    folder = model(tmp_path, Normalize())
    assert settings(folder) == KEYS
    assert settings(folder, pooling="cls", max_tokens=8) == KEYS | {"pooling": "cls", "max_tokens": 8}
    whole = recipe_of(({"folder": str(folder)}, {}))
    (resolved,) = resolve_recipe(whole)
    assert resolved.notes == [] and dict(resolved.rows) == {
        "encoder.pooling": "mean (1_Pooling/config.json)",
        "encoder.normalize": "true (modules.json)",
        "encoder.append_eos": "null (the tokenizer's own)",
        "encoder.query_prefix": '"find: " (config_sentence_transformers.json)',
        "encoder.passage_prefix": '"text: " (config_sentence_transformers.json)',
        "encoder.max_tokens": "24 (tokenizer_config.json)",
        "encoder.eval_max_tokens": "24 (tokenizer_config.json)",
    }
    complete = toolkit.prepare.start_settings.with_encoders(whole, [resolved.encoder])
    assert complete.digest() != whole.digest()  # a resumed run compares what the keys have become
    assert complete.stages[0].encoder_settings.model_dump() == KEYS | {"truncate_dim": None}


@pytest.mark.parametrize(
    ("old", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, "eos"),
        ({"pooling_mode": "lasttoken"}, "eos"),
        ({}, "mean"),
    ],
)
def test_the_older_layouts_are_read(old: dict[str, Any], pooling: str, tmp_path: Path):
    """Class names, pooling keys and the name of the transformer's file as older versions wrote them."""
    folder = model(tmp_path)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32} | old))
    classes = ["sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"]
    modules = [
        {"idx": i, "name": str(i), "path": at, "type": name}
        for i, (name, at) in enumerate(zip(classes, ["", "1_Pooling"], strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").unlink()
    (folder / "sentence_roberta_config.json").write_text(json.dumps({"max_seq_length": 20, "do_lower_case": False}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"__version__": {}}))
    found = settings(folder)
    assert (found["pooling"], found["eval_max_tokens"], found["query_prefix"]) == (pooling, 20, "")
    assert found["normalize"] is True  # compared by cosine, without a Normalize
    assert found["append_eos"] is None  # the last token is the tokenizer's own
    (folder / "sentence_roberta_config.json").unlink()
    change(folder / "tokenizer_config.json", model_max_length=30)
    assert settings(folder)["eval_max_tokens"] == 30
    change(folder / "tokenizer_config.json", model_max_length=10**30)
    assert settings(folder)["eval_max_tokens"] == 64  # its positions


@pytest.mark.parametrize(("by", "normalize"), [(None, True), ("cosine", True), ("dot", False)])
def test_normalize_is_as_vectors_are_compared(by: str | None, normalize: bool, tmp_path: Path):
    assert settings(model(tmp_path, by=by))["normalize"] is normalize


def test_a_key_that_contradicts_the_model_is_one_line(tmp_path: Path):
    folder = model(tmp_path, Normalize())
    written = {"pooling": "cls", "normalize": False, "query_prefix": "", "eval_max_tokens": 32, "max_tokens": 16}
    recipe = recipe_of(({"folder": str(folder)}, written), ("previous", {"pooling": "mean", "passage_prefix": "x"}))
    first, second = resolve_recipe(recipe)
    options = "config_sentence_transformers.json"
    assert first.notes == [
        "note: stages.0.encoder.pooling is cls; the start model was trained with mean (1_Pooling/config.json)",
        "note: stages.0.encoder.normalize is false; the start model was trained with true (modules.json)",
        f'note: stages.0.encoder.query_prefix is ""; the start model was trained with "find: " ({options})',
        "note: stages.0.encoder.eval_max_tokens is 32; the start model reads at most 24 (tokenizer_config.json)",
    ]
    assert second.encoder.model_dump() == KEYS | written | {"pooling": "mean", "passage_prefix": "x"}
    assert second.notes == [
        "note: stages.1.encoder.pooling is mean; the stage before was trained with cls (stages.0.encoder)",
        'note: stages.1.encoder.passage_prefix is "x"; the stage before was trained with "text: " (stages.0.encoder)',
    ]


def test_taking_the_separator_away_is_a_warning(tmp_path: Path):
    folder = model(tmp_path, Normalize())
    (resolved,) = resolve_recipe(recipe_of(({"folder": str(folder)}, {"append_eos": False})))
    line = "warning: stages.0.encoder.append_eos is false: [SEP], which the tokenizer puts after every text, is taken"
    assert len(resolved.notes) == 1 and resolved.notes[0].startswith(line)
    plain = small_model("llama", tmp_path / "llama", "bos")
    keys = KEYS | {"append_eos": False}
    assert resolve(recipe_of(({"folder": str(plain)}, keys)), 0).notes == []  # nothing is taken away


@pytest.mark.parametrize("name", ["llama_lora", "bert_full", "mistral_full"])
def test_an_export_and_its_adapter_name_all_they_were_trained_with(name: str, tmp_path: Path):
    made = make(CASES[name], tmp_path / "base")
    folder = made.write(tmp_path / "export")
    assert settings(folder) == made.settings.model_dump(include=set(EncoderKeys.model_fields))
    for part in (folder, *folder.glob("merged")):
        (part / "export.json").unlink()
        read = settings(part, append_eos=made.settings.append_eos)  # from the files of sentence-transformers
        assert read == made.settings.model_dump(include=set(EncoderKeys.model_fields)) | {"max_tokens": 24}


def test_an_export_that_cuts_its_vectors_is_said(tmp_path: Path):
    folder = make(CASES["bert_full"], tmp_path / "base").write(tmp_path / "export")
    change(folder / "config_sentence_transformers.json", truncate_dim=8)
    (note,) = resolve(recipe_of(({"folder": str(folder)}, {})), 0).notes
    assert note.startswith("note: stages.0.encoder: the start model cuts vectors to 8 dimensions (truncate_dim in ")


def test_an_adapter_alone_has_the_settings_of_its_base(tmp_path: Path):
    base = model(tmp_path / "st", Normalize())
    made = make(CASES["bert_lora"], tmp_path / "own")
    folder = made.write(tmp_path / "export", merged=False)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / file, adapter / file)
    change(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    assert settings(adapter) == KEYS


def test_an_adapter_in_a_sentence_transformers_folder_reads_what_its_base_does(tmp_path: Path, monkeypatch):
    folder = make(CASES["bert_lora"], tmp_path / "base").write(tmp_path / "export", merged=False)
    (folder / "export.json").unlink()
    change(folder / "sentence_bert_config.json", max_seq_length=None)
    change(folder / "tokenizer_config.json", model_max_length=10**30)
    recipe = recipe_of(({"folder": str(folder)}, {"append_eos": True}))
    assert dict(resolve(recipe, 0).rows)["encoder.max_tokens"] == "64 (config.json of the base)"
    change(folder / "sentence_bert_config.json", max_seq_length=100)
    assert settings(folder)["eval_max_tokens"] == 64
    change(folder / "sentence_bert_config.json", max_seq_length=None)
    monkeypatch.setattr(toolkit.models.sentence_settings, "base_of_adapter", lambda _: "nobody/nothing")
    assert [line.split(":")[0] for line in problem(folder).splitlines()] == [
        "stages.0.encoder.max_tokens", "stages.0.encoder.eval_max_tokens",
    ]  # fmt: skip


def test_prompts_under_other_names_are_said(tmp_path: Path):
    folder = model(tmp_path, Normalize())
    options = folder / "config_sentence_transformers.json"
    change(options, prompts={"s2p_query": "Q: ", "empty": ""})
    resolved = resolve(recipe_of(({"folder": str(folder)}, {})), 0)
    assert (resolved.encoder.query_prefix, resolved.encoder.passage_prefix) == ("", "")
    line = "the start model has prompts under other names than query and document (s2p_query in "
    assert resolved.notes == [
        f"note: stages.0.encoder: {line}config_sentence_transformers.json); no prefix is taken from them"
    ]
    change(options, default_prompt_name="s2p_query")
    resolved = resolve(recipe_of(({"folder": str(folder)}, {})), 0)
    assert resolved.encoder.query_prefix == "Q: " and resolved.notes == []


def test_a_start_that_is_not_there_is_said_before_its_keys(tmp_path: Path):
    none = tmp_path / "none"
    end = "name a folder that holds a model"
    assert problem(none) == f"stages.0.start: the folder {none} does not exist; {end}"
    none.mkdir()
    assert problem(none, **KEYS) == f"stages.0.start: {none} holds no config.json; {end}"


def test_an_end_token_that_an_adapter_was_trained_with_stays(tmp_path: Path):
    """The next stage reads the tokenizer of the base, which adds none by itself."""
    folder = make(CASES["llama_lora"], tmp_path / "base").write(tmp_path / "export", merged=False)
    assert settings(folder)["append_eos"] is True
    (resolved,) = resolve_recipe(recipe_of(({"folder": str(folder)}, {"append_eos": False, "pooling": "mean"})))
    assert resolved.notes[-1] == (
        "note: stages.0.encoder.append_eos is false, which ends texts without one; the start model ends texts with </s>"
    )


def test_pooling_eos_of_a_model_that_names_none_has_an_end_token(tmp_path: Path):
    plain = small_model("llama", tmp_path / "llama", "bos")
    resolved = resolve(recipe_of(({"folder": str(plain)}, KEYS | {"pooling": "eos"})), 0)
    assert resolved.encoder.append_eos is True
    assert dict(resolved.rows)["encoder.append_eos"] == "true (pooling eos reads an end token)"
    assert settings(plain, **KEYS)["append_eos"] is None


def test_a_model_that_names_none_needs_every_key(tmp_path: Path):
    plain = small_model("bert", tmp_path / "bert", "wordpiece")
    assert problem(plain).splitlines() == [
        'stages.0.encoder.pooling: missing, and the start model names none; write "eos", "mean" or "cls"',
        "stages.0.encoder.normalize: missing, and the start model names none; write true or false",
        'stages.0.encoder.query_prefix: missing, and the start model names none; write it, or ""',
        'stages.0.encoder.passage_prefix: missing, and the start model names none; write it, or ""',
        "stages.0.encoder.max_tokens: missing, and the start model names none; write the longest input of training in "
        "tokens",
        "stages.0.encoder.eval_max_tokens: missing, and the start model names none; write the longest input of "
        "evaluation in tokens",
    ]
    with pytest.raises(RecipeError) as caught:  # all stages at once, each line once
        resolve_recipe(recipe_of(({"folder": str(plain)}, KEYS | {"pooling": None}), ("previous", {})))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("more", "options", "keys", "message"),
    [
        ([Dense(32, 16)], {}, KEYS, "Transformer, Pooling, Dense (modules.json)"),
        ([LayerNorm(32)], {}, KEYS, "would drop LayerNorm; to train the transformer without the rest, name a copy"),
        ([], {"pooling": "max"}, {}, "pooling: missing, and the start model names max (1_Pooling/config.json), which"),
        ([], {"pooling": "weightedmean"}, {}, "names weightedmean (1_Pooling/config.json), which is not trained here"),
        ([], {"include_prompt": False}, {}, "its mean pooling leaves the tokens of the prompt out (include_prompt is"),
    ],
)
def test_parts_that_training_would_drop_are_refused(more, options, keys, message: str, tmp_path: Path):
    found = problem(model(tmp_path, *more, **options), **keys)
    assert message in found and len(found.splitlines()) == 1


def test_what_a_written_key_settles_is_not_refused(tmp_path: Path):
    folder = model(tmp_path, pooling="max", include_prompt=False)
    recipe = recipe_of(({"folder": str(folder)}, {"pooling": "cls", "query_prefix": "", "passage_prefix": ""}))
    (resolved,) = resolve_recipe(recipe)
    assert resolved.notes[0].endswith("pooling is cls; the start model was trained with max (1_Pooling/config.json)")


def test_settings_that_training_does_not_follow_are_said_or_refused(tmp_path: Path):
    folder = model(tmp_path, Normalize())
    change(folder / "config_sentence_transformers.json", truncate_dim=8, similarity_fn_name="euclidean")
    change(folder / "sentence_bert_config.json", max_seq_length=100, processing_kwargs={"text": {"max_length": 4}})
    resolved = resolve(recipe_of(({"folder": str(folder)}, {})), 0)
    assert resolved.encoder.eval_max_tokens == 64 and len(resolved.notes) == 3
    assert "cuts vectors to 8 dimensions (truncate_dim in config_sentence_transformers.json)" in resolved.notes[0]
    assert "names a max_seq_length of 100 (sentence_bert_config.json) and has positions for 64" in resolved.notes[1]
    assert "sets processing_kwargs (sentence_bert_config.json), which training does not read" in resolved.notes[2]
    roberta = model(tmp_path / "roberta", kind="roberta")
    change(roberta / "sentence_bert_config.json", do_lower_case=True)
    assert "texts are lower-cased by do_lower_case (sentence_bert_config.json), not by the tokenizer" in problem(
        roberta
    )
    change(roberta / "sentence_bert_config.json", do_lower_case=False, max_seq_length=64)
    assert settings(roberta)["eval_max_tokens"] == 62  # the first two positions are of padding
    (roberta / "1_Pooling" / "config.json").write_text("{")
    assert problem(roberta).endswith(
        "1_Pooling/config.json: cannot be read (no valid JSON); write the model's folder again"
    )


def test_models_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, asked = model(tmp_path, Normalize()), []

    def download(hub: str, file: str) -> str:
        asked.append((hub, file))
        if hub == "owner/plain":
            raise EntryNotFoundError("none")
        if hub == "owner/far":
            raise LocalEntryNotFoundError("no network")
        return str(folder / file)

    def snapshot(hub: str, **_: Any) -> str:
        if hub == "owner/far":
            raise LocalEntryNotFoundError("no network")
        return str(folder if hub == "owner/model" else small_model("llama", tmp_path / "plain", "bos"))

    monkeypatch.setattr(toolkit.prepare.start_settings, "hf_hub_download", download)
    monkeypatch.setattr(toolkit.prepare.start_settings, "snapshot_download", snapshot)
    assert resolve(recipe_of(({"hub": "owner/model"}, {})), 0).encoder.model_dump() == KEYS
    assert asked == [("owner/model", "modules.json")]
    with pytest.raises(RecipeError, match=r"stages.0.encoder.pooling: missing, and owner/plain names none; write"):
        resolve(recipe_of(({"hub": "owner/plain"}, {})), 0)
    with pytest.raises(Unresolved, match="owner/far: the hub cannot be reached"):
        resolve(recipe_of(({"hub": "owner/far"}, KEYS)), 0)
    (whole,) = resolve_recipe(recipe_of(({"hub": "owner/far"}, KEYS)))
    assert whole.encoder.model_dump() == KEYS and whole.notes[0].startswith("note: stages.0.encoder: not compared: ")
    for keys in ({}, KEYS | {"pooling": "eos"}):  # whether an end token is added depends on the model
        with pytest.raises(RecipeError, match=r"stages.0.encoder: owner/far: the hub cannot be reached"):
            resolve_recipe(recipe_of(({"hub": "owner/far"}, keys)))


def test_what_the_model_names_must_go_with_the_rest_of_the_recipe(tmp_path: Path):
    folder = model(tmp_path, by="dot")
    raw: Any = json.loads(recipe_of(({"folder": str(folder)}, {})).to_json())
    raw["stages"][0] |= {
        "objective": {"name": "recontriever", "temperature": 0.05, "views": 1, "relevance": "none", "queue": None},
        "data": {
            "sources": [{"stdlib": "files"}],
            "crops": {"chunk_tokens": 16, "min_ratio": 0.1, "max_ratio": 0.5, "delete": 0.1},
        },
    }
    with pytest.raises(
        RecipeError, match=r'stages.0.encoder.query_prefix: crops are trained without prefixes; set it to ""'
    ):
        resolve_recipe(make_recipe(*raw["stages"]))
