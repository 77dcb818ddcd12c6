"""What a stage starts from: passages, a built model, and models in folders or on the hub."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx2
import pytest
import torch
from distributed import run_on_ranks
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoTokenizer

from toolkit.data.texts import passage_texts
from toolkit.data.train_tokenizer import train_tokenizer
from toolkit.methods.passages import passages_alone
from toolkit.models.backbone import load_causal_lm, load_encoder_backbone, load_tokenizer
from toolkit.prepare import models, passages
from toolkit.prepare.build import build_start
from toolkit.prepare.models import ModelSource, resolve_model
from toolkit.prepare.passages import prepare_passages
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.models import BuildModel, BuildStart, BuildTokenizer, FolderStart, HubStart
from toolkit.recipe.texts import Passages, PassagesData

CODE = "def getHTTPName_v12(self):\r\n\tx = 'é ☃ 中文 \U0001f600 e\u0301'  \n\n    return <|eos|> + \x00None\n"


def make_data(folder: Path, *rows: object, **source: object) -> PassagesData:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {"sources": [{"folder": str(folder), **source}], "passages": {"unit": "lines", "max_words": 4}}
    return PassagesData.model_validate(raw if source.get("format") == "groups" else raw | {"interleave": 1})


def make_build(**tokenizer: object) -> BuildModel:
    settings = {"vocab_size": 400, "pieces": "identifiers"} | tokenizer
    return BuildModel.model_validate(
        {
            "hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 32, "max_tokens": 64,
            "tie_embeddings": True, "tokenizer": settings,
        }
    )  # fmt: skip


# --------------------------------------------------------------------------- passages


def test_documents_are_cut_and_numbered_in_order(tmp_path: Path, capsys):
    data = make_data(tmp_path / "in", {"text": "a b\nc d\ne"}, {"text": "..."}, {"text": ""}, {"text": "f"})
    store = prepare_passages(data, tmp_path / "run")
    assert store.texts(range(3)) == ["a b\nc d", "e", "f"] and store.document.tolist() == [0, 0, 1]
    said = capsys.readouterr().out
    assert (
        said.startswith("data: 4 rows, 2 of them without text; 2 documents, 3 passages, digest ")
        and said.count("\n") == 1
    )


def test_passages_of_one_document_stay_together(tmp_path: Path):
    rows = [{"text": t, "d": d} for t, d in (("a", "x"), ("b", "x"), ("c", "y"), ("d", "x"))]
    data = make_data(tmp_path / "in", *rows, format="passages", fields={"document": "d"})
    assert prepare_passages(data, tmp_path / "run").document.tolist() == [0, 0, 1, 2]
    alone = make_data(tmp_path / "in", *rows, format="passages")
    assert prepare_passages(alone, tmp_path / "run").document.tolist() == [0, 1, 2, 3]


def test_groups_keep_their_size(tmp_path: Path):
    data = make_data(tmp_path / "in", ["a", "b", "c"], ["d", "e", "f"], format="groups")
    store = prepare_passages(data, tmp_path / "run")
    assert store.group_size == 3 and store.document.tolist() == [0, 0, 0, 1, 1, 1]


def test_groups_of_two_sources_have_one_size(tmp_path: Path):
    """In a pool of 2 x 3 the fourth text would be taken for the second group's first."""
    wide = make_data(tmp_path / "wide", ["a", "b", "c"], ["d", "e", "f"], format="groups")
    narrow = make_data(tmp_path / "narrow", [" ", "x"], ["g", "h"], format="groups")
    equal = make_data(tmp_path / "equal", ["i", "j", "k"], format="groups")

    def together(*parts: PassagesData) -> PassagesData:
        return wide.model_copy(update={"sources": [source for part in parts for source in part.sources]})

    store = prepare_passages(together(wide, equal), tmp_path / "run")
    assert store.group_size == 3 and store.document.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    with pytest.raises(RecipeError) as caught:
        prepare_passages(together(wide, equal, narrow), tmp_path / "run")
    assert str(caught.value) == (
        f"data.sources: folder: {tmp_path}/wide holds groups of 3 texts, folder: {tmp_path}/narrow holds groups of 2 "
        "texts; give all the same size, or use them in stages of their own"
    )


