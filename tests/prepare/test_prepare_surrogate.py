"""Vectors of a surrogate: those of the retriever, block by block, kept by content, and what is refused."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from retrievers import ragged_texts, tiny_retriever
from surrogates import data_of, prepared, rows_of_topics, write_source
from tiny_retriever import CASES, make

from toolkit.data.pair_records import read_pairs
from toolkit.data.pairs import PairStore
from toolkit.data.surrogate import SurrogateVectors, store_texts
from toolkit.export.write import load_export
from toolkit.prepare import surrogate as module
from toolkit.prepare.surrogate import surrogate_vectors
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.pairs import PairsData
from toolkit.recipe.surrogate import Bm25Surrogate, PreviousSurrogate, RetrieverSurrogate, Surrogate
from toolkit.retrieval.embed import embed_texts
from toolkit.retrieval.retrievers import Loaded

PREVIOUS = PreviousSurrogate(by="previous")
BM25 = Bm25Surrogate(by="bm25", text="prose", svd=8)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two retrievers: of unit length, and not."""
    cases = [CASES["bert_full"], CASES["qwen2_full"]]
    return [
        make(case, tmp_path_factory.mktemp("base")).write(tmp_path_factory.mktemp("o") / "export") for case in cases
    ]


class Given:
    """Data, their store, and what a call needs besides."""

    def __init__(self, folder: Path, model: Path, *sources: list[dict[str, Any]]) -> None:
        written = [write_source(folder / f"source_{i}", rows) for i, rows in enumerate(sources)]
        self.data: PairsData = data_of(*written)
        self.run = folder / "runs" / "run"
        self.run.mkdir(parents=True, exist_ok=True)
        self.store: PairStore = prepared(self.data, model, self.run)
        self.model = model

    def vectors(self, surrogate: Surrogate, export: Path | None = None, **others: Any) -> SurrogateVectors:
        arguments: dict[str, Any] = {"run": self.run, "seed": 0, "device": "cpu"} | others
        return surrogate_vectors(surrogate, self.data, self.store, export or self.model, **arguments)

    def texts(self, side: Any) -> list[str]:
        records = [record for source in self.data.sources for record in read_pairs(source, Counter())]
        return list(store_texts(self.store, records, side))

    def kept(self) -> set[str]:
        return {path.name for path in (self.run.parent / "prepared").glob("*surrogate_*")}


@pytest.fixture
def given(tmp_path: Path, exports: list[Path]) -> Given:
    return Given(tmp_path, exports[0], rows_of_topics(23), rows_of_topics(10, 1))


