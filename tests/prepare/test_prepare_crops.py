"""Documents as token ids for crops: read, tokenized whole, stored once for all runs."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from distributed import run_on_ranks
from transformers.utils import logging

from toolkit.data import pair_records, stdlib_corpus
from toolkit.data.texts import document_texts
from toolkit.data.train_tokenizer import train_tokenizer
from toolkit.methods.recontriever import prepared as module
from toolkit.methods.recontriever.keys import ReContrieverData
from toolkit.methods.recontriever.prepared import prepare_crops
from toolkit.models.backbone import load_tokenizer
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.models import BuildTokenizer
from toolkit.recipe.texts import TextsData


def make_data(folder: Path, *rows: object) -> ReContrieverData:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_settings(folder)


def make_settings(folder: Path, **changes: Any) -> ReContrieverData:
    crops = {"chunk_tokens": 8, "min_ratio": 0.2, "max_ratio": 0.5, "delete": 0.1} | changes
    return ReContrieverData.model_validate({"sources": [{"folder": str(folder)}], "crops": crops})


def save_tokenizer(folder: Path, vocab_size: int, **changes: Any) -> Path:
    tokenizer = train_tokenizer(BuildTokenizer(vocab_size=vocab_size, pieces="text"), iter(["ab ab abc"] * 9))
    for key, value in changes.items():
        setattr(tokenizer, key, value)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": vocab_size}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """Its tokenizer says that texts have at most 16 tokens."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), 300, model_max_length=16)


def stores(run: Path) -> list[str]:
    """Names in the cache, half-written ones too; not the remembered hashes of files."""
    names = sorted(path.name for path in (run.parent / "prepared").iterdir())
    return [name for name in names if not name.startswith("content_")]


def test_documents_are_tokenized_whole_and_without_special_ids(tmp_path: Path, tokenizer: Path, capsys, caplog):
    rows = [{"text": "ab abc"}, {"text": " "}, {"text": "ab " * 50_000}, {"text": "xyz"}]
    logging.set_verbosity_warning()  # as a user's own program may have it
    try:
        store = prepare_crops(make_data(tmp_path / "in", *rows), tokenizer, tmp_path / "run")
        plain = load_tokenizer(tokenizer)
        assert len(plain("ab " * 99)["input_ids"]) > 16
    finally:
        logging.set_verbosity_error()
    said = capsys.readouterr().out
    expected = [plain(row["text"])["input_ids"][1:] for row in rows if row["text"].strip()]
    assert [store.documents[i].tolist() for i in range(3)] == expected
    assert min(map(min, expected)) > max(plain.bos_token_id, plain.eos_token_id) and len(expected[1]) > 50_000
    assert store.examples == ["ab abc", ("ab " * 50_000)[:2000], "xyz"]
    tokens = sum(map(len, expected))
    assert store.meta["documents"] == 3 and store.meta["tokens"] == tokens
    assert said == f"data: 4 rows, 1 of them without text; 3 documents, {tokens:,} tokens, digest {store.digest}\n"
    assert caplog.text.count("longer than the specified maximum") == 1  # the call above, which asked for it


def test_many_documents_go_through_in_parts(tmp_path: Path, tokenizer: Path, monkeypatch):
    rows = [{"text": "ab " * (i % 40 + 1)} for i in range(300)]
    whole = prepare_crops(make_data(tmp_path / "in", *rows), tokenizer, tmp_path / "a" / "run")
    sizes: list[int] = []
    in_parts = module._with_ids
    monkeypatch.setattr(module, "_TEXTS_AT_ONCE", 20)
    monkeypatch.setattr(module, "_CHARACTERS_AT_ONCE", 900)
    monkeypatch.setattr(module, "_with_ids", lambda texts, t: sizes.append(len(texts)) or in_parts(texts, t))
    assert prepare_crops(make_data(tmp_path / "in", *rows), tokenizer, tmp_path / "b" / "run").digest == whole.digest
    assert sum(sizes) == 300 and max(sizes) == 20 and min(sizes) < 10


