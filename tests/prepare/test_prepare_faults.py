"""Faulty rows of a stage: what is skipped is said by every run; and files that change or vanish once they were read."""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from beir import write_beir

from toolkit.data.faults import skipping
from toolkit.data.pairs import PairStore
from toolkit.data.spans import PassageStore
from toolkit.data.texts import passage_texts
from toolkit.data.train_tokenizer import train_tokenizer
from toolkit.methods.recontriever.crops import CropStore
from toolkit.methods.recontriever.keys import ReContrieverData
from toolkit.methods.recontriever.prepared import prepare_crops
from toolkit.prepare.build import build_start
from toolkit.prepare.negatives import with_negatives
from toolkit.prepare.pairs import prepare_pairs
from toolkit.prepare.passages import prepare_passages
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.models import BuildModel, BuildTokenizer, EncoderSettings
from toolkit.recipe.pairs import PairsData
from toolkit.recipe.texts import PassagesData

ENCODER = EncoderSettings(
    pooling="eos", normalize=True, append_eos=True, query_prefix="", passage_prefix="", max_tokens=8, eval_max_tokens=8
)
ROWS: dict[str, list[Any]] = {
    "passages": [{"text": f"text {i}"} for i in range(6)],
    "groups": [["a", f"b {i}"] for i in range(6)],
    "crops": [{"text": f"words of text {i}"} for i in range(6)],
    "pairs": [{"query": f"query {i}", "positive": f"good {i}"} for i in range(6)],
}
KEYS: dict[str, dict[str, Any]] = {
    "passages": {"passages": {"unit": "lines", "max_words": 4}, "interleave": 1},
    "groups": {},
    "crops": {"crops": {"chunk_tokens": 8, "min_ratio": 0.2, "max_ratio": 0.5, "delete": 0.1}},
    "pairs": {},
}
SECTIONS = {"crops": ReContrieverData, "pairs": PairsData, "beir": PairsData}
SECTIONS |= dict.fromkeys(("passages", "groups", "documents"), PassagesData)
KINDS = list(ROWS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(BuildTokenizer(vocab_size=300, pieces="text"), iter(["words of text"])).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300}))
    return folder


@pytest.fixture
def prepare(tmp_path: Path, tokenizer: Path) -> Callable[..., Any]:
    def prepared(kind: str, faulty_rows: str = "refuse", run: str = "run", **source: Any) -> Any:
        data = data_of(kind, tmp_path / "in", faulty_rows, **source)
        if kind == "pairs":
            return prepare_pairs(data, ENCODER, tokenizer, tmp_path / run, 0)
        return (
            prepare_crops(data, tokenizer, tmp_path / run)
            if kind == "crops"
            else prepare_passages(data, tmp_path / run)
        )

    return prepared


def data_of(kind: str, folder: Path, faulty_rows: str, **source: Any) -> Any:
    form = {"crops": "documents", "passages": "documents"}.get(kind, kind)
    raw = {"sources": [{"folder": str(folder), "format": form, **source}], "faulty_rows": faulty_rows, **KEYS[kind]}
    return SECTIONS[kind].model_validate(raw)


