"""One stage of a recipe, with the objective and data sections of its method."""

from typing import Generic, Literal

from pydantic import Field
from typing_extensions import TypeVar

from toolkit.recipe.errors import RecipeError
from toolkit.recipe.evaluation import Eval, Export
from toolkit.recipe.models import EncoderKeys, EncoderSettings, Lora, Start
from toolkit.recipe.section import Name, Section
from toolkit.recipe.training import Batch, Guard, Optim, Save, Zero

ObjectiveT = TypeVar("ObjectiveT", bound=Section)
DataT = TypeVar("DataT", bound=Section)


class Stage(Section, Generic[ObjectiveT, DataT]):
    name: Name = Field(description="Folder name of the stage.")
    description: str = Field("", description="Free text.")
    start: Start = Field(description="The retriever's weights: previous stage, hub, folder or built here.")
    encoder: EncoderKeys = EncoderKeys()  # pyright: ignore[reportCallIssue]
    lora: Lora | None = Field(description="Adapters on the retriever; null trains all its parameters.")
    objective: ObjectiveT
    data: DataT
    batch: Batch
    optim: Optim
    precision: Literal["bf16", "fp32"] = Field(
        description="Number format of weights and activations; optimizer in fp32."
    )
    activation_checkpointing: bool = Field(False, description="Recompute every layer in the backward pass.")
    zero: Zero
    save: Save
    guard: Guard = Guard()  # pyright: ignore[reportCallIssue]
    eval: Eval
    export: Export

    @property
    def encoder_settings(self) -> EncoderSettings:
        """The encoder section once it is complete (start_settings); a ValidationError (ValueError) before."""
        return EncoderSettings.model_validate(self.encoder.model_dump())

    @property
    def in_slices(self) -> bool:
        """Whether forwards run in slices that are recomputed (gradient caching)."""
        return self.batch.forward_rows is not None or self.batch.forward_tokens is not None


def batch_numbers(stage: Stage, world_size: int) -> dict[str, int]:
    """What the batch keys mean on `world_size` ranks.

    Returns:
        rows_per_step_global, rows_per_forward_per_rank, accumulation_per_rank (forwards per optimizer step).

    Raises:
        RecipeError: if the pool or pools_per_step cannot be spread over that many ranks; lists those that fit.
    """
    batch = stage.batch
    spread, key = (batch.pool, "pool") if batch.span == "world" else (batch.pools_per_step, "pools_per_step")
    if spread % world_size:
        fits = [str(n) for n in range(1, spread + 1) if spread % n == 0]
        raise RecipeError(
            f"stage {stage.name}: {world_size} ranks do not divide batch.{key} = {spread} (span {batch.span}); "
            f"use {', '.join(fits)} ranks or change batch.{key}"
        )
    rows = batch.pool // world_size if batch.span == "world" else batch.pool
    return {
        "rows_per_step_global": batch.pool * batch.pools_per_step,
        "rows_per_forward_per_rank": rows,
        "accumulation_per_rank": batch.pools_per_step if batch.span == "world" else batch.pools_per_step // world_size,
    }
