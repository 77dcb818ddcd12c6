"""Keys of a sycl stage."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from toolkit.methods.keys import MethodKeys, only_retriever
from toolkit.recipe.graded import GradedData, check_graded
from toolkit.recipe.section import Section
from toolkit.recipe.stage import Stage

Weight = Annotated[float, Field(gt=0)]


class SyclLosses(Section):
    """Weights of the losses that are added up; one or more of them."""

    wasserstein: Weight | None = Field(
        None, description="Weight of the published loss, which does not know which passages are whose; null: left out."
    )
    kl: Weight | None = Field(None, description="Weight of KL(Y || P), whose gradient is ListNet's; null: left out.")
    infonce: Weight | None = Field(
        None,
        description="Weight of InfoNCE with the first passage of a group as the positive; needs "
        'data.group.by "positive_first". null: left out.',
    )
    wasserstein_per_query: Weight | None = Field(
        None,
        description="Weight of a Wasserstein distance of each query's own list, over grades (no paper's); null: left "
        "out.",
    )

    def weights(self) -> dict[str, float]:
        """Name -> weight of the losses that are in."""
        return self.model_dump(exclude_none=True)


class SyclObjective(Section):
    """SyCL (arXiv 2503.23239): scores over the pool's passages are compared with grades, list by list."""

    name: Literal["sycl"]
    losses: SyclLosses = Field(description='Losses and their weights, e.g. {"wasserstein": 1.0, "kl": 0.1}.')
    temperature: Annotated[float, Field(gt=0)] = Field(description="Scores are divided by it; grades are not.")
    label_scale: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Grades are multiplied by it before their softmax, in_batch_grade too."
    )
    in_batch_grade: float = Field(0.0, description="The grade of the passages of other queries.")


SyclStage = Stage[SyclObjective, GradedData]


def _check(at: str, stage: SyclStage, first_stage: bool) -> Iterator[tuple[str, str]]:
    del first_stage
    yield from check_graded(f"{at}.data", stage.data)
    objective, at_objective = stage.objective, f"{at}.objective"
    names = objective.losses.weights().keys()
    if not names:
        yield f"{at_objective}.losses", 'names no loss; write e.g. {"wasserstein": 1.0, "kl": 0.1}'
    if names == {"infonce"}:
        for key in ("label_scale", "in_batch_grade"):
            if getattr(objective, key) != SyclObjective.model_fields[key].default:
                yield f"{at_objective}.{key}", "has no effect on infonce, which reads no grades; remove it"
    first = stage.data.group.by == "positive_first"
    if "infonce" in names and not first:
        yield f"{at}.data.group.by", 'infonce takes the first passage of a group as positive; write "positive_first"'
    if names and "infonce" not in names and first:
        yield f"{at}.data.group.by", "only infonce reads a positive first; write another, or add infonce to losses"


def _remarks(at: str, stage: SyclStage, doubt: str) -> Iterator[str]:
    """The published loss alone needs a model that ranks a query's own passages above others already."""
    if doubt and stage.objective.losses.weights().keys() == {"wasserstein"}:
        yield (
            f"warning: {at}.objective.losses: wasserstein alone does not know which passages are of which query, so it "
            f'only refines a retriever, and {doubt}; add "kl": 0.1, or put a stage with kl before this one'
        )


KEYS = MethodKeys(SyclObjective, GradedData, only_retriever, _check, remarks=_remarks)
