"""What every section of a recipe is made of. Imports pydantic and nothing heavier, as all of toolkit.recipe."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of every recipe section: frozen, strict types, finite numbers, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Text = Annotated[str, Field(min_length=1)]
Length = Annotated[int, Field(ge=2)]  # in tokens
FaultyRows = Annotated[
    Literal["refuse", "skip"],
    Field(
        description="Rows that cannot be used (no JSON, no UTF-8, columns missing or of another kind, an id met "
        "before): refuse: the first is an error; skip: they are left out, counted by kind, and said. Files that cannot "
        "be read on, and sources without one row of use, are errors in either case.",
    ),
]
