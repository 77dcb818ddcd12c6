"""Keys of a revela stage."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from toolkit.methods.keys import MethodKeys, ModelKeys, retriever_keys
from toolkit.recipe.models import Lora, Start
from toolkit.recipe.section import Length, Positive, Section
from toolkit.recipe.stage import Stage
from toolkit.recipe.texts import PassagesData, check_passages


class RevelaLanguageModel(Section):
    """The language model that reads the other passages of the pool; thrown away after training."""

    start: Start = Field(description="previous: the export/lm of the stage before.")
    lora: Lora | None = Field(description="Adapters on the language model; null trains all its parameters.")
    max_tokens: Length = Field(description="Longest passage in tokens, as the model reads it.")


class TemperatureDecay(Section):
    """Geometric decay: start * (end / start) ** (t / (steps - 1)) at the optimizer steps t = 0 .. steps - 1."""

    start: Annotated[float, Field(gt=0)] = Field(description="tau of the stage's first optimizer step.")
    end: Annotated[float, Field(gt=0)] = Field(description="tau of its last; at most start.")


def _temperature_kind(value: Any) -> str | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "constant"
    return "decay" if isinstance(value, dict | TemperatureDecay) else None


Temperature = Annotated[
    Annotated[Annotated[float, Field(gt=0)], Tag("constant")] | Annotated[TemperatureDecay, Tag("decay")],
    Discriminator(
        _temperature_kind,
        custom_error_type="temperature_kind",
        custom_error_message='write a number, or {"start": ..., "end": ...} for a geometric decay',
    ),
]


class RevelaObjective(Section):
    """Revela (arXiv 2506.16552): a retriever learns from next-token prediction through in-batch attention."""

    name: Literal["revela"]
    temperature: Temperature = Field(
        description="tau of the softmax over similarities, constant or decaying; the paper uses 1e-4 with bf16 "
        "similarities."
    )
    similarity_dtype: Literal["fp32", "bf16", "fp64"] = Field(
        "fp32", description="Number format of similarities, weights and their softmax."
    )
    v_norm: bool = Field(
        description="Divide the in-batch term by the attended value norms (paper: on for text, off for code)."
    )
    half_query: bool = Field(description="The query side is the first half of the passage's tokens.")
    dual_loss: bool = Field(description="Add the plain next-token loss of pass 1 with weight 1.")
    detach_kv: bool = Field(description="Stop gradients through the cached keys and values (same retriever gradient).")
    min_weight: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Passages of at most this weight are not read: time and memory follow the pairs that are. 0 leaves "
        "out zeros alone and is exact; above it, a similarity loses a gradient of at most this over the temperature.",
    )
    max_sources: Positive | None = Field(
        None, description="Most passages that a row reads, by weight; null: any number."
    )
    max_dropped_mass: Annotated[float, Field(gt=0, le=1)] = Field(
        0.01,
        description="The run stops if the rows that are run together lose more of their weight than this on average.",
    )
    language_model: RevelaLanguageModel


class NearDuplicates(Section):
    """Passages of a pool that share most n-grams of tokens do not read one another (no copying)."""

    ngram: Positive = Field(description="Tokens of the language model in an n-gram.")
    threshold: Annotated[float, Field(gt=0, le=1)] = Field(
        description="Least share of common n-grams (Jaccard), estimated from 128 hashes: standard error up to 0.044."
    )


class RevelaData(PassagesData):
    """Passages, read with the others of their pool."""

    near_duplicates: NearDuplicates | None = Field(None, description="Pairs of a pool that are masked; null: none.")


RevelaStage = Stage[RevelaObjective, RevelaData]


def _models(stage: RevelaStage) -> tuple[ModelKeys, ...]:
    """The retriever, and the language model that learns with it and is thrown away."""
    reader = stage.objective.language_model
    at = "objective.language_model"
    lengths: dict[str, int | None] = {f"{at}.max_tokens": reader.max_tokens}
    return retriever_keys(stage), ModelKeys("language_model", at, reader.start, reader.lora, True, lengths)


def _check(at: str, stage: RevelaStage, first_stage: bool) -> Iterator[tuple[str, str]]:
    del first_stage
    yield from check_passages(f"{at}.data", stage.data)
    if stage.encoder.normalize is False:
        yield f"{at}.encoder.normalize", "revela's similarities are cosines; set normalize to true"
    decay = stage.objective.temperature
    if isinstance(decay, TemperatureDecay):
        if decay.end > decay.start:
            fix = f"{decay.end:g} is above start {decay.start:g}; a temperature decays, so lower it"
            yield f"{at}.objective.temperature.end", fix
        if stage.optim.steps == 1:
            yield f"{at}.objective.temperature", "one step has no decay; write a number"


KEYS = MethodKeys(RevelaObjective, RevelaData, _models, _check)