def test_the_store_is_used_by_other_runs_until_text_or_tokenizer_change(tmp_path: Path, tokenizer: Path, monkeypatch):
    data = make_data(tmp_path / "in", {"text": "ab abc"})
    first = prepare_crops(data, tokenizer, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", None)  # writing again would fail
        assert prepare_crops(data, tokenizer, tmp_path / "run").digest == first.digest
        other = make_settings(tmp_path / "in", delete=0.3, chunk_tokens=99)
        assert prepare_crops(other, tokenizer, tmp_path / "another").digest == first.digest
        with pytest.raises(TypeError):
            prepare_crops(make_data(tmp_path / "in", {"text": "ab abcd"}), tokenizer, tmp_path / "run")
    changed = prepare_crops(make_data(tmp_path / "in", {"text": "ab abcd"}), tokenizer, tmp_path / "run")
    assert changed.digest != first.digest and changed.examples == ["ab abcd"]
    words = save_tokenizer(tmp_path / "words", 301)
    assert prepare_crops(data, words, tmp_path / "run").digest != first.digest
    assert len(stores(tmp_path / "run")) == 3


def test_equal_content_shares_a_store_whatever_its_time_and_place(tmp_path: Path, tokenizer: Path, monkeypatch):
    data = make_data(tmp_path / "in", {"text": "ab abc", "title": "x"})
    prepare_crops(data, tokenizer, tmp_path / "run")
    shutil.copytree(tmp_path / "in", tmp_path / "copy")
    os.utime(tmp_path / "in" / "rows.jsonl", ns=(1, 1))
    titled = {"folder": str(tmp_path / "copy"), "fields": {"title": "title"}}
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", None)  # writing again would fail
        for place in ("in", "copy"):
            prepare_crops(make_settings(tmp_path / place), tokenizer, tmp_path / "run")
        with pytest.raises(TypeError):  # the control: equal files, read otherwise
            prepare_crops(TextsData.model_validate({"sources": [titled]}), tokenizer, tmp_path / "run")
    assert len(stores(tmp_path / "run")) == 1


def test_a_hub_dataset_is_known_by_its_content_and_not_by_its_id(tmp_path: Path, tokenizer: Path, monkeypatch):
    data = TextsData.model_validate({"sources": [{"hub": "a/b"}]})
    seen = []
    for text in ("ab abc", "ab abc", "xyz"):
        dataset = datasets.Dataset.from_list([{"text": text}])
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, dataset=dataset, **__: dataset)
        seen.append((prepare_crops(data, tokenizer, tmp_path / "run").examples, len(stores(tmp_path / "run"))))
    assert seen == [(["ab abc"], 1), (["ab abc"], 1), (["xyz"], 2)]


def test_files_that_change_while_they_are_read_are_refused(tmp_path: Path, tokenizer: Path, monkeypatch):
    data, run = make_data(tmp_path / "in", {"text": "ab"}), tmp_path / "run"

    def growing(*arguments: Any) -> Iterator[str]:
        yield from document_texts(*arguments)
        make_data(tmp_path / "in", {"text": "ab"}, {"text": "abc"})

    with monkeypatch.context() as patch:
        patch.setattr(module, "document_texts", growing)
        with pytest.raises(RecipeError, match=r"folder: .*in changed while it was read; start again when it is done$"):
            prepare_crops(data, tokenizer, run)
    assert stores(run) == []
    assert prepare_crops(data, tokenizer, run).meta["documents"] == 2


def test_titles_and_several_sources_are_read_in_order(tmp_path: Path, tokenizer: Path):
    make_data(tmp_path / "a", {"text": "ab", "name": "abc"}, {"text": "c", "name": None})
    make_data(tmp_path / "b", {"text": "xyz"})
    sources = [{"folder": str(tmp_path / "a"), "fields": {"title": "name"}}, {"folder": str(tmp_path / "b")}]
    store = prepare_crops(TextsData.model_validate({"sources": sources}), tokenizer, tmp_path / "run")
    assert store.examples == ["abc ab", "c", "xyz"]
    untitled = [{"folder": str(tmp_path / "a")}, sources[1]]
    assert (
        prepare_crops(TextsData.model_validate({"sources": untitled}), tokenizer, tmp_path / "run").examples[0] == "ab"
    )


