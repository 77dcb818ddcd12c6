"""Keys of a recontriever stage."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from toolkit.methods.keys import MethodKeys, only_retriever
from toolkit.recipe.section import Positive, Section
from toolkit.recipe.stage import Stage
from toolkit.recipe.texts import TextsData, check_text_fields, formats


class MomentumQueue(Section):
    """Negatives of earlier steps (MoCo, 1911.05722), encoded by a slow copy of the retriever."""

    size: Positive = Field(description="Keys held; a multiple of the keys of a step (views x rows of a step).")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        description="Share of the slow copy kept at every step, in fp32."
    )
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="Number format of the stored keys; scores are fp32.")


class ReContrieverObjective(Section):
    """ReContriever (2306.03166): crops of one text as pairs, each weighted by its estimated relevance.

    One view and relevance none make it MoCo with a queue and Contriever with in-batch negatives without.
    """

    name: Literal["recontriever"]
    temperature: Annotated[float, Field(gt=0)] = Field(description="Scores are divided by it.")
    views: Positive = Field(description="Keys per query, all crops of its own text (the paper's K = 4).")
    relevance: Literal["linear", "softmax", "none"] = Field(
        description="Weight of a view: its share of the text's raw scores (paper), their softmax, or 1 / views."
    )
    relevance_temperature: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Temperature of the softmax weights; needed by softmax alone."
    )
    clamp_negative: bool = Field(False, description="Linear weights: count scores below zero as zero.")
    queue: MomentumQueue | None = Field(
        description="Negatives from a queue and a momentum encoder; null: the pool's other keys, with gradient."
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Mass spread over all keys.")


class Crops(Section):
    """Random pieces of a chunk of text, as query and keys (Contriever, 2112.09118)."""

    chunk_tokens: Annotated[int, Field(ge=4)] = Field(description="Tokens of text that query and keys are cut from.")
    min_ratio: Annotated[float, Field(gt=0, le=1)] = Field(description="Shortest crop as a share of the chunk.")
    max_ratio: Annotated[float, Field(gt=0, le=1)] = Field(description="Longest crop as a share of the chunk.")
    delete: Annotated[float, Field(ge=0, lt=1)] = Field(description="Each token of a crop is left out so often.")
    across_documents: bool = Field(
        False, description="Chunks of one endless stream of all text (paper) instead of chunks of one document each."
    )


class ReContrieverData(TextsData):
    """Documents, as chunks that query and keys are cut from."""

    crops: Crops = Field(description='How query and keys are cut from a chunk: {"chunk_tokens": ...}.')


ReContrieverStage = Stage[ReContrieverObjective, ReContrieverData]


def _check(at: str, stage: ReContrieverStage, first_stage: bool) -> Iterator[tuple[str, str]]:
    del first_stage
    objective, batch, data = stage.objective, stage.batch, stage.data
    if unfit := sorted(formats(data) - {"documents"}):
        yield f"{at}.data.sources", f"recontriever reads documents, not {', '.join(unfit)}"
    else:
        yield from check_text_fields(f"{at}.data", data)
    if data.crops.min_ratio > data.crops.max_ratio:
        yield f"{at}.data.crops.min_ratio", f"is above max_ratio {data.crops.max_ratio}; lower it"
    for key in ("query_prefix", "passage_prefix"):
        if getattr(stage.encoder, key):
            yield f"{at}.encoder.{key}", 'crops are trained without prefixes; set it to ""'
    softmax = objective.relevance == "softmax"
    if softmax == (objective.relevance_temperature is None):
        fix = "missing; softmax weights need it" if softmax else "only softmax weights have one; remove the key"
        yield f"{at}.objective.relevance_temperature", fix
    if objective.clamp_negative and objective.relevance != "linear":
        yield f"{at}.objective.clamp_negative", "only linear weights can be negative; set it to false"
    if objective.queue is None:
        return
    keys = objective.views * batch.pool * batch.pools_per_step
    if objective.queue.size % keys:
        fits = max(1, objective.queue.size // keys) * keys
        yield (
            f"{at}.objective.queue.size",
            f"is no multiple of the {keys} keys of a step (views x pool x pools_per_step); write {fits}",
        )
    if stage.zero.stage == 3 and stage.lora is None:
        yield (
            f"{at}.zero.stage",
            "a momentum copy of all parameters would have to be gathered whole at every step; use stage 0, 1 or 2, "
            "lora, or in-batch negatives (objective.queue null)",
        )


KEYS = MethodKeys(ReContrieverObjective, ReContrieverData, only_retriever, _check, may_build=True)
