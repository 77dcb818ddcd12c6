"""Bundles of neighbouring documents, made by BM25 and by a retriever, and their cache."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import run_on_ranks
from tiny import revela_stage, save_model

from toolkit.prepare import neighbours as module
from toolkit.prepare.models import ModelSource
from toolkit.prepare.neighbours import NEIGHBOURS, WORDS, prepare_bundles
from toolkit.prepare.passages import prepare_passages
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.stage import Stage

TOPICS, OF_A_TOPIC = 10, 4
WAYS: list[dict[str, str]] = [{"by": "bm25", "text": "prose"}, {"by": "bm25", "text": "code"}, {"by": "embeddings"}]
TOPIC = np.random.default_rng(0).permutation(np.repeat(np.arange(TOPICS), OF_A_TOPIC))  # of each document


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return ModelSource(save_model(tmp_path_factory.mktemp("model"), "bert"), "model")


def write(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """Documents of one to three lines; each topic has letters of its own, and words made of them."""
    random = np.random.default_rng(1)
    texts = []
    for topic in TOPIC:
        letters = [chr(ord("a") + 2 * topic), chr(ord("b") + 2 * topic)]
        words = ["".join(letters[i >> place & 1] for place in range(3)) for i in range(8)]
        texts.append("\n".join(" ".join(random.choice(words, 5)) for _ in range(random.integers(1, 4))))
    return write(tmp_path / "in", texts)


def make_stage(folder: Path, neighbours: dict[str, str], size: int = OF_A_TOPIC, **changes: Any) -> Stage:
    data = {
        "sources": [{"folder": str(folder)}], "passages": {"unit": "lines", "max_words": 5}, "interleave": size,
        "neighbours": neighbours,
    }  # fmt: skip
    return revela_stage(data=data, encoder__pooling="mean", **changes)


def bundles(stage: Stage, run: Path, model: ModelSource) -> np.ndarray:
    return prepare_bundles(stage, prepare_passages(stage.data, run), model, run, "cpu")


def of_one_topic(order: np.ndarray) -> float:
    """Share of bundles whose documents have one topic."""
    topics = TOPIC[order].reshape(-1, OF_A_TOPIC)
    return float((topics == topics[:, :1]).all(1).mean())


@pytest.mark.parametrize("neighbours", WAYS, ids=lambda way: "_".join(way.values()))
def test_bundles_hold_documents_of_one_topic(
    neighbours: dict[str, str], collection: Path, model: ModelSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    order = bundles(make_stage(collection, neighbours), tmp_path / "run", model)
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(len(TOPIC)))
    assert of_one_topic(order) >= (0.5 if neighbours["by"] == "embeddings" else 1)  # random weights: 0.6
    assert of_one_topic(np.arange(len(TOPIC))) == 0  # control: in the order of the data
    assert f"data: {TOPICS} bundles of {OF_A_TOPIC} neighbouring documents\n" in capsys.readouterr().out


def test_neighbours_of_texts_without_spaces(model: ModelSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Found by pairs of characters; in words (control) no document has a neighbour, which is said."""
    topics = ["熊猫吃的竹子", "长城防御工程", "云南种植茶叶", "首都北京天安"]
    texts = [topic + tail for tail in ("甲乙丙", "丁戊己") for topic in topics]
    folder, key = write(tmp_path / "in", texts), "data.neighbours.language"

    def paired(**more: str) -> int:
        """Bundles of two documents of one topic."""
        stage = make_stage(folder, {"by": "bm25", "text": "prose", **more}, size=2)
        order = bundles(stage, tmp_path / "run", model).reshape(-1, 2)
        return int((order[:, 0] % len(topics) == order[:, 1] % len(topics)).sum())

    assert paired() == len(topics)
    said = capsys.readouterr()
    assert f"BM25 reads the documents as ngrams, by its script and function words; {key} sets another\n" in said.out
    assert paired(language="ngrams") == len(topics) and "finds nothing" not in said.err + capsys.readouterr().err
    assert paired(language="none") < len(topics)
    said = capsys.readouterr()
    assert "BM25 reads" not in said.out
    assert said.err.startswith(
        "warning: BM25 finds nothing for 8 of 8 documents: read as none they share no word with "
    )


