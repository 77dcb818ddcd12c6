"""The keys that the objectives of several methods on pairs share, and what does not fit together in them.

A method's own section inherits from PairLossSettings, and adds its name.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from toolkit.recipe.pairs import PairsData, surrogate_problems
from toolkit.recipe.section import Positive, Section
from toolkit.recipe.surrogate import Surrogate

Direction = Literal["query_to_document", "document_to_query", "query_to_query", "document_to_document"]


class FalseNegativeRule(Section):
    """Whose vectors find false negatives."""

    surrogate: Surrogate = Field(
        description="Its vectors of queries and documents are made once, before the stage trains, and compared by "
        "cosine."
    )


class RelativeRule(FalseNegativeRule):
    """A document is no negative if its cosine with the query is at least the own positive's plus eps (CDE, 2410.02525);
    of several positives the lowest counts. Documents of the row itself are never left out."""

    rule: Literal["relative"]
    eps: Annotated[float, Field(gt=-2, lt=2)] = Field(
        description="0: leave out what the surrogate finds as near to the query as its own positive, or nearer; "
        "higher leaves out fewer."
    )


class AbsoluteRule(FalseNegativeRule):
    """A document is no negative if its cosine with the query is at least the cut. Documents of the row itself are
    never left out."""

    rule: Literal["absolute"]
    cut: Annotated[float, Field(gt=-1, le=1)] = Field(description="A cosine of the surrogate's vectors.")


FalseNegatives = Annotated[RelativeRule | AbsoluteRule, Field(discriminator="rule")]


class PairLossSettings(Section):
    """InfoNCE over (query, positives, hard negatives) rows: every other document of the pool is a negative."""

    name: str
    temperature: Annotated[float, Field(gt=0)] = Field(description="Scores are divided by it (starting value).")
    learn_temperature: bool = Field(False, description="Train the temperature too (one scalar, at least 0.01).")
    directions: Annotated[list[Direction], Field(min_length=1)] = Field(
        ["query_to_document"],
        description="Rows of the first kind against columns of the other.",
    )
    partition: Literal["separate", "joint"] = Field(
        "separate",
        description="Several directions: the mean of one loss each, or one joint sum of negatives (GTE, 2308.03281).",
    )
    false_negative_margin: float | None = Field(
        None, description="Leave out negatives that score above the own positive plus this; null: none."
    )
    false_negative_threshold: float | None = Field(
        None, description="Leave out negatives that score above this; null: none."
    )
    false_negatives: FalseNegatives | None = Field(
        None,
        description="Leave out negatives of other rows that another model, the surrogate, finds near the query; the "
        "two keys before go by the scores of the model that is trained. null: none.",
    )
    in_batch_negatives: bool = Field(
        True, description="false: the only negatives of a query are the hard negatives of its own rows."
    )
    equal_queries: Literal["apart", "joint"] = Field(
        "apart",
        description="Rows of a pool with the same query. apart: the positives of one are no negatives of the other; "
        "joint: they are positives of both, m in all, each a soft target of 1/m.",
    )
    matryoshka: Annotated[list[Positive], Field(min_length=1)] | None = Field(
        None,
        description="Mean of the loss over these leading dimensions (2205.13147), the model's width among them; "
        "null: all dimensions only.",
    )


def check_pair_loss(
    at: str, settings: PairLossSettings, data: PairsData, first_stage: bool
) -> Iterator[tuple[str, str]]:
    """(path, problem and fix) of what does not fit together in the objective at this path, or with the data."""
    if len(set(settings.directions)) < len(settings.directions):
        yield f"{at}.directions", "names a direction twice; name each once"
    if settings.partition == "joint" and len(settings.directions) == 1:
        yield f"{at}.partition", "there is one direction; set it to separate"
    if settings.learn_temperature and settings.temperature < 0.01:
        yield f"{at}.temperature", "a learned temperature is at least 0.01; raise it"
    if "query_to_document" not in settings.directions:
        yield f"{at}.directions", "lacks query_to_document; add it"
    if settings.matryoshka is not None and len(set(settings.matryoshka)) < len(settings.matryoshka):
        yield f"{at}.matryoshka", "names a dimension twice; name each once"
    yield from _check_rows(at, settings, data, first_stage)


def _check_rows(at: str, settings: PairLossSettings, data: PairsData, first_stage: bool) -> Iterator[tuple[str, str]]:
    """What is said of queries against documents alone, and has an effect there."""
    found, own_alone = settings.false_negatives, not settings.in_batch_negatives
    asked = {"false_negatives": found is not None, "in_batch_negatives": own_alone}
    asked["equal_queries"] = settings.equal_queries == "joint"
    if set(settings.directions) > {"query_to_document"}:
        for key in (key for key, is_asked in asked.items() if is_asked):
            yield f"{at}.{key}", "is for queries against documents alone; remove it, or the other directions"
    if own_alone and data.negatives == 0:
        yield f"{at}.in_batch_negatives", "false, but data.negatives is 0: no row would have a negative; raise that"
    if own_alone and found is not None:
        problem = "leaves out documents of other rows, which in_batch_negatives leaves out too; remove one of the two"
        yield f"{at}.false_negatives", problem
    for key, problem in surrogate_problems(found.surrogate, first_stage) if found is not None else ():
        yield f"{at}.false_negatives.surrogate.{key}", problem
