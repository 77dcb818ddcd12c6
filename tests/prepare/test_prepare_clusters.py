"""Clusters of a stage's rows: each source by itself, kept by content, the same on any number of ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import run_on_ranks
from surrogates import TOPICS, data_of, prepared, rows_of_topics, write_source
from tiny_retriever import CASES, make

from toolkit.data.clusters import ClusterStore
from toolkit.data.packing import ClusterPlan
from toolkit.prepare import clusters as module
from toolkit.prepare.clusters import clusters_ahead, prepare_clusters
from toolkit.prepare.surrogate import surrogate_vectors
from toolkit.recipe.clusters import Clusters
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.pairs import PairsData
from toolkit.retrieval.kmeans import assign, paired_kmeans

BM25: dict[str, Any] = {"by": "bm25", "text": "prose", "language": "none", "svd": 8}
WANTED: dict[str, Any] = {"surrogate": BM25, "size": 5, "iterations": 30, "restarts": 4, "seed": 42}
GREEDY, WITHIN = {"walk": "greedy"}, {"walk": "greedy", "within": "source"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export."""
    return make(CASES["bert_full"], tmp_path_factory.mktemp("base")).write(tmp_path_factory.mktemp("o") / "export")


class Given:
    """Two sources of rows in a folder of runs."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.model, self.run = model, folder / "runs" / "run"
        self.sources = [
            write_source(folder / "a", rows_of_topics(40)),
            write_source(folder / "b", rows_of_topics(24, 1)),
        ]

    def data(self, *sources: int, packing: Any = WITHIN, **changes: Any) -> PairsData:
        chosen = [self.sources[source] for source in sources or (0, 1)]
        return data_of(*chosen, clusters=WANTED | changes, packing=packing if len(chosen) > 1 else GREEDY)

    def clusters(self, data: PairsData, **others: Any) -> ClusterStore:
        arguments: dict[str, Any] = {"run": self.run, "seed": 0, "device": "cpu"} | others
        return prepare_clusters(data, prepared(data, self.model, self.run), self.model, **arguments)

    def kept(self) -> list[Path]:
        return sorted((self.run.parent / "prepared").glob("*clusters_*"))


@pytest.fixture
def given(tmp_path: Path, model: Path) -> Given:
    return Given(tmp_path, model)


def members(found: ClusterStore, source: int) -> list[list[int]]:
    count = len(found.of_source(source)[0])
    return [found.rows_of(source, np.array([cluster])).tolist() for cluster in range(count)]


def test_each_source_is_clustered_by_itself_by_queries_and_first_positives(given: Given, capsys):
    data = given.data()
    found = given.clusters(data)
    store = prepared(data, given.model, given.run)
    vectors = surrogate_vectors(data.clusters.surrogate, data, store, None, given.run, 0, "cpu")
    for source, (first, count) in enumerate(((0, 40), (40, 24))):
        rows = members(found, source)
        assert sorted(row for own in rows for row in own) == list(range(first, first + count))

        def read(some: np.ndarray, first: int = first) -> tuple[np.ndarray, np.ndarray]:
            return vectors.of_rows(store, first + some)

        wanted: dict[str, Any] = {"iterations": 30, "restarts": 4, "seed": 42, "say": lambda _: None}
        fit = paired_kmeans(read, np.arange(count), -(-count // 5), **wanted)
        of_row = assign(read, count, fit.centroids, lambda _: None)
        expected = [(first + np.flatnonzero(of_row == cluster)).tolist() for cluster in np.unique(of_row)]
        assert rows == expected  # every cluster of these holds rows
        means, near = found.of_source(source)
        documents = vectors.of_rows(store, np.arange(first, first + count))[1].astype(np.float64)
        for cluster, own in enumerate(rows):
            assert np.abs(means[cluster] - documents[np.array(own) - first].mean(0)).max() < 1e-6
        distances = ((means[:, None].astype(np.float64) - means) ** 2).sum(-1)
        np.fill_diagonal(distances, np.inf)
        assert (near[:, 0] == distances.argmin(1)).all()
        topics = [{row % len(TOPICS) for row in (np.array(own) - first)} for own in rows]
        assert sum(map(len, topics)) <= 1.5 * len(rows)  # nearly every cluster is of one topic
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("clusters of data.sources.0")]
    assert said[0] == (
        "clusters of data.sources.0: 8 for 40 rows; K-means reads all of them, two points each, 4 times 30 iterations "
        "at most, and holds 0 MiB, on the CPU"
    )
    assert said[1].startswith("clusters of data.sources.0: ") and " of 8 hold rows, " in said[1] and len(said) == 2


def test_clusters_are_made_once_for_what_decides_them(given: Given, monkeypatch: pytest.MonkeyPatch):
    first = given.clusters(given.data())
    monkeypatch.setattr(module, "write_clusters", None)  # making them again would fail
    monkeypatch.setattr(module, "surrogate_vectors", None)
    assert given.clusters(given.data()).digest == first.digest
    assert given.clusters(given.data(packing={"walk": "random", "within": "all"})).digest == first.digest
    assert given.clusters(given.data(), run=given.run.with_name("other")).digest == first.digest
    assert len(given.kept()) == 1
    for data in (
        given.data(0),
        given.data(size=6),
        given.data(iterations=29),
        given.data(restarts=3),
        given.data(seed=43),
        given.data(sample=39),
        given.data(surrogate=BM25 | {"svd": 7}),
        given.data(surrogate={"by": "previous"}),
    ):
        with pytest.raises(TypeError):
            given.clusters(data)


def test_pools_are_the_same_on_one_rank_and_on_two(given: Given, tmp_path: Path):
    answers = []
    for world_size in (1, 2):
        apart = Given(tmp_path / str(world_size), given.model)  # nothing is found again
        data = [
            apart.data(),
            apart.data(surrogate={"by": "previous"}, packing={"walk": "random", "within": "all"}),
            apart.data(surrogate={"by": "previous", "svd": 6}),
        ]
        written = [one.model_dump(mode="json") for one in data]
        apart.run.parent.mkdir()
        request = {"run": str(apart.run), "model": str(apart.model), "data": written}
        answers.append(run_on_ranks("cluster_ranks.py", world_size, request, apart.run.parent))
    (alone,), (first, second) = answers
    assert alone == first == second and all(answer.startswith("[[") for answer in alone)
    assert len(set(alone)) == 3


def problem_of(given: Given, data: PairsData) -> str:
    with pytest.raises(RecipeError) as caught:
        given.clusters(data)
    return str(caught.value)


def test_clusters_larger_than_a_source_are_one_line(given: Given):
    told = "data.clusters.size: 25 is more than the 24 rows of data.sources.1; lower it"
    assert problem_of(given, given.data(size=25)) == told
    assert not list(given.run.parent.glob("prepared/surrogate_*"))  # before anything is embedded
    with pytest.raises(RecipeError) as caught:
        clusters_ahead(Clusters.model_validate(WANTED | {"size": 1000}), [900])
    assert str(caught.value) == "data.clusters.size: 1,000 is more than the 900 rows of data.sources.0; lower it"
    assert len(members(given.clusters(given.data(size=24)), 1)) == 1


def test_a_sample_of_fewer_rows_than_clusters_is_one_line(given: Given):
    told = "data.clusters.sample: 7 rows cannot make the 8 clusters of data.sources.0; raise it, or size"
    assert problem_of(given, given.data(sample=7)) == told


def test_all_rows_outside_the_sample_have_a_cluster_too(given: Given, capsys):
    found = given.clusters(given.data(sample=20))
    assert sorted(row for source in (0, 1) for own in members(found, source) for row in own) == list(range(64))
    assert "8 for 40 rows; K-means reads 20 of them, drawn by the seed, two points each" in capsys.readouterr().out
    assert found.digest != given.clusters(given.data()).digest


def test_what_k_means_holds_is_said_ahead():
    settings = Clusters.model_validate(WANTED | {"size": 512, "iterations": 100, "restarts": 3})
    of_svd = settings.model_copy(update={"surrogate": settings.surrogate.model_copy(update={"svd": 128})})
    (line,) = clusters_ahead(of_svd, [10_000_000])
    reads = (
        "19,532 for 10,000,000 rows; K-means reads 2,000,000 of them, drawn by the seed, two points each, 3 times 100"
    )
    assert line == ("clusters", f"{reads} iterations at most, and holds 3.9 GiB")
    wide = Clusters.model_validate(WANTED | {"surrogate": {"by": "previous"}})
    lines = clusters_ahead(wide, [1_000_000, 30, None])
    assert [name for name, _ in lines] == [f"clusters of source {number}" for number in range(3)]
    assert lines[2][1] == (
        "not known: not all rows are counted; K-means reads 2,000,000 of them at most, two points each, 4 times 30 "
        "iterations at most, and holds 22.9 GiB of points at most if vectors have 768 dimensions"
    )
    assert lines[0][1].endswith(" and holds 14.9 GiB if vectors have 768 dimensions")


def test_damaged_clusters_and_those_of_other_pairs_are_one_line(given: Given):
    given.clusters(given.data())
    (folder,) = given.kept()
    fix = "delete it, and it is made again"
    rows = folder / "rows.npy"
    whole = rows.read_bytes()
    rows.write_bytes(whole[:-1] + b"x")
    assert problem_of(given, given.data()) == f"{folder}: is damaged (rows.npy is not as it was written); {fix}"
    rows.write_bytes(whole[:-9])
    assert problem_of(given, given.data()).startswith(f"{folder}: is damaged (")
    rows.write_bytes(whole)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"sizes": [40, 25]}))
    others = "it clusters other pairs: [40, 25] rows of each source, not [40, 24]"
    assert problem_of(given, given.data()) == f"{folder}: is damaged ({others}); {fix}"
    (folder / "meta.json").unlink()
    assert problem_of(given, given.data()).startswith(f"{folder} is not on ")


def test_a_machine_without_faiss_says_so_before_anything_is_embedded(given: Given, monkeypatch: pytest.MonkeyPatch):
    def none() -> None:
        raise ImportError('faiss cannot be imported (no); pip install "toolkit[cpu]"')

    monkeypatch.setattr(module, "place_of_kmeans", none)
    assert problem_of(given, given.data()).startswith("faiss cannot be imported (no); pip install")
    assert not list(given.run.parent.glob("prepared/surrogate_*"))


def test_a_plan_of_prepared_clusters_has_near_rows_in_a_pool(given: Given):
    """Rows of one topic lie in the same pool far more often than by chance, which is one in four."""
    found = given.clusters(given.data(0))
    plan = ClusterPlan(found, 10, "greedy", "all", seed=1)
    shares = [(rows[:, None] % 4 == rows % 4).mean() for rows in map(plan.pool, range(40))]
    assert np.mean(shares) > 0.6
