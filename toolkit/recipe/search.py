"""What is searched before a stage trains: neighbours of documents, and hard negatives of pairs."""

from typing import Annotated, Literal

from pydantic import Field

from toolkit.recipe.section import Positive, Section

Bm25Text = Annotated[
    Literal["prose", "code"],
    Field(description="prose: words of a language; code: names split at underscores and case."),
]
# none, ngrams, and PyStemmer's algorithms.
_Language = Literal[
    "none", "ngrams", "arabic", "armenian", "basque", "catalan", "czech", "danish", "dutch", "dutch_porter", "english",
    "esperanto", "estonian", "finnish", "french", "german", "greek", "hindi", "hungarian", "indonesian", "irish",
    "italian", "lithuanian", "nepali", "norwegian", "persian", "polish", "porter", "portuguese", "romanian", "russian",
    "serbian", "sesotho", "spanish", "swedish", "tamil", "turkish", "yiddish",
]  # fmt: skip
Bm25Language = Annotated[
    _Language | None,
    Field(
        description="Language of prose: words stemmed as PyStemmer's algorithm of this name does, stop words left out "
        "where bm25s has a list; none: words as they are; ngrams: pairs of characters of Chinese, Japanese, Korean, "
        "Thai, Lao, Khmer and Burmese, whole words else. null: found by script and function words, per collection; "
        "English for Latin script unless another language is certain."
    ),
]


CODE_HAS_NO_LANGUAGE = 'code is read without a language; leave it out, or set text to "prose"'


class Bm25Neighbours(Section):
    """Neighbours share rare words: BM25 between the first 256 words of documents."""

    by: Literal["bm25"]
    text: Bm25Text
    language: Bm25Language = None


class EmbeddingNeighbours(Section):
    """Neighbours have similar first passages, embedded by the retriever that the stage starts from."""

    by: Literal["embeddings"]


Neighbours = Annotated[Bm25Neighbours | EmbeddingNeighbours, Field(discriminator="by")]


class MineSettings(Section):
    """Which of the passages that a search finds for a row's query become its hard negatives."""

    ranks: Annotated[list[Positive], Field(min_length=2, max_length=2)] = Field(
        description="First and last rank that negatives come from; known positives of the query have none."
    )
    negatives: Positive = Field(
        description="Hard negatives of a row, its own included; drawn at random from those ranks by the seed."
    )
    max_share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Leave out passages that score above this share of the positive's score (NV-Retriever, 2407.15831: "
        "0.95); null: none.",
    )
    margin: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Leave out passages that score less than this below the positive's score; null: none.",
    )
    positive: Literal["lowest", "mean", "highest"] = Field(
        "highest",
        description="Which of a row's positives max_share and margin count from. NV-Retriever (2407.15831) sets its "
        "limit for a pair of query and positive; of a row's pairs together all passages are allowed that its highest "
        "positive allows. lowest, as sentence-transformers and NeMo take it for a query: no negative scores above any "
        "positive, but one that scores low takes all negatives from its row.",
    )
    max_score: float | None = Field(None, description="Leave out passages that score above this; null: none.")


class Bm25Mine(MineSettings):
    """Hard negatives by BM25, each source searched for itself, before the stage trains."""

    by: Literal["bm25"]
    text: Bm25Text
    language: Bm25Language = None


class RetrieverMine(MineSettings):
    """Hard negatives by the export of the stage before, each source searched for itself, before the stage trains."""

    by: Literal["previous"]


Mine = Annotated[Bm25Mine | RetrieverMine, Field(discriminator="by")]
