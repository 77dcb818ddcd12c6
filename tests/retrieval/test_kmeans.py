"""Paired spherical K-means: its assignment rule, its fixed point, and faiss's own run of it, on vectors in blocks."""

from typing import Any

import faiss
import numpy as np
import pytest

from toolkit.retrieval import kmeans as module
from toolkit.retrieval.kmeans import assign, joint, mean_documents, nearest_others, paired_kmeans, point_bytes

WANTED: dict[str, Any] = {"iterations": 100, "restarts": 3, "seed": 42}


def silent(text: str) -> None:
    del text


def pairs(count: int = 60, dim: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Queries and documents near one another, of several lengths, around 7 topics on either side."""
    draw = np.random.default_rng(1)
    topic = draw.integers(7, size=count)
    sides = [draw.normal(size=(7, dim))[topic] + 0.4 * draw.normal(size=(count, dim)) for _ in range(2)]
    query, document = (side.astype(np.float32) for side in sides)
    return query * draw.uniform(0.5, 2, size=(count, 1)).astype(np.float32), document


def reader(query: np.ndarray, document: np.ndarray) -> module.Read:
    return lambda rows: (query[rows], document[rows])


def plain_points(query: np.ndarray, document: np.ndarray) -> np.ndarray:
    both = [np.concatenate(pair, axis=1).astype(np.float64) for pair in ((query, document), (document, query))]
    points = np.concatenate(both)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


@pytest.fixture(params=[2**15, 7], ids=["one block", "blocks of 7"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", request.param)


@pytest.mark.usefixtures("block")
def test_centroids_are_a_fixed_point_over_both_points_of_each_pair():
    query, document = pairs()
    fit = paired_kmeans(reader(query, document), np.arange(60), 7, **WANTED, say=silent)
    points = plain_points(query, document)
    nearest = (points @ fit.centroids.T).argmax(1)
    means = np.stack([points[nearest == c].sum(0) for c in range(7)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert np.abs(means - fit.centroids).max() < 1e-6
    assert fit.objective == pytest.approx((points @ fit.centroids.T).max(1).mean(), abs=1e-6)
    alone = (points[:60] @ fit.centroids.T).argmax(1)  # the control: means of [q; d] alone are others
    others = [points[:60][alone == c].sum(0) for c in range(7) if (alone == c).any()]
    found = fit.centroids[[c for c in range(7) if (alone == c).any()]]
    assert np.abs(np.stack([x / np.linalg.norm(x) for x in others]) - found).max() > 0.01


@pytest.mark.usefixtures("block")
def test_it_is_faiss_with_these_settings():
    query, document = pairs()
    fit = paired_kmeans(reader(query, document), np.arange(60), 7, **WANTED, say=silent)
    theirs = faiss.Kmeans(32, 7, niter=100, nredo=3, spherical=True, seed=42, min_points_per_centroid=1)
    theirs.train(plain_points(query, document).astype(np.float32))
    assert np.abs(fit.centroids - theirs.centroids).max() < 1e-5
    other = paired_kmeans(reader(query, document), np.arange(60), 7, **WANTED | {"seed": 43}, say=silent)
    assert np.abs(fit.centroids - other.centroids).max() > 0.01


def test_the_best_of_all_starts_is_kept():
    query, document = pairs()
    each = [
        paired_kmeans(reader(query, document), np.arange(60), 7, iterations=3, restarts=n, seed=5, say=silent)
        for n in (1, 2, 8)
    ]
    assert each[0].objective <= each[1].objective <= each[2].objective and each[0].objective < each[2].objective


@pytest.mark.usefixtures("block")
def test_a_pair_belongs_to_the_centroid_nearest_to_query_and_document_in_this_order():
    query, document = pairs()
    centroids = paired_kmeans(reader(query, document), np.arange(60), 7, **WANTED, say=silent).centroids
    found = assign(reader(query, document), 60, centroids, silent)
    forward, backward = np.split(plain_points(query, document) @ centroids.T, 2)
    assert found.dtype == np.int64 and (found == forward.argmax(1)).all()
    assert (found != backward.argmax(1)).any()  # the control
    assert (found != (forward + backward).argmax(1)).any()


def test_clusters_of_topics_hold_one_topic_each():
    draw = np.random.default_rng(0)
    topic = np.repeat(np.arange(12), 40)
    query = (draw.normal(size=(12, 24))[topic] + 0.05 * draw.normal(size=(480, 24))).astype(np.float32)
    read = reader(query, query + 0.05 * draw.normal(size=query.shape).astype(np.float32))
    fit = paired_kmeans(read, np.arange(480), 12, iterations=50, restarts=5, seed=1, say=silent)
    found = assign(read, 480, fit.centroids, silent)
    assert all(len(set(topic[found == cluster].tolist())) <= 2 for cluster in range(12))
    held = sum(np.bincount(topic[found == cluster]).max() for cluster in set(found.tolist()))
    assert held >= 0.85 * 480  # rows that share their cluster with the most of their topic


@pytest.mark.usefixtures("block")
def test_rows_outside_the_sample_are_not_read_by_kmeans():
    query, document = pairs()
    some = np.arange(0, 60, 2)
    fit = paired_kmeans(reader(query, document), some, 5, **WANTED, say=silent)
    query[1::2] = np.nan
    again = paired_kmeans(reader(query, document), some, 5, **WANTED, say=silent)
    assert np.array_equal(fit.centroids, again.centroids)
    with pytest.raises(ValueError, match=r"^vectors are not finite$"):
        paired_kmeans(reader(query, document), np.arange(60), 5, **WANTED, say=silent)


def test_points_are_held_once(monkeypatch: pytest.MonkeyPatch):
    """What faiss trains on is the array that was filled block by block."""
    query, document = pairs()
    given: list[Any] = []
    train = faiss.Kmeans.train

    def noted(self: Any, x: np.ndarray, **others: Any) -> float:
        given.append(x)
        return train(self, x, **others)

    monkeypatch.setattr(faiss.Kmeans, "train", noted)
    paired_kmeans(reader(query, document), np.arange(60), 7, iterations=4, restarts=2, seed=1, say=silent)
    assert len({id(x) for x in given}) == 1 and given[0].flags["C_CONTIGUOUS"] and given[0].dtype == np.float32
    assert given[0].nbytes == 60 * point_bytes(16)
    assert np.abs(given[0] - plain_points(query, document)).max() < 1e-6


def test_a_start_ends_where_nothing_moves_any_more():
    query, document = pairs()
    said: list[str] = []
    fit = paired_kmeans(reader(query, document), np.arange(60), 7, **WANTED | {"iterations": 1000}, say=said.append)
    assert len(said) < 200 and said[1] == "start 1 of 3, iteration 1 of 1000"
    assert said[2].startswith("start 1 of 3, iteration 2 of 1000, mean inner product 0.")
    less = paired_kmeans(reader(query, document), np.arange(60), 7, **WANTED, say=silent)
    assert np.array_equal(fit.centroids, less.centroids)


def test_a_pair_without_a_word_stays_zero_and_has_a_cluster():
    query, document = pairs()
    query[3], document[3] = 0, 0
    query[5] = 0
    points = joint(query, document)
    assert not points[3].any() and np.linalg.norm(points[5]) == pytest.approx(1, abs=1e-6)
    read = reader(query, document)
    fit = paired_kmeans(read, np.arange(60), 7, **WANTED, say=silent)
    assert np.isfinite(fit.centroids).all() and 0 <= assign(read, 60, fit.centroids, silent)[3] < 7


@pytest.mark.parametrize("clusters", [1, 60])
def test_one_cluster_and_one_for_each_pair(clusters: int):
    query, document = pairs()
    read = reader(query, document)
    fit = paired_kmeans(read, np.arange(60), clusters, **WANTED, say=silent)
    assert fit.centroids.shape == (clusters, 32)
    assert len(set(assign(read, 60, fit.centroids, silent).tolist())) <= clusters


@pytest.mark.usefixtures("block")
def test_mean_documents():
    query, document = pairs()
    cluster = np.random.default_rng(0).permutation(np.arange(60) % 9)
    found = mean_documents(reader(query, document), cluster, 9, silent)
    expected = np.stack([document[cluster == c].astype(np.float64).mean(0) for c in range(9)])
    assert found.dtype == np.float32 and np.abs(found - expected).max() < 1e-6


@pytest.mark.parametrize("count", [3, 40, 400])
def test_the_nearest_others_are_those_of_all_distances(count: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_NEAR_BLOCK", 50)
    vectors = np.random.default_rng(0).normal(size=(260, 12)).astype(np.float32)
    wide = vectors.astype(np.float64)
    distances = ((wide[:, None] - wide) ** 2).sum(-1)
    np.fill_diagonal(distances, np.inf)
    expected = distances.argsort(1, kind="stable")[:, : min(count, 259)]
    found = nearest_others(vectors, count, silent)
    assert found.shape == (260, count) and (found[:, :259][:, :count] == expected).all()
    assert (found[:, 259:] == -1).all()


def test_a_list_of_neighbours_ends_before_what_fp32_leaves_open():
    """Sixty copies of a vector: any of them may be among those that faiss keeps, so no list says which is first."""
    draw = np.random.default_rng(0)
    vectors = np.concatenate([np.repeat(draw.normal(size=(1, 8)), 60, 0), draw.normal(size=(40, 8))])
    found = nearest_others(vectors.astype(np.float32), 4, silent)
    assert (found[:60] == -1).all() and (found[60:] >= 0).mean() > 0.8
