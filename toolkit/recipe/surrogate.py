"""Who looks at pairs before a stage trains on them: a surrogate, whose vectors group pairs and find false negatives.

Sections of data.clusters and of every objective that leaves out false negatives by a surrogate.
"""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from toolkit.recipe.models import Pooling
from toolkit.recipe.search import Bm25Language, Bm25Text
from toolkit.recipe.section import Length, Positive, Section, Text

Svd = Annotated[
    Positive | None,
    Field(
        description="Dimensions that vectors are reduced to by truncated SVD (no centring, fitted on the first 100,000 "
        "queries), then scaled to unit length; CDE (2410.02525) clusters with 128. null: as the retriever gives them."
    ),
]


class RetrieverSurrogate(Section):
    """Any retriever that evaluation loads: queries and documents with its own prefixes, each up to its own length."""

    model_config = ConfigDict(serialize_by_alias=True)

    by: Literal["retriever"]
    from_: Text = Field(
        alias="from",
        description="A hub id, or a folder: an export, a sentence-transformers model, an adapter, or a base model, "
        "which needs pooling, normalize and max_tokens.",
    )
    query_prefix: str | None = Field(None, description="Instead of the retriever's own, spaces included.")
    passage_prefix: str | None = Field(None, description="Instead of the retriever's own, spaces included.")
    max_tokens: Length | None = Field(None, description="Longest input in tokens instead of the retriever's own.")
    pooling: Pooling | None = Field(None, description="Instead of the retriever's own.")
    dense: bool = Field(
        True,
        description="false: the dense layer after the pooling of a sentence-transformers model is left out, as CDE "
        "(2410.02525) reads GTR; its normalisation is a key of its own.",
    )
    normalize: bool | None = Field(
        None, description="Instead of the retriever's own; false: vectors are not scaled to unit length."
    )
    svd: Svd = None


class PreviousSurrogate(Section):
    """The export of the stage before."""

    by: Literal["previous"]
    svd: Svd = None


class Bm25Surrogate(Section):
    """BM25 weights of the words of a text, on both sides; sparse, so SVD is what makes them vectors."""

    by: Literal["bm25"]
    text: Bm25Text
    language: Bm25Language = None
    svd: Positive = Field(
        description="Dimensions that the weights are reduced to by truncated SVD (no centring, fitted on the first "
        "100,000 queries), then scaled to unit length."
    )


Surrogate = Annotated[RetrieverSurrogate | PreviousSurrogate | Bm25Surrogate, Field(discriminator="by")]