def test_the_cache_is_used_until_data_or_settings_change(tmp_path: Path, monkeypatch):
    data = make_data(tmp_path / "in", {"text": "a b c"})
    first = prepare_passages(data, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(passages, "write_store", None)  # writing again would fail
        assert prepare_passages(data, tmp_path / "run").digest == first.digest
        os.utime(tmp_path / "in" / "rows.jsonl", (1, 1))  # the same content at another time
        assert prepare_passages(data, tmp_path / "run").digest == first.digest
        # The order of training is no part of what is stored; how documents are cut is.
        assert prepare_passages(data.model_copy(update={"interleave": 2}), tmp_path / "run").digest == first.digest
        shorter = data.model_copy(update={"passages": Passages(unit="lines", max_words=2)})
        with pytest.raises(TypeError):
            prepare_passages(shorter, tmp_path / "run")
    assert prepare_passages(make_data(tmp_path / "in", {"text": "a b c d"}), tmp_path / "run").texts([0]) == ["a b c d"]


def test_files_that_change_while_passages_are_cut_are_refused(tmp_path: Path, monkeypatch):
    data = make_data(tmp_path / "in", {"text": "a"})

    def growing(*arguments: Any) -> Iterator[tuple[str, int]]:
        yield from passage_texts(*arguments)
        make_data(tmp_path / "in", {"text": "a"}, {"text": "b"})

    with monkeypatch.context() as patch:
        patch.setattr(passages, "passage_texts", growing)
        with pytest.raises(RecipeError, match=r"folder: .*in changed while it was read; start again when it is done$"):
            prepare_passages(data, tmp_path / "run")
    assert prepare_passages(data, tmp_path / "run").texts(range(2)) == ["a", "b"]


def test_bad_data_leaves_nothing_that_would_be_taken_for_good(tmp_path: Path):
    with pytest.raises(RecipeError, match="no text in 2 rows"):
        prepare_passages(make_data(tmp_path / "in", {"text": " "}, {"text": "--"}), tmp_path / "run")
    with pytest.raises(RecipeError, match="line 2: 'text' holds the number 3"):
        prepare_passages(make_data(tmp_path / "in", {"text": "a"}, {"text": 3}), tmp_path / "run")
    assert not [path for path in (tmp_path / "run" / "prepared").iterdir() if not path.name.startswith(".")]
    assert len(prepare_passages(make_data(tmp_path / "in", {"text": "a"}), tmp_path / "run")) == 1


def test_every_rank_gets_the_same_store_or_the_same_error(tmp_path: Path):
    make_data(tmp_path / "good", {"text": "a"}, {"text": "b"})
    make_data(tmp_path / "bad", {"text": "a"}, {"text": 3})
    folders = [str(tmp_path / name) for name in ("good", "bad", "good")]
    request = {"folders": folders, "run": str(tmp_path / "run")}
    one, other = run_on_ranks("prepare_failure.py", 2, request, tmp_path, timeout=500)
    assert one == other and one[0] == one[2]
    assert one[1].endswith("line 2: 'text' holds the number 3, text is needed; set fields.text to a column of text")


# --------------------------------------------------------------------------- a model from nothing


@pytest.mark.parametrize("pieces", ["text", "identifiers"])
def test_the_tokenizer_gives_every_text_back(pieces: Any, tmp_path: Path):
    texts = [CODE, "def get_name(): return name", "   indented\n\n\n", "", " ", "ẞß ǅ ١٢٣ _"]
    settings = BuildTokenizer(vocab_size=350, pieces=pieces)
    train_tokenizer(settings, iter(texts)).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids and ids.count(ids[0]) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) <= 350


