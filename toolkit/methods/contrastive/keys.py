"""Keys of a contrastive stage."""

from collections.abc import Iterator
from typing import Literal

from toolkit.methods.keys import MethodKeys, only_retriever
from toolkit.methods.pair_keys import PairLossSettings, check_pair_loss
from toolkit.recipe.pairs import PairsData, check_pairs
from toolkit.recipe.stage import Stage


class ContrastiveObjective(PairLossSettings):
    """InfoNCE over (query, positives, hard negatives) rows: every other document of the pool is a negative."""

    name: Literal["contrastive"]  # pyright: ignore[reportIncompatibleVariableOverride]


ContrastiveStage = Stage[ContrastiveObjective, PairsData]


def _check(at: str, stage: ContrastiveStage, first_stage: bool) -> Iterator[tuple[str, str]]:
    yield from check_pairs(f"{at}.data", stage.data, first_stage)
    yield from check_pair_loss(f"{at}.objective", stage.objective, stage.data, first_stage)


KEYS = MethodKeys(ContrastiveObjective, PairsData, only_retriever, _check)
