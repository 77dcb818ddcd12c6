"""Keys of a language_model stage."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from toolkit.methods.keys import MethodKeys, ModelKeys, retriever_keys
from toolkit.recipe.search import EmbeddingNeighbours
from toolkit.recipe.section import Length, Section
from toolkit.recipe.stage import Stage
from toolkit.recipe.texts import PassagesData, check_passages


class LanguageModelObjective(Section):
    """Next-token prediction with all parameters; writes export/ (the encoder) and export/lm/ (with its head)."""

    name: Literal["language_model"]
    max_tokens: Length = Field(description="Longest passage in tokens.")


LanguageModelStage = Stage[LanguageModelObjective, PassagesData]


def _models(stage: LanguageModelStage) -> tuple[ModelKeys, ...]:
    """One model, trained with its head and exported without it too."""
    model = retriever_keys(stage)
    lengths = model.lengths | {"objective.max_tokens": stage.objective.max_tokens}
    return (model._replace(name="language_model", lora=None, causal=True, lengths=lengths),)


def _check(at: str, stage: LanguageModelStage, first_stage: bool) -> Iterator[tuple[str, str]]:
    del first_stage
    yield from check_passages(f"{at}.data", stage.data)
    if isinstance(stage.data.neighbours, EmbeddingNeighbours):
        fix = 'write {"by": "bm25", "text": ...} or null'
        yield f"{at}.data.neighbours", f"language_model starts from no retriever; {fix}"
    if stage.lora is not None:
        yield f"{at}.lora", "language_model trains all parameters; set lora to null"


KEYS = MethodKeys(LanguageModelObjective, PassagesData, _models, _check, may_build=True, exports_lm=True)
