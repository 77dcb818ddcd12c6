"""BM25: the formula, the two ways to find words, ties and places without a document."""

import json
import math
from pathlib import Path

import bm25s
import numpy as np
import pytest

from toolkit.retrieval import bm25
from toolkit.retrieval.bm25 import QUERY_WORDS, SETTINGS, bm25_index, bm25_neighbours, bm25_top_k
from toolkit.retrieval.words import words_of

DOCUMENTS = [
    "readFile path",
    "read_file path path",
    "write file",
    "HTTPServer2Handler",
    "other things entirely",
    "write file",
]


def formula(query: str, reading: str) -> np.ndarray:
    """Lucene's BM25 in plain fp64."""
    k1, b = SETTINGS["code" if reading == "code" else "prose"]
    documents = words_of(DOCUMENTS, reading)
    mean = sum(map(len, documents)) / len(documents)
    scores = np.zeros(len(documents))
    for word in words_of([query], reading)[0]:
        df = sum(word in document for document in documents)
        idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
        for i, document in enumerate(documents):
            tf = document.count(word)
            scores[i] += idf * tf / (tf + k1 * (1 - b + b * len(document) / mean))
    return scores


@pytest.mark.parametrize("reading", ["code", "english"])
@pytest.mark.parametrize("query", ["path of the file", "write files", "read"])
def test_scores_are_those_of_the_formula(query: str, reading: str):
    scores, indices = bm25_top_k(DOCUMENTS, [query], 10, reading=reading)
    expected = formula(query, reading)
    found = indices[0] >= 0
    assert sorted(indices[0][found]) == np.flatnonzero(expected).tolist()  # no word in common: not found
    np.testing.assert_allclose(scores[0][found], expected[indices[0][found]], rtol=1e-5)
    assert (np.diff(scores[0]) <= 0).all()


def test_ties_are_ordered_by_index_and_cut_there():
    assert bm25_top_k(DOCUMENTS, ["write"], 10, reading="code")[1][0].tolist() == [2, 5, -1, -1, -1, -1]
    assert bm25_top_k(DOCUMENTS, ["write"], 1, reading="code")[1][0].tolist() == [2]


def test_queries_without_a_known_word_find_nothing():
    scores, indices = bm25_top_k(DOCUMENTS, ["", "unheard", "the"], 3, reading="english")
    assert (indices == -1).all()
    assert (scores == 0).all()


def test_candidates_limit_what_is_found():
    candidates = [np.array([1, 2, 4])]
    unlimited = bm25_top_k(DOCUMENTS, ["read file"], 6, reading="code")[1][0].tolist()
    limited = bm25_top_k(DOCUMENTS, ["read file"], 6, reading="code", candidates=candidates)[1][0].tolist()
    assert [i for i in unlimited if i in (1, 2)] == [i for i in limited if i >= 0]
    assert 0 in unlimited


def test_words():
    assert words_of(["def HTTPServer_v2(self): return readFile2"], "code") == [
        ["def", "http", "server", "v2", "self", "return", "read", "file2"]
    ]
    assert words_of(["The runners were running"], "english") == [["runner", "were", "run"]]


def test_a_corpus_without_words_is_an_error():
    with pytest.raises(ValueError, match="no document has a word"):
        bm25_top_k(["", "!"], ["a"], 1, reading="code")


def test_neighbours_are_the_other_documents_that_the_formula_finds():
    for reading in ("code", "english"):
        found = bm25_neighbours(DOCUMENTS, 5, reading=reading)
        assert found.shape == (6, 5) and found.dtype == np.int32
        for own, row in enumerate(found.tolist()):
            scores = np.round(formula(DOCUMENTS[own], reading), 6)
            scores[own] = 0
            ranked = [i for i in np.lexsort((np.arange(6), -scores)).tolist() if scores[i] > 0]
            assert row == ranked + [-1] * (5 - len(ranked))
    assert bm25_neighbours(DOCUMENTS, 1, reading="code")[:, 0].tolist() == [1, 0, 5, -1, -1, 2]


