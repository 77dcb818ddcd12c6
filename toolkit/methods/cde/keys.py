"""Keys of a cde stage."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from toolkit.methods.keys import MethodKeys, ModelKeys, retriever_keys
from toolkit.methods.pair_keys import PairLossSettings, check_pair_loss
from toolkit.recipe.context import ContextSettings
from toolkit.recipe.models import Lora, Start
from toolkit.recipe.pairs import PairsData, check_pairs
from toolkit.recipe.section import Section
from toolkit.recipe.stage import Stage


class FirstStage(Section):
    """What makes vectors of context documents."""

    start: Start | None = Field(
        None,
        description="A model of its own, all its parameters trained; null: another copy of what the stage starts from, "
        "or that one's own first stage.",
    )
    adapter: Lora | None = Field(
        None, description="Instead of a model of its own: a second adapter on the retriever's backbone."
    )


class CdeObjective(PairLossSettings):
    """InfoNCE over pairs whose texts are read with a context of the pool's documents (CDE, arXiv 2410.02525)."""

    name: Literal["cde"]  # pyright: ignore[reportIncompatibleVariableOverride]
    context: ContextSettings
    first_stage: FirstStage = FirstStage()  # pyright: ignore[reportCallIssue]
    share_prefix: bool = Field(
        True,
        description="Form projected of a causal model: run the context once a step for all texts. Never changes the "
        "result.",
    )


CdeStage = Stage[CdeObjective, PairsData]


def _models(stage: CdeStage) -> tuple[ModelKeys, ...]:
    """The retriever, and what makes vectors of context documents where the recipe names it."""
    at, start = "objective.first_stage", stage.objective.first_stage.start
    lengths: dict[str, int | None] = {"objective.context.max_tokens": stage.objective.context.max_tokens}
    retriever = retriever_keys(stage)
    if start is None:
        return (retriever._replace(lengths=retriever.lengths | lengths),)
    return retriever, ModelKeys("first_stage", at, start, None, False, lengths)


def _check(at: str, stage: CdeStage, first_stage: bool) -> Iterator[tuple[str, str]]:
    yield from check_pairs(f"{at}.data", stage.data, first_stage)
    yield from check_pair_loss(f"{at}.objective", stage.objective, stage.data, first_stage)
    yield from _check_context(at, stage)
    first, where = stage.objective.first_stage, f"{at}.objective.first_stage"
    if first.start == "previous" and first_stage:
        yield f"{where}.start", "there is no stage before the first; name a folder or a hub id, or remove the key"
    if first.adapter is not None and first.start is not None:
        yield f"{where}.adapter", "stands beside start; remove one of the two"
    if first.adapter is not None and stage.lora is None:
        yield f"{where}.adapter", "is a second one, and the retriever has no first; write lora, or remove it"
    if first.adapter is not None and stage.export.merged:
        yield f"{at}.export.merged", "two adapters cannot both be merged into one backbone; set it to false"


def _check_context(at: str, stage: CdeStage) -> Iterator[tuple[str, str]]:
    context, where = stage.objective.context, f"{at}.objective.context"
    if context.size % context.vectors_per_document:
        share = context.vectors_per_document
        yield f"{where}.vectors_per_document", f"{share} does not divide size {context.size}; change one"
        return
    documents, slots = context.size // context.vectors_per_document, stage.data.positives + stage.data.negatives
    if documents > stage.batch.pool * slots:
        yield (
            f"{where}.size",
            f"a context takes {documents} documents, and a pool holds at most {stage.batch.pool} x {slots} = "
            f"{stage.batch.pool * slots}; lower it, or raise batch.pool",
        )
    if not stage.objective.share_prefix and context.form != "projected":
        yield f"{at}.objective.share_prefix", f"has no effect on form {context.form}; remove it"


KEYS = MethodKeys(CdeObjective, PairsData, _models, _check, contextual=True)
