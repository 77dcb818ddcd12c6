"""Keys of a contrastive stage."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from toolkit.methods.keys import MethodKeys, only_retriever
from toolkit.recipe.pairs import PairsData, check_pairs
from toolkit.recipe.section import Positive, Section
from toolkit.recipe.stage import Stage

Direction = Literal["query_to_document", "document_to_query", "query_to_query", "document_to_document"]


class ContrastiveObjective(Section):
    """InfoNCE over (query, positives, hard negatives) rows: every other document of the pool is a negative."""

    name: Literal["contrastive"]
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
    matryoshka: Annotated[list[Positive], Field(min_length=1)] | None = Field(
        None,
        description="Mean of the loss over these leading dimensions (2205.13147), the model's width among them; "
        "null: all dimensions only.",
    )


ContrastiveStage = Stage[ContrastiveObjective, PairsData]


def _check(at: str, stage: ContrastiveStage, first_stage: bool) -> Iterator[tuple[str, str]]:
    yield from check_pairs(f"{at}.data", stage.data, first_stage)
    objective, at = stage.objective, f"{at}.objective"
    if len(set(objective.directions)) < len(objective.directions):
        yield f"{at}.directions", "names a direction twice; name each once"
    if objective.partition == "joint" and len(objective.directions) == 1:
        yield f"{at}.partition", "there is one direction; set it to separate"
    if objective.learn_temperature and objective.temperature < 0.01:
        yield f"{at}.temperature", "a learned temperature is at least 0.01; raise it"
    if "query_to_document" not in objective.directions:
        yield f"{at}.directions", "lacks query_to_document; add it"
    if objective.matryoshka is not None and len(set(objective.matryoshka)) < len(objective.matryoshka):
        yield f"{at}.matryoshka", "names a dimension twice; name each once"


KEYS = MethodKeys(ContrastiveObjective, PairsData, only_retriever, _check)
