"""Floating-point operations of training by the 6ND rule, as a rate per token of each side of a batch.

Called by the methods, which know what their tokens meet. The rule: a token costs two operations
for every entry of a matrix it meets in a forward pass, and as many for each of the two products of the backward pass,
with respect to activations and to weights (Kaplan et al. 2020, arXiv 2001.08361, section 2.1). Frozen weights have no
second product, what is recomputed is one more forward. Attention scores, losses and padding are left out.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from toolkit.recipe.stage import Stage

SOURCE = "6ND rule, Kaplan et al. 2020, arXiv 2001.08361, section 2.1"


class Matrices(NamedTuple):
    """Entries of the matrices that a token is multiplied with, all and trained: lookups, norms, biases excluded."""

    entries: int
    trained: int

    def cost(self, backward: bool, recomputed: int = 0) -> int:
        """Operations a token: 2 per entry forward, 2 per entry and 2 per trained entry backward, 2 each time again."""
        return (2 + 2 * backward + 2 * recomputed) * self.entries + 2 * backward * self.trained


class Costs(NamedTuple):
    per_token: dict[str, int]  # side of the batch -> operations for each of its tokens
    rule: str  # how they come about, for readers


def recomputations(stage: Stage[Any, Any]) -> int:
    """How often a token's forward is run again: a slice that is recomputed recomputes its layers."""
    return stage.in_slices + stage.activation_checkpointing


def head_cost(head: Matrices, sliced: bool, chunks: int) -> int:
    """Chunks of logits are recomputed by themselves, inside a slice that is recomputed too; layers are not the head."""
    return head.cost(True, sliced + (chunks > 1))


def rule_text(model: str, parts: list[Matrices], again: int) -> str:
    entries, trained = (sum(column) for column in zip(*parts, strict=True))
    recomputed = f" + {2 * again}N recomputed" if again else ""
    if trained == entries:
        return f"{model} 6N{recomputed}, N = {_short(entries)}"
    return f"{model} 4N + 2T{recomputed}, N = {_short(entries)}, T = {_short(trained)} trained (LoRA)"


def _short(number: int) -> str:
    for size, name in ((10**9, " billion"), (10**6, " million")):
        if number >= size:
            return f"{number / size:.3g}{name}"
    return f"{number:,}"


def matrices(model: nn.Module, zero_stage: int) -> tuple[Matrices, Matrices]:
    """A model's matrices without its vocabulary head, and the head's (none: 0); a tied head counts as a matrix."""
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    of_head = {} if head is None else {id(p): p for p in head.parameters()}
    lookups = (module for module in model.modules() if isinstance(module, nn.Embedding))
    elsewhere = of_head.keys() | {id(p) for module in lookups for p in module.parameters(recurse=False)}
    body = (p for p in model.parameters() if id(p) not in elsewhere)
    return _count(body, zero_stage), _count(of_head.values(), zero_stage)


def _count(parameters: Iterable[nn.Parameter], zero_stage: int) -> Matrices:
    entries = trained = 0
    for p in parameters:
        shape = p.ds_shape if zero_stage == 3 else p.shape  # pyright: ignore[reportAttributeAccessIssue]
        if len(shape) == 2:
            entries += shape.numel()
            trained += shape.numel() * p.requires_grad
    return Matrices(entries, trained)
