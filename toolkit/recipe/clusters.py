"""Batches of pairs that lie near one another: clusters of the rows, and how pools are cut from them (CDE, 2410.02525).

Sections of the data of pairs.
"""

from typing import Literal

from pydantic import Field

from toolkit.recipe.section import Natural, Positive, Section
from toolkit.recipe.surrogate import Surrogate


class Clusters(Section):
    """Paired spherical K-means of each source's rows: of query beside positive and positive beside query."""

    surrogate: Surrogate = Field(description="Whose vectors of queries and of first positives are clustered.")
    size: Positive = Field(description="Rows of a cluster on average: a source of n rows has ceil(n / size) clusters.")
    iterations: Positive = Field(100, description="Of K-means.")
    restarts: Positive = Field(3, description="K-means starts so often, and keeps the clusters that fit best.")
    seed: Natural = Field(description="Of K-means and of its sample; not of the order of training.")
    sample: Positive = Field(
        2_000_000,
        description="K-means reads at most so many rows of a source, drawn by the seed (two points each, held in "
        "memory as fp32); the other rows join the cluster that is nearest.",
    )


class Packing(Section):
    """Each epoch lays out the rows cluster after cluster and cuts them into pools."""

    walk: Literal["random", "greedy"] = Field(
        description="Order of a source's clusters: random, or greedy: from a random one always on to the nearest that "
        "is left, by the Euclidean distance of the mean vectors of their documents."
    )
    within: Literal["all", "source"] | None = Field(
        None,
        description="Several sources: all: they follow one another, and a pool may hold the end of one and the start "
        "of the next; source: every pool is of one source.",
    )
