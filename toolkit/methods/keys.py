"""The half of a method's contract that needs no torch: its sections of a recipe, its models, its checks.

`KEYS` in a method's keys.py is one of these. Called by the schema, the checks of a recipe, and whatever opens models.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from toolkit.recipe.models import Lora, Start
from toolkit.recipe.section import Section
from toolkit.recipe.stage import Stage


class ModelKeys(NamedTuple):
    """A model that a stage reads."""

    name: str  # in reports
    at: str  # the section below the stage that holds its `start`; "" for the stage itself
    start: Start
    lora: Lora | None
    causal: bool  # read with its head: a language model; from "previous" it is the export/lm of the stage before
    lengths: dict[str, int | None]  # key below the stage -> longest input that it must read; None: as the model says

    @property
    def key(self) -> str:
        """Where its start stands below the stage."""
        return f"{self.at}.start".lstrip(".")


@dataclass(frozen=True)
class MethodKeys:
    """What a recipe says of a method.

    Attributes:
        objective, data: the sections of a stage; the data section has a list `sources` and, if it may build,
            `faulty_rows`.
        models: stage -> its models; the first one becomes the retriever.
        check: (path of the stage, stage, whether it is the first) -> (path, problem and fix) of each problem.
        may_build: whether it trains a model from random weights.
        contextual: whether its export reads texts with a context.
        exports_lm: whether its export holds a language model beside the retriever.
        remarks: (path of the stage, stage, why the model it starts from may never have been a retriever; empty if it
            was one) -> lines to be said, each beginning with "note:" or "warning:" and a path.
    """

    objective: type[Section]
    data: type[Section]
    models: Callable[[Stage[Any, Any]], tuple[ModelKeys, ...]]
    check: Callable[[str, Stage[Any, Any], bool], Iterator[tuple[str, str]]]
    may_build: bool = False
    contextual: bool = False
    exports_lm: bool = False
    remarks: Callable[[str, Stage[Any, Any], str], Iterator[str]] = lambda at, stage, doubt: iter(())


def retriever_keys(stage: Stage[Any, Any]) -> ModelKeys:
    """The retriever of a stage, read without a head."""
    lengths = {
        "encoder.max_tokens": stage.encoder.max_tokens,
        "encoder.eval_max_tokens": stage.encoder.eval_max_tokens,
        "eval.max_tokens": stage.eval.max_tokens,
    }
    return ModelKeys("retriever", "", stage.start, stage.lora, False, lengths)


def only_retriever(stage: Stage[Any, Any]) -> tuple[ModelKeys, ...]:
    """The models of a method that reads no other than the retriever."""
    return (retriever_keys(stage),)