def test_neighbours_by_vectors_are_the_nearest_others():
    """By inner product; twins of a document come before it where scores are equal."""
    vectors = np.random.default_rng(2).standard_normal((90, 8)).astype(np.float32)
    vectors[50] = vectors[70]
    found = module._by_vectors(vectors)
    assert found.shape == (90, NEIGHBOURS + 1)
    for own, row in enumerate(found.tolist()):
        scores = np.round(vectors.astype(np.float64) @ vectors[own], 4)
        others = [other for other in row if other >= 0]
        assert own not in others and len(others) >= NEIGHBOURS
        nearest = np.sort(np.delete(scores, own))[::-1][: len(others)]
        np.testing.assert_allclose(scores[others], nearest, atol=2e-4)
    assert module._by_vectors(vectors[:3])[0].tolist().count(-1) == 1  # fewer documents than neighbours


def test_a_document_is_read_up_to_so_many_words(tmp_path: Path):
    stage = make_stage(write(tmp_path / "in", ["one two\n" * 200, "three"]), WAYS[0])
    store = prepare_passages(stage.data, tmp_path / "run")
    assert len(store) == 101 and module._head(store, 100, 1) == "three"
    words = len(module._head(store, 0, 100).split())
    assert WORDS <= words < WORDS + 5


def test_bundles_are_made_once_for_what_decides_them(
    collection: Path, model: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, other = tmp_path / "run", ModelSource(save_model(tmp_path / "other", "bert", seed=1), "model")
    for way in WAYS:
        bundles(make_stage(collection, way), run, model)
    names = sorted(path.name for path in (run / "prepared").glob("*bundles_*"))
    assert len(names) == 3 and len(list((run / "prepared").glob("passages_*"))) == 1
    monkeypatch.setattr(module, "_write", None)  # making them again would fail
    for way in WAYS:
        bundles(make_stage(collection, way, optim__lr=1.0), run, model)
    bundles(make_stage(collection, WAYS[0], encoder__passage_prefix="p: "), run, other)  # BM25 reads no model
    for stage, source in (
        (make_stage(collection, WAYS[0], size=2), model),
        (make_stage(collection, WAYS[2]), other),
        (make_stage(collection, WAYS[2], encoder__passage_prefix="p: "), model),
        (make_stage(write(tmp_path / "more", ["a text", "more"]), WAYS[0], size=2), model),
    ):
        with pytest.raises(TypeError):
            bundles(stage, run, source)


def test_a_damaged_cache_is_one_line(collection: Path, model: ModelSource, tmp_path: Path):
    stage = make_stage(collection, WAYS[0])
    order = bundles(stage, tmp_path / "run", model)
    (path,) = (tmp_path / "run" / "prepared").glob("bundles_*/order.npy")
    assert bundles(stage, tmp_path / "run", model).tolist() == order.tolist()
    for broken in (order[1:], np.where(order == 3, 4, order), order.astype(np.float64)):
        np.save(path, broken)
        with pytest.raises(RecipeError, match=f"^{path.parent}: is damaged .* delete it, and it is made again$"):
            bundles(stage, tmp_path / "run", model)


def test_a_retriever_that_cannot_be_loaded_is_one_line(collection: Path, tmp_path: Path):
    (tmp_path / "none").mkdir()
    with pytest.raises(RecipeError, match=r"none: cannot be loaded .*; write the folder again$"):
        bundles(make_stage(collection, WAYS[2]), tmp_path / "run", ModelSource(tmp_path / "none", "none"))


def test_every_rank_gets_the_same_bundles_or_the_same_error(collection: Path, model: ModelSource, tmp_path: Path):
    """Of 40 documents the two ranks embed half each; words of one letter are none for BM25."""
    short = write(tmp_path / "short", ["a b c", "d e f", "g h i"])
    stages = [make_stage(collection, WAYS[2]), make_stage(collection, WAYS[1]), make_stage(short, WAYS[0], size=2)]
    request = {
        "run": str(tmp_path / "ranks"),
        "model": str(model.folder),
        "stages": [stage.model_dump(mode="json") for stage in stages],
    }
    one, other = run_on_ranks("neighbours_ranks.py", 2, request, tmp_path, timeout=500)
    assert one == other
    expected = [bundles(stage, tmp_path / "run", model).tolist() for stage in stages[:2]]
    assert [json.loads(order) for order in one[:2]] == expected
    assert "data.neighbours: no document has a word to search for; choose" in one[2]