def test_a_document_looks_for_its_rarest_shared_words():
    common = [f"common{i}" for i in range(QUERY_WORDS)]
    documents = [" ".join([*common, "rare", "alone"]), *(" ".join(common) for _ in range(3)), "rare thing"]
    found = bm25_neighbours(documents, 5, reading="code")
    assert sorted(found[0].tolist()) == [-1, 1, 2, 3, 4] and found[4].tolist() == [0, -1, -1, -1, -1]
    more = [" ".join([*common, *(f"rare{i}" for i in range(QUERY_WORDS))]), *documents[1:]]
    more[4] = " ".join(f"rare{i}" for i in range(QUERY_WORDS))
    assert bm25_neighbours(more, 5, reading="code")[0].tolist() == [
        4,
        -1,
        -1,
        -1,
        -1,
    ]  # the common words are not asked for
    with pytest.raises(ValueError, match="no document has a word"):
        bm25_neighbours(["", "!"], 1, reading="english")


# --------------------------------------------------------------------------- the cache


def search(cache: Path | None, documents: list[str] = DOCUMENTS, reading: str = "code") -> list[list[list[float]]]:
    queries = ["path of the file", "", "write files"]
    return [found.tolist() for found in bm25_top_k(documents, queries, 6, reading=reading, cache=cache)]


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every index that is made and not read."""
    made: list[str] = []
    build = bm25._index
    monkeypatch.setattr(bm25, "_index", lambda words, reading: made.append(reading) or build(words, reading))
    return made


@pytest.mark.parametrize("reading", ["code", "english"])
def test_a_cached_index_is_made_once_and_gives_the_same(reading: str, tmp_path: Path, builds: list[str]):
    plain = search(None, reading=reading)
    assert [search(tmp_path, reading=reading) for _ in range(3)] == [plain] * 3
    assert builds == [reading] * 2  # without the cache, and the first time with it
    (folder,) = tmp_path.iterdir()
    assert {path.suffix for path in folder.iterdir()} == {".npy", ".json"}
    for path in folder.glob("*.npy"):
        np.load(path, allow_pickle=False)


def test_other_documents_order_or_settings_have_an_index_of_their_own(
    tmp_path: Path, builds: list[str], monkeypatch: pytest.MonkeyPatch
):
    joined = ["readFile pathread_file path path", *DOCUMENTS[2:]]  # the same characters, another boundary
    for documents in (DOCUMENTS, DOCUMENTS[::-1], DOCUMENTS[:-1], joined):
        assert search(tmp_path, documents) == search(None, documents)
    search(tmp_path, reading="english")
    monkeypatch.setitem(SETTINGS, "code", (0.9, 0.4))
    assert search(tmp_path) == search(None)
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("harm", ["altered", "cut", "gone", "no digests", "other digests", "swapped"])
def test_a_damaged_index_is_made_anew_and_never_used(harm: str, tmp_path: Path, builds: list[str]):
    plain = search(tmp_path)
    (folder,) = tmp_path.iterdir()
    scores, digests = folder / "data.csc.index.npy", folder / "digests.json"
    if harm == "altered":
        np.save(scores, np.load(scores) * 2)
    elif harm == "cut":
        scores.write_bytes(scores.read_bytes()[:-1])
    elif harm == "gone":
        scores.unlink()
    elif harm == "no digests":
        digests.unlink()
    elif harm == "other digests":
        digests.write_text(json.dumps(dict.fromkeys(json.loads(digests.read_text()), "0")))
    else:  # two words have each other's number
        words = folder / "vocab.index.json"
        numbers = json.loads(words.read_text())
        words.write_text(json.dumps(numbers | {"file": numbers["write"], "write": numbers["file"]}))
    if harm in ("altered", "swapped"):  # the library itself reads it as if nothing were wrong
        broken = bm25s.BM25.load(folder, load_corpus=False)
        whole = bm25_index(DOCUMENTS, reading="code")
        assert any((broken.get_scores([word]) != whole.get_scores([word])).any() for word in ("file", "write"))
    builds.clear()
    assert search(tmp_path) == plain and builds == ["code"]
    assert search(tmp_path) == plain and builds == ["code"]  # it is whole again
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_an_index_that_another_process_placed_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """That process, or a third, may be reading it."""
    build, written = bm25._index, []

    def slow(words: list[list[str]], reading: str) -> bm25s.BM25:
        if not written:
            written.append(0)
            bm25_index(DOCUMENTS, reading=reading, cache=tmp_path)  # the other one, from beginning to end
            written[0] = next(tmp_path.iterdir()).stat().st_mtime_ns
        return build(words, reading)

    monkeypatch.setattr(bm25, "_index", slow)
    bm25_index(DOCUMENTS, reading="code", cache=tmp_path)
    assert [path.stat().st_mtime_ns for path in tmp_path.iterdir()] == written