def write(folder: Path, rows: list[Any], *added: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_bytes(b"\n".join([*(json.dumps(row).encode() for row in rows), *added]))
    return folder / "rows.jsonl"


def said(path: Path) -> list[str]:
    return [
        "data: faulty rows skipped: 3 (2 not JSON, 1 not UTF-8); the first of each kind:",
        *(f"  {path}: line {n}: not JSON (Expecting value at column 1); write one object a line" for n in (7, 9)),
        f"  {path}: line 8: byte 1 is not UTF-8; convert the file to UTF-8",
    ]


def contents(store: PassageStore | CropStore | PairStore) -> list[Any]:
    """Everything that training takes from a store."""
    if isinstance(store, PassageStore):
        return store.texts(range(len(store)))
    rows = [store.documents] if isinstance(store, CropStore) else [store.query, store.document, store.positives]
    return [[np.array(part[i]).tolist() for i in range(len(part))] for part in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_rows_are_said_by_every_run_and_modes_share_no_result(kind: str, prepare, tmp_path: Path, capsys):
    path = write(tmp_path / "in", ROWS[kind])
    whole = prepare(kind)
    expected = contents(whole)
    assert "skipped" not in capsys.readouterr().out
    assert contents(prepare(kind, "skip")) == expected  # nothing was, so nothing is said
    assert "skipped" not in capsys.readouterr().out
    write(tmp_path / "in", ROWS[kind], b"?", b"\xff", b"!")
    for run in ("run", "run", "other"):
        store = prepare(kind, "skip", run)
        assert store.digest == whole.digest and contents(store) == expected
        lines = capsys.readouterr().out.splitlines()
        assert lines[-4:] == said(path) and "skipped" not in "".join(lines[:-4])
        with pytest.raises(RecipeError, match="line 7: not JSON"):
            prepare(kind, "refuse", run)
    write(tmp_path / "in", [], b"?", b"\xff")
    with pytest.raises(RecipeError, match=r"no row can be used, 2 are faulty; mend them, the last: .*line 2: byte 1"):
        prepare(kind, "skip")


def test_a_limit_counts_rows_of_use(prepare, tmp_path: Path, capsys):
    path = write(tmp_path / "in", ROWS["pairs"], b"?", b"\xff", b"!")
    assert len(prepare("pairs", "skip", limit=6)) == 6
    assert capsys.readouterr().out.splitlines()[-4:] == said(path)  # counted once, though they are met twice
    with pytest.raises(RecipeError, match="limit: 7 rows are more than the source's 6"):
        prepare("pairs", "skip", limit=7)


def test_mined_rows_say_what_was_skipped(tmp_path: Path, capsys):
    folder = write_beir(tmp_path / "in")
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "d0", "text": "w1 another text"}\n')
    source = {"folder": str(folder), "format": "beir", "split": "dev"}
    mine = {"by": "bm25", "text": "prose", "ranks": [1, 40], "negatives": 2}
    raw: dict[str, Any] = {"sources": [source], "negatives": 1, "mine": mine}
    for _ in range(2):
        with_negatives(PairsData.model_validate(raw | {"faulty_rows": "skip"}), None, tmp_path / "run", 0, "cpu")
        said = capsys.readouterr().out
        assert (
            "data: faulty rows skipped: 1 (1 of an id met before); the first" in said
            and "line 61: _id 'd0' stands" in said
        )
    with pytest.raises(RecipeError, match="line 61: _id 'd0' stands in an earlier line too"):
        with_negatives(PairsData.model_validate(raw), None, tmp_path / "run", 0, "cpu")


# --------------------------------------------------------------------------- files that change


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["grows", "vanishes", "is garbage"])
def test_a_file_that_changes_after_it_was_prepared_changes_nothing_for_the_run(
    kind: str, change: str, prepare, tmp_path: Path
):
    path = write(tmp_path / "in", ROWS[kind])
    expected = contents(prepare(kind))
    store = prepare(kind)
    if change == "vanishes":
        path.unlink()
        (tmp_path / "in").rmdir()
    else:
        write(
            tmp_path / "in",
            ROWS[kind][: 6 if change == "grows" else 0],
            json.dumps(ROWS[kind][0]).encode() + b"\n" + b"\xff"[change == "grows" :],
        )
    assert contents(store) == expected
    if change == "grows":  # another stage, or the command started again: other data, which a checkpoint refuses
        assert prepare(kind).digest != store.digest
    else:
        problem = "does not exist; name a folder" if change == "vanishes" else "line 2: byte 1 is not UTF-8"
        with pytest.raises(RecipeError, match=problem):
            prepare(kind)


def test_a_file_that_grows_while_a_tokenizer_is_trained_is_refused(tmp_path: Path):
    write(tmp_path / "in", ROWS["passages"])
    data = data_of("passages", tmp_path / "in", "skip")
    build = BuildModel(
        hidden_size=16, layers=1, heads=2, kv_heads=1, intermediate_size=32, max_tokens=64, tie_embeddings=True,
        zero_residual=False, tokenizer=BuildTokenizer(vocab_size=300, pieces="text"),
    )  # fmt: skip

    def growing(*arguments: Any):
        yield from passage_texts(*arguments)
        write(tmp_path / "in", ROWS["passages"], b'{"text": "more"}')

    def texts(read: Any) -> Any:
        return lambda: (text for text, _ in read(data, Counter(), skipping("skip")))

    with pytest.raises(RecipeError, match=r"folder: .*in changed while it was read; start again when it is done$"):
        build_start(build, data, texts(growing), "language_model", 0, tmp_path / "run")
    write(tmp_path / "in", ROWS["passages"], b"?")  # and what is faulty is left out here too
    assert (
        build_start(build, data, texts(passage_texts), "language_model", 0, tmp_path / "run") / "tokenizer.json"
    ).is_file()


def test_a_damaged_note_of_a_files_content_is_named(prepare, tmp_path: Path):
    write(tmp_path / "in", ROWS["pairs"])
    prepare("pairs")
    (note,) = (tmp_path / "prepared").glob("content_*.json")
    for broken in ("{", "{}", "[]"):
        note.write_text(broken)
        with pytest.raises(RecipeError, match=r"content_.*\.json: is damaged .*; delete it, and it is made again"):
            prepare("pairs")
    os.remove(note)
    assert len(prepare("pairs")) == 6
