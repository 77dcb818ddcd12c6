"""What DeepSpeed wraps: one nn.Module a method, whose forward is its loss. The training loop knows no other type."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from toolkit.models.encoder import Encoder


class Loss(NamedTuple):
    """What an objective returns: `total` with its graph; `parts` for the log, name -> detached (sum, count)."""

    total: Tensor
    parts: dict[str, tuple[Tensor, Tensor]]


class Exported(NamedTuple):
    """Which weights of an objective the export holds, by the beginnings of their names."""

    retriever: str  # of the backbone's weights
    causal_lm: tuple[str, nn.Module] | None = None  # of a model with a head that goes beside it, and that model
    first_stage: Path | None = None  # of a contextual encoder with a first stage of its own: where its tokenizer lies


class Objective(nn.Module):
    """What DeepSpeed wraps; called only as engine(batch)."""

    encoder: Encoder  # what export writes

    def exported(self) -> Exported:
        return Exported("encoder.backbone.")

    def forward(self, batch: Any) -> Loss:
        raise AssertionError("an objective defines forward")

    def beside(self, batch: Any) -> dict[str, int]:
        """Tokens or vectors that a forward runs beside the tokens of the batch: side of `costs` -> number."""
        del batch
        return {}

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