def test_identifiers_are_split_only_if_asked():
    texts = ["getHTTPName_v12"] * 50
    split = train_tokenizer(BuildTokenizer(vocab_size=400, pieces="identifiers"), iter(texts))
    assert split.tokenize(texts[0], add_special_tokens=False) == ["get", "HTTP", "Name", "_", "v", "12"]
    whole = train_tokenizer(BuildTokenizer(vocab_size=400, pieces="text"), iter(texts))
    assert "getHTTPName" in whole.tokenize(texts[0])


def test_words_keep_letters_and_digits_alone():
    texts = ["def getHTTPName_v12(x): -> 'Über'"] * 50
    words = train_tokenizer(BuildTokenizer(vocab_size=400, pieces="words"), iter(texts))
    found = words.tokenize(texts[0], add_special_tokens=False)
    assert found[:5] == ["def", "get", "http", "name", "v12"] and found[5] == "x"
    assert words.decode(words("HTTPName")["input_ids"], skip_special_tokens=True) == "httpname"


def build(data: PassagesData, seed: int, run: Path) -> Path:
    return build_start(make_build(), data, lambda: passages_alone(data, Counter(), None), "language_model", seed, run)


def test_a_built_model_loads_and_its_end_token_can_learn(tmp_path: Path):
    data = make_data(tmp_path / "in", {"text": CODE}, {"text": "more text"})
    folder = build(data, 5, tmp_path / "run")
    source = resolve_model(BuildStart(build=make_build()), previous=None, previous_kind="encoder", built=folder)
    assert source == ModelSource(folder, str(folder), None)
    model: Any = load_causal_lm(folder, torch.float32, "sdpa")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    embeddings = model.get_input_embeddings()
    assert embeddings.weight.shape == (400, 16) and embeddings.padding_idx is None
    assert embeddings.weight[tokenizer.eos_token_id].norm() > 0
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    again = build(data, 5, tmp_path / "elsewhere" / "run")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    assert build(data, 6, tmp_path / "run") != folder == build(data, 5, tmp_path / "run")


# --------------------------------------------------------------------------- where models are


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    return build(make_data(folder / "in", {"text": "some text"}), 1, folder)


def resolve(start: Any, previous: Path | None = None, kind: Literal["encoder", "lm"] = "encoder") -> ModelSource:
    return resolve_model(start, previous=previous, previous_kind=kind, built=None)


@pytest.mark.parametrize("lacking", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_lacks_a_file_is_refused_by_its_name(built: Path, tmp_path: Path, lacking: str):
    folder = Path(shutil.copytree(built, tmp_path / "model"))
    assert resolve(FolderStart(folder=str(folder))) == ModelSource(folder, str(folder))
    (folder / lacking).unlink()
    with pytest.raises(RecipeError, match=f"lacks .*{lacking.split('.')[-1]}.*; add what is missing"):
        resolve(FolderStart(folder=str(folder)))


def test_missing_folders_and_bare_adapters_are_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match="does not exist"):
        resolve(FolderStart(folder=str(tmp_path / "none")))
    bare_adapter(tmp_path, "a/b")
    with pytest.raises(RecipeError, match=r"lacks config\.json, .* it holds an adapter, so name its base or an export"):
        resolve(FolderStart(folder=str(tmp_path)), kind="lm")