def test_the_standard_library_is_a_source(tmp_path: Path, tokenizer: Path, monkeypatch):
    files = [("a.py", "ab = abc\n"), ("b.py", "\n"), ("c.py", "xyz\n")]
    monkeypatch.setattr(stdlib_corpus, "training_files", lambda: files)
    monkeypatch.setattr(pair_records, "summary", lambda: {"digest": "0"})
    data = TextsData.model_validate({"sources": [{"stdlib": "files"}]})
    assert prepare_crops(data, tokenizer, tmp_path / "run").examples == ["ab = abc\n", "xyz\n"]
    monkeypatch.setattr(pair_records, "summary", lambda: {"digest": "1"})
    prepare_crops(data, tokenizer, tmp_path / "run")
    assert len(stores(tmp_path / "run")) == 2


def test_bad_data_leaves_nothing_behind(tmp_path: Path, tokenizer: Path):
    run = tmp_path / "run"
    with pytest.raises(RecipeError, match="no text in 2 rows; name a source that holds some"):
        prepare_crops(make_data(tmp_path / "in", {"text": " "}, {"text": ""}), tokenizer, run)
    with pytest.raises(RecipeError, match="line 2: 'text' holds the number 3"):
        prepare_crops(make_data(tmp_path / "in", {"text": "a"}, {"text": 3}), tokenizer, run)
    (tmp_path / "none").mkdir()
    shutil.copy(tokenizer / "config.json", tmp_path / "none")
    with pytest.raises(RecipeError, match=r"start: .*none: cannot be loaded"):
        prepare_crops(make_data(tmp_path / "in", {"text": "a"}), tmp_path / "none", run)
    assert stores(run) == []
    assert prepare_crops(make_data(tmp_path / "in", {"text": "a"}), tokenizer, run).meta["documents"] == 1


def test_of_two_runs_at_a_time_the_first_to_finish_is_kept(tmp_path: Path, tokenizer: Path, monkeypatch):
    data = make_data(tmp_path / "in", {"text": "ab abc"})
    write, finished = module.write_documents, []

    def overtaken(documents: Any, folder: Path) -> None:
        write(documents, folder)
        if not finished:  # another run starts and finishes while this one writes
            finished.append(folder)
            prepare_crops(data, tokenizer, tmp_path / "other")
            [name] = [name for name in stores(tmp_path / "run") if not name.startswith(".")]
            finished.append(os.stat(tmp_path / "prepared" / name).st_ino)

    monkeypatch.setattr(module, "write_documents", overtaken)
    store = prepare_crops(data, tokenizer, tmp_path / "run")
    [name] = stores(tmp_path / "run")
    assert os.stat(tmp_path / "prepared" / name).st_ino == finished[1] and store.meta["documents"] == 1


def test_every_rank_gets_the_same_store_or_the_same_error(tmp_path: Path, tokenizer: Path):
    make_data(tmp_path / "good", {"text": "a"}, {"text": "b"})
    make_data(tmp_path / "bad", {"text": "a"}, {"text": 3})
    (tmp_path / "none").mkdir()
    shutil.copy(tokenizer / "config.json", tmp_path / "none")
    good, bad = ([str(tmp_path / name), str(tokenizer)] for name in ("good", "bad"))
    cases = [good, bad, [good[0], str(tmp_path / "none")], good]
    request = {"cases": cases, "run": str(tmp_path / "runs" / "run")}
    one, other = run_on_ranks("crop_ranks.py", 2, request, tmp_path, timeout=500)
    assert one == other and one[0] == one[3]
    assert one[1].endswith("line 2: 'text' holds the number 3, text is needed; set fields.text to a column of text")
    assert one[2].startswith("start: ") and len(stores(tmp_path / "runs" / "run")) == 1


def test_ids_without_an_embedding_are_in_no_document(tmp_path: Path):
    """The padding token is text like any other where the model has no embedding for it."""
    folder = save_tokenizer(tmp_path / "model", 300)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"pad_token": "<PADX>"})
    tokenizer.split_special_tokens = False
    tokenizer.save_pretrained(folder)
    rows, found = len(tokenizer) - 1, []
    for count in (rows + 1, rows):
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": count}))
        store = prepare_crops(make_data(tmp_path / "in", {"text": "ab <PADX> abc"}), folder, tmp_path / "run")
        found.append(rows in store.documents[0])
    assert found == [True, False] and len(stores(tmp_path / "run")) == 2
