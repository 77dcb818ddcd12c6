"""Whether a search finds the passages of a query in the order of their grades: Kendall's tau, by BM25 or a retriever.

Called by the command that writes passages. A low figure can mean bad passages or a bad search; see docs/generation.md.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import bootstrap, kendalltau

from toolkit.files import expanded
from toolkit.generate.graded_files import Sampled
from toolkit.generate.prompt import GRADES
from toolkit.ranks.together import on_every_rank
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.evaluation import EvalSettings
from toolkit.retrieval.bm25 import bm25_index, bm25_scores
from toolkit.retrieval.words import reading_of

BM25 = "bm25"
RESAMPLES = 9999
_RETRIEVERS = ("export.json", "modules.json")  # one of these is in the folder of a retriever


class Order(NamedTuple):
    """How far scores order the passages of queries as their grades do."""

    by: str
    queries: int
    tau: float  # mean over queries of Kendall's tau-b; a query whose scores are all equal counts 0
    low: float | None  # 95 % percentile bootstrap interval of that mean, over queries; None for one query
    high: float | None
    agree: float  # share of all pairs of passages of a query that the scores order as the grades do
    tied: float  # share of pairs with equal scores
    undecided: int  # queries whose scores are all equal


def order_of(by: str, scores: np.ndarray, seed: int) -> Order:
    """Compare scores with grades.

    Args:
        scores: [queries, grades], best grade first.
        seed: of the bootstrap.
    """
    size = len(GRADES)
    first, second = np.triu_indices(size, 1)
    signs = np.sign(scores[:, first] - scores[:, second])  # of a pair: 1 where the better grade scores higher
    undecided = (signs == 0).all(axis=1)
    taus = np.array([0.0 if same else _tau(row) for same, row in zip(undecided, scores, strict=True)])
    low = high = None
    if len(taus) > 1:
        rng = np.random.default_rng(seed)
        found = bootstrap(
            (taus,), np.mean, n_resamples=RESAMPLES, batch=500, method="percentile", rng=rng
        ).confidence_interval
        low, high = float(found.low), float(found.high)
    agree, tied = float((signs > 0).mean()), float((signs == 0).mean())
    return Order(by, len(taus), float(taus.mean()), low, high, agree, tied, int(undecided.sum()))


def _tau(scores: np.ndarray) -> float:
    found: Any = kendalltau(GRADES, scores)
    return float(found.statistic)


def check_search(what: str) -> None:
    """RecipeError for what cannot be a search; the hub is not asked for what may be an id there."""
    folder = expanded(what)
    hub_id = not folder.exists() and not what.startswith((".", "~", "/")) and what.count("/") < 2
    if what != BM25 and not hub_id:
        _check_retriever(what, folder)


def find_search(what: str) -> None:
    """Fetch a retriever that the hub has, before anything is asked; every rank calls it.

    Raises:
        RecipeError: for what is neither there nor on the hub, and for a model that does not say how it embeds. Damaged
            weights are seen only when it is used.
    """
    if what == BM25:
        return
    from toolkit.retrieval.retrievers import find_retriever  # seconds, which BM25 alone need not

    folder = find_retriever(what)
    on_every_rank(lambda: _check_retriever(what, folder))


def _check_retriever(what: str, folder: Path) -> None:
    if not any((folder / name).is_file() for name in _RETRIEVERS):
        fix = "name an export, a sentence-transformers model or bm25"
        raise RecipeError(f"--check-by {what}: is no retriever that says how it embeds; {fix}")


def bm25_of(sampled: list[Sampled]) -> tuple[str, np.ndarray]:
    """How BM25 reads the texts, and the scores of each query's own passages, [queries, grades].

    The index holds the passages of all these queries, so that rare words weigh more.
    """
    documents = [text for one in sampled for text in one.texts()]
    queries = [one.query.text for one in sampled]
    reading = reading_of("prose", None, documents, queries)
    index = bm25_index(documents, reading=reading)
    size = len(GRADES)
    found = bm25_scores(index, queries, reading=reading)
    return reading, np.stack([scores[size * row : size * (row + 1)] for row, scores in enumerate(found)])


def retriever_of(what: str, sampled: list[Sampled], device: torch.device) -> np.ndarray:
    """The scores by a retriever, a folder or hub id, of each query's own passages, [queries, grades].

    Every rank calls it, with the same queries.

    Raises:
        RecipeError: for what is no retriever.
    """
    from toolkit.retrieval.embed import embed_texts  # as in find_search
    from toolkit.retrieval.retrievers import load_any

    retriever = load_any(what, None, EvalSettings.model_validate({}), device).retriever
    queries = embed_texts(retriever, [one.query.text for one in sampled], "query")
    passages = embed_texts(retriever, [text for one in sampled for text in one.texts()], "passage")
    return np.einsum("qd,qgd->qg", queries, passages.reshape(len(sampled), len(GRADES), -1))
