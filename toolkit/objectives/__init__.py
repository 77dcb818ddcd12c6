"""Objectives: one file, one method, one nn.Module whose forward is its loss. The training loop knows no other type."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from toolkit.models.encoder import Encoder
from toolkit.recipe import (
    ContrastiveObjective,
    LanguageModelObjective,
    ReContrieverObjective,
    RevelaObjective,
    Stage,
)


class Loss(NamedTuple):
    """What an objective returns: `total` with its graph; `parts` for the log, name -> detached (sum, count)."""

    total: Tensor
    parts: dict[str, tuple[Tensor, Tensor]]


class Objective(nn.Module):
    """What DeepSpeed wraps; called only as engine(batch)."""

    encoder: Encoder  # what export writes

    def forward(self, batch: Any) -> Loss:
        raise AssertionError("an objective defines forward")

    def after_step(self, applied: bool) -> None:
        """Called on all ranks after every optimizer step, for state that follows the weights.

        Args:
            applied: False if the step was left out, since a loss or gradient was not finite.
        """

    def extra_state(self) -> dict[str, Tensor]:
        """State that is no trainable weight, equal on all ranks; saved with every checkpoint."""
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take up what `extra_state` gave; called on all ranks."""


def build_objective(
    stage: Stage, seed: int, device: torch.device | str, folder: Path, adapter: Path | None, lm_folder: Path | None
) -> Objective:
    """The objective of a stage with its models loaded.

    Args:
        folder: the retriever's base model.
        adapter: an adapter of the retriever to continue, or None.
        lm_folder: Revela's language model; None for the other methods.
    """
    match stage.objective:
        case LanguageModelObjective():
            from toolkit.objectives.language_model import build_language_model

            return build_language_model(stage, stage.objective, device, folder)
        case RevelaObjective():
            from toolkit.objectives.revela import build_revela

            assert lm_folder is not None
            return build_revela(stage, stage.objective, seed, device, folder, adapter, lm_folder)
        case ContrastiveObjective():
            from toolkit.objectives.contrastive import build_contrastive

            return build_contrastive(stage, stage.objective, seed, device, folder, adapter)
        case ReContrieverObjective():
            from toolkit.objectives.recontriever import build_recontriever

            return build_recontriever(stage, stage.objective, seed, device, folder, adapter)
