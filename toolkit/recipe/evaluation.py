"""How a stage is scored and exported."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from toolkit.recipe.models import Pooling
from toolkit.recipe.search import Bm25Language
from toolkit.recipe.section import Natural, Positive, Section, Text


class StopIfWorse(Section):
    """The run stops after the stage, exit code 3, if it is worse than another system on any collection of its suites.

    Worse: the collection's main score is lower by more than `by`, and the difference is significant (paired
    randomisation test, p < 0.05 after Holm's correction over the collections).
    """

    than: Literal["bm25", "start", "previous"] = Field(
        description="bm25; start: the model before training that the stage goes back to; previous: the stage before."
    )
    by: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="A drop of at most this is let pass.")


CORPUS, NONE = "corpus", "none"


class EvalContext(Section):
    """What a contextual retriever reads every query and document with."""

    model_config = ConfigDict(serialize_by_alias=True)

    documents: Positive | None = Field(
        None, description="Documents of the context: as many as the model reads, which null says."
    )
    from_: Text = Field(
        CORPUS,
        alias="from",
        description="corpus: documents of the collection that is scored, drawn with replacement; none: null vectors; a "
        "folder in BEIR layout: of that one; a .safetensors file: the context that an evaluation of this model kept.",
    )
    seed: Natural = Field(0, description="Draws the documents.")
    beside: list[Text] = Field(
        [], description='More contexts, as in from, that are scored too and stand beside it in the report: ["none"].'
    )


class EvalSettings(Section):
    """How a retriever is evaluated where that differs from how it was trained; written into every result."""

    query_prefix: str | None = Field(None, description="Instead of encoder.query_prefix, spaces included.")
    passage_prefix: str | None = Field(None, description="Instead of encoder.passage_prefix, spaces included.")
    max_tokens: Annotated[int, Field(ge=2)] | None = Field(None, description="Instead of encoder.eval_max_tokens.")
    pooling: Pooling | None = Field(
        None, description="Instead of encoder.pooling; eos ends each text with the end token."
    )
    normalize: bool | None = Field(
        None, description="Instead of encoder.normalize; false: dot products of the vectors as they are."
    )
    prompts: dict[Text, str] = Field(
        {}, description="Name or type of an mteb task (e.g. Clustering) -> prefix of all its texts, on both sides."
    )
    identical_ids: Literal["task", "keep", "drop"] = Field(
        "task",
        description="Documents whose id equals the query's: kept or dropped as mteb's task says (folders: kept), or "
        "always.",
    )
    bm25_text: Literal["prose", "code"] | None = Field(
        None,
        description="How BM25 reads: words of a language, or names split at underscores and case. null: code for the "
        "embedded corpus, else prose.",
    )
    bm25_language: Bm25Language = None
    context: EvalContext | None = Field(
        None, description="Of a contextual retriever: what texts are read with; null: what lies in its folder, or none."
    )
    vectors_dtype: Literal["fp32", "fp16"] = Field(
        "fp32", description="Number format of the documents' vectors on disk; fp16 takes half of it."
    )


class Eval(EvalSettings):
    suites: list[Text] = Field(
        description="Scored after the stage: quick, stage, beir, coir, bright, msmarco, stdlib:dev, stdlib:test, a "
        "folder (FOLDER, FOLDER:split, quick:FOLDER), an mteb task or benchmark, or NAME=FOLDER, its copy on disk."
    )
    stop_if_worse: StopIfWorse | None = Field(None, description="Halts the stages after this one; null: never.")


class Export(Section):
    merged: bool = Field(description="Also write export/merged/: full weights with the adapter added in.")