def bare_adapter(folder: Path, base: object) -> Path:
    """An export's adapter files, the weights empty."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (folder / "adapter_model.safetensors").touch()
    return folder


def test_previous_is_the_export_its_adapter_or_its_language_model(built: Path, tmp_path: Path):
    full, lora = tmp_path / "full", tmp_path / "lora"
    shutil.copytree(built, full / "export")
    shutil.copytree(built, full / "export" / "lm")
    assert resolve("previous", full).folder == full / "export"
    assert resolve("previous", full, "lm").folder == full / "export" / "lm"
    bare_adapter(lora / "export", str(built))
    assert resolve("previous", lora) == ModelSource(built, str(built), lora / "export")


def test_a_folder_with_an_adapter_is_the_adapter_on_its_base(built: Path, tmp_path: Path, monkeypatch):
    lora = bare_adapter(tmp_path / "export", str(built))
    assert resolve(FolderStart(folder=str(lora))) == ModelSource(built, str(built), lora)
    monkeypatch.chdir(tmp_path)
    assert resolve(FolderStart(folder="export")) == ModelSource(built, str(built), lora)
    merged = Path(shutil.copytree(built, lora / "merged"))
    assert resolve(FolderStart(folder=str(merged))) == ModelSource(merged, str(merged))
    monkeypatch.setattr(models, "snapshot_download", lambda *_, **__: str(built))
    on_hub = bare_adapter(tmp_path / "other", "a/b")
    assert resolve(FolderStart(folder=str(on_hub))) == ModelSource(built, "a/b", on_hub)
    full = bare_adapter(Path(shutil.copytree(built, tmp_path / "full")), "a/b")  # whole weights count
    assert resolve(FolderStart(folder=str(full))) == ModelSource(full, str(full))


def test_an_adapter_without_its_base_or_weights_is_one_line(tmp_path: Path):
    gone = str(tmp_path / "gone")
    for base, message in (
        (gone, f"base model {gone} is gone; put it back"),
        (None, "names no base"),
        (3, "names no base"),
    ):
        with pytest.raises(RecipeError, match=message) as caught:
            resolve(FolderStart(folder=str(bare_adapter(tmp_path / "export", base))))
        assert str(caught.value).startswith(f"{tmp_path}/export/adapter_config.json: ")
    (tmp_path / "export" / "adapter_config.json").write_text("{")
    with pytest.raises(RecipeError, match="names no base model; write its hub id or folder"):
        resolve(FolderStart(folder=str(tmp_path / "export")))
    (bare_adapter(tmp_path / "export", "a/b") / "adapter_model.safetensors").rename(tmp_path / "export" / "x.bin")
    with pytest.raises(RecipeError, match=r"export: lacks the adapter's weights \(adapter_model\.safetensors\)"):
        resolve(FolderStart(folder=str(tmp_path / "export")))


def response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co/a/b"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError("x", response=response(403)), "https://huggingface.co/a/b and set HF_TOKEN"),
        (errors.RepositoryNotFoundError("x", response=response(404)), "not found on the hub"),
        (
            errors.HfHubHTTPError("x", response=response(401)),
            "HTTP status 401; ask for access at https://huggingface.co/a/b",
        ),
        (errors.HfHubHTTPError("x", response=response(503)), "HTTP status 503; try again later"),
        (
            errors.LocalEntryNotFoundError("x"),
            "cannot be reached .* connect to the network, or put the model in a folder",
        ),
        (httpx2.ReadTimeout("x"), r"broke off \(ReadTimeout\)"),
    ],
)
def test_hub_failures_are_one_line_with_the_way_out(error: Exception, message: str, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(models, "snapshot_download", fail)
    with pytest.raises(RecipeError, match=message) as caught:
        resolve(HubStart(hub="a/b"))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("start: a/b: ")


def test_a_hub_model_is_fetched_without_code_or_pickles_and_keeps_its_id(built: Path, monkeypatch):
    asked = {}

    def fetch(hub: str, **settings: object) -> str:
        asked.update(settings, hub=hub)
        return str(built)

    monkeypatch.setattr(models, "snapshot_download", fetch)
    assert resolve(HubStart(hub="a/b")) == ModelSource(built, "a/b")
    assert asked["hub"] == "a/b"
    names = ["model-00001-of-2.safetensors", "config.json", "tokenizer.model", "merges.txt", "vocab.txt"]
    never = ["pytorch_model.bin", "modeling.py", "original/x.safetensors", "tokenizer.py", "model.gguf", "x.pkl"]
    never += ["flax_model.msgpack", "tf_model.h5", "rust_model.ot"]  # as beside BERT
    kept = filter_repo_objects(
        [*names, *never], allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(kept) == names


def test_offline_and_uncached_says_so():
    with pytest.raises(RecipeError, match="the hub cannot be reached"):
        resolve(HubStart(hub="nobody/nothing"))


def test_encoder_backbone_loads_from_the_same_folder(built: Path):
    model: Any = load_encoder_backbone(built, torch.float32)
    assert model.config.hidden_size == 16