def test_vectors_are_those_of_the_retriever(given: Given, exports: list[Path], monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(module, "BLOCK", 8)  # several blocks, the last one smaller
    for export in exports:
        found = given.vectors(PREVIOUS, export)
        retriever = load_export(export, "cpu")
        for side, kind, array in (("query", "query", found.query), ("document", "passage", found.document)):
            expected = embed_texts(retriever, given.texts(side), kind)
            assert isinstance(array, np.memmap) and array.dtype == np.float16 and not array.flags.writeable
            assert np.abs(array - expected).max() < 2e-3 * np.abs(expected).max()
            assert np.abs(array[1:] - expected[:-1]).max() > 0.01  # the control: in another order they differ
        told = f"surrogate: {len(found.query)} query and {len(found.document)} document vectors of 32 dimensions\n"
        assert capsys.readouterr().out == told
    assert not list(given.run.glob("prepared/*"))  # nothing of the work is left


def test_a_retriever_of_a_folder_with_other_settings(given: Given, exports: list[Path]):
    def of(**keys: Any) -> SurrogateVectors:
        return given.vectors(RetrieverSurrogate.model_validate({"by": "retriever", "from": str(exports[1]), **keys}))

    retriever = load_export(exports[1], "cpu")
    assert np.array_equal(of().query, given.vectors(PREVIOUS, exports[1]).query)
    changed = of(normalize=True, query_prefix="ask: ", max_tokens=6)
    assert len(given.kept()) == 2
    settings = retriever.settings.model_copy(update={"query_prefix": "ask: ", "eval_max_tokens": 6})
    plain = embed_texts(retriever._replace(settings=settings), given.texts("query"), "query")
    expected = plain / np.linalg.norm(plain, axis=1, keepdims=True)
    assert np.abs(changed.query - expected).max() < 1e-3


def test_svd_is_fitted_on_queries_and_leaves_unit_length(given: Given, exports: list[Path]):
    surrogate = PreviousSurrogate(by="previous", svd=5)
    found, whole = given.vectors(surrogate, exports[1]), given.vectors(PREVIOUS, exports[1])
    query, document = (side.astype(np.float64) for side in whole[:2])
    basis = np.linalg.svd(query)[2][:5].T
    for array, expected in ((found.query, query @ basis), (found.document, document @ basis)):
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        products = array.astype(np.float64) @ array.astype(np.float64).T
        assert array.shape[1] == 5 and np.abs(products - expected @ expected.T).max() < 5e-3
        assert np.abs(products.diagonal() - 1).max() < 2e-3
    of_documents = document @ np.linalg.svd(document)[2][:5].T  # the control
    of_documents /= np.linalg.norm(of_documents, axis=1, keepdims=True)
    wide = found.document.astype(np.float64)
    assert np.abs(wide @ wide.T - of_documents @ of_documents.T).max() > 0.02


def test_bm25_brings_texts_with_shared_words_together(given: Given, capsys):
    found = given.vectors(BM25)
    said = capsys.readouterr().out
    assert "surrogate: " in said and "BM25 reads" in said and "data.clusters.surrogate.language" in said
    norms = np.linalg.norm(found.document.astype(np.float32), axis=1)
    assert np.allclose(norms, 1, atol=2e-3)
    rows = np.arange(23)
    query, document = found.of_rows(given.store, rows)
    scores = query @ document.T
    same = rows[:, None] % 4 == rows % 4
    assert scores[same].mean() > 0.5 + scores[~same].mean()


def test_texts_without_a_word_have_zero_vectors_and_are_counted(tmp_path: Path, exports: list[Path], capsys):
    rows = rows_of_topics(20)
    rows[3]["positives"] = ["zzz yyy"]
    given = Given(tmp_path, exports[0], rows)
    found = given.vectors(BM25)
    zero = ~found.document.any(1)
    said = capsys.readouterr().out
    count = len(found.document)
    told = (
        f"surrogate: 1 of {count} document texts share no word with the first 100,000 queries; their vectors are zero"
    )
    assert zero.sum() == 1 and told in said.splitlines()


def test_vectors_are_made_once_for_what_decides_them(
    given: Given, exports: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = given.vectors(PREVIOUS)
    given.vectors(BM25)
    assert len(given.kept()) == 2
    monkeypatch.setattr(module, "encode", None)  # making them again would fail
    monkeypatch.setattr(module, "word_weights", None)
    assert np.array_equal(given.vectors(PREVIOUS).query, first.query)
    given.vectors(BM25, at="objective.false_negatives.surrogate")
    other_run = given.run.with_name("other")
    assert np.array_equal(given.vectors(PREVIOUS, run=other_run).query, first.query)
    moved = shutil.copytree(exports[0], tmp_path / "moved")
    assert np.array_equal(given.vectors(PREVIOUS, moved).query, first.query)  # the same content elsewhere
    for surrogate, export in (
        (PREVIOUS, exports[1]),
        (PreviousSurrogate(by="previous", svd=4), exports[0]),
        (BM25.model_copy(update={"svd": 7}), None),
        (BM25.model_copy(update={"language": "none"}), None),
    ):
        with pytest.raises(TypeError):
            given.vectors(surrogate, export)
    changed = Given(tmp_path, exports[0], rows_of_topics(23), rows_of_topics(10, 2))
    with pytest.raises(TypeError):
        changed.vectors(PREVIOUS)


def test_an_interrupted_run_goes_on_with_the_blocks_that_it_lacks(given: Given, monkeypatch: pytest.MonkeyPatch):
    whole = given.vectors(PREVIOUS)
    shutil.rmtree(given.run.parent / "prepared" / next(iter(given.kept())))
    monkeypatch.setattr(module, "BLOCK", 8)
    encode, blocks = module.encode, []

    def counted(*arguments: Any, **others: Any) -> Any:
        if len(blocks) == 4:
            raise KeyboardInterrupt
        blocks.append(1)
        return encode(*arguments, **others)

    monkeypatch.setattr(module, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        given.vectors(PREVIOUS)
    assert not given.kept()
    of_all = sum(-(-len(side) // 8) for side in whole[:2])
    blocks.clear()
    monkeypatch.setattr(module, "encode", lambda *arguments, **others: blocks.append(1) or encode(*arguments, **others))
    found = given.vectors(PREVIOUS)
    assert len(blocks) == of_all - 4
    assert all(np.abs(a.astype(float) - b).max() < 1e-3 for a, b in zip(found[:2], whole[:2], strict=True))


def patched(monkeypatch: pytest.MonkeyPatch, number: float, **settings: Any) -> RetrieverSurrogate:
    """A retriever in which word w7 has weights of this number."""
    retriever = tiny_retriever(**settings)
    with torch.no_grad():
        retriever.encoder.backbone.embed_tokens.weight[3 + 7] = number
    monkeypatch.setattr(module, "load_any", lambda *_: Loaded(retriever, {}))
    return RetrieverSurrogate.model_validate({"by": "retriever", "from": "broken"})


def test_vectors_that_are_not_finite_are_one_line(tmp_path: Path, exports: list[Path], monkeypatch: pytest.MonkeyPatch):
    texts = ["w9 w8", "w7 w1\nw2", *ragged_texts(18, 6)]
    rows = [{"query": text, "positives": [f"w1 {text}"]} for text in texts if "w7" not in text or text == texts[1]]
    given = Given(tmp_path, exports[0], rows)
    with pytest.raises(RecipeError) as caught:
        given.vectors(patched(monkeypatch, torch.nan))
    assert str(caught.value) == (
        "data.clusters.surrogate: vectors of 1 texts (as query) are not finite: 1 (w7 w1\\nw2); name another retriever"
    )
    with pytest.raises(RecipeError, match=r"^objective\.x: vectors of 1 texts"):
        given.vectors(patched(monkeypatch, torch.nan), at="objective.x")
    assert not given.kept()
    assert np.isfinite(given.vectors(patched(monkeypatch, 1.0)).query).all()  # the control


def test_vectors_too_large_for_16_bits_are_one_line(given: Given, monkeypatch: pytest.MonkeyPatch):
    surrogate = patched(monkeypatch, 1.0, normalize=False)
    encode = module.encode

    class Large:
        def __init__(self, vectors: Any) -> None:
            self.vectors = vectors

        def array(self) -> np.ndarray:
            found = self.vectors.array()
            found[2] *= 1e6
            return found

    monkeypatch.setattr(module, "encode", lambda *arguments: Large(encode(*arguments)))
    with pytest.raises(RecipeError) as caught:
        given.vectors(surrogate)
    told = "vectors of 1 query texts are too large for 16 bits; set normalize to true"
    assert str(caught.value) == f"data.clusters.surrogate: {told}"


@pytest.mark.parametrize(
    ("surrogate", "problem"),
    [
        (PreviousSurrogate(by="previous", svd=33), "33 dimensions cannot be had from 26 different queries"),
        (BM25.model_copy(update={"svd": 500}), "500 dimensions cannot be had from 26 different queries of "),
    ],
)
def test_an_svd_of_more_dimensions_than_there_are_is_one_line(surrogate: Surrogate, problem: str, given: Given):
    with pytest.raises(RecipeError, match=rf"^data\.clusters\.surrogate\.svd: {problem}.*; lower it to \d+ or less$"):
        given.vectors(surrogate)


def test_an_svd_above_the_width_is_told_after_the_first_block(tmp_path: Path, exports: list[Path], monkeypatch):
    given = Given(tmp_path, exports[0], rows_of_topics(90))
    monkeypatch.setattr(module, "BLOCK", 8)
    encode, blocks = module.encode, []
    monkeypatch.setattr(module, "encode", lambda *arguments: blocks.append(1) or encode(*arguments))
    width = "33 dimensions cannot be had from vectors of 32 dimensions; lower it to 32 or less"
    with pytest.raises(RecipeError, match=rf"^data\.clusters\.surrogate\.svd: {width}$"):
        given.vectors(PreviousSurrogate(by="previous", svd=33))
    assert len(blocks) == 1


def test_a_retriever_that_is_none_is_one_line_at_its_key(given: Given, tmp_path: Path):
    surrogate = RetrieverSurrogate.model_validate({"by": "retriever", "from": str(tmp_path / "nothing")})
    with pytest.raises(RecipeError, match=r"^data\.clusters\.surrogate: .*nothing: no such folder; name "):
        given.vectors(surrogate)


def test_what_a_base_model_lacks_is_told_by_keys(given: Given, tmp_path: Path):
    folder = make(CASES["bert_full"], tmp_path / "base").base.folder
    with pytest.raises(RecipeError) as caught:
        given.vectors(RetrieverSurrogate.model_validate({"by": "retriever", "from": str(folder), "pooling": "mean"}))
    lacks = "a model alone does not say how a text becomes one vector; add normalize, max_tokens"
    assert str(caught.value) == f"data.clusters.surrogate: {folder}: {lacks}"


def test_damaged_vectors_are_one_line(given: Given):
    given.vectors(PREVIOUS)
    folder = given.run.parent / "prepared" / next(iter(given.kept()))

    def problem() -> str:
        with pytest.raises(RecipeError) as caught:
            given.vectors(PREVIOUS)
        return str(caught.value)

    path = folder / "document.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2] + b"xx")
    fix = "delete it, and it is made again"
    assert problem() == f"{folder}: is damaged (document.npy is not as it was written); {fix}"
    path.write_bytes(whole[:-40])
    assert problem().startswith(f"{folder}: is damaged (")
    path.write_bytes(whole)
    meta = (folder / "meta.json").read_text()
    (folder / "meta.json").write_text("{}")
    assert problem() == f"{folder}: is damaged (meta.json lacks dim or sha256); {fix}"
    (folder / "meta.json").write_text(meta)
    np.save(path, np.zeros((3, 32), np.float16))
    record = json.loads(meta)
    record["sha256"]["document"] = module.sha256(path)
    (folder / "meta.json").write_text(json.dumps(record))
    queries, documents = len(given.store.query), len(given.store.document)
    others = f"it has vectors of other pairs: {queries} queries and 3 documents, not {queries} and {documents}"
    assert problem() == f"{folder}: is damaged ({others}); {fix}"
