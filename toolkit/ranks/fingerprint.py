"""What the ranks of a run must have in common, compared before every step: none goes another way unnoticed.

Called by the training loop on every rank. Over gloo, on the CPU, whatever the ranks train on.
"""

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from toolkit import slicing
from toolkit.collectives import PATIENCE, is_distributed
from toolkit.ranks.watch import Diverged

FACTS = ("step", "rows", "shapes of the batch", "slices", "weights")
CHUNK = 2**24  # elements that a sum widens to int64 at a time
VIEWS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # of so many bytes


class Fingerprints:
    """A channel of its own between the ranks; the watch tells if one of them does not come to a comparison."""

    def __init__(self, hosts: list[str], weights_every: int, zero_stage: int) -> None:
        """Weights are compared at the first step and then every so many; called on all ranks.

        Args:
            hosts: of every rank.
        """
        self._hosts, self._weights_every, self._zero_stage = hosts, weights_every, zero_stage
        self._first = True
        self._group = distributed.new_group(backend="gloo", timeout=PATIENCE) if is_distributed() else None

    def compare(self, step: int, digest: str, batches: list[Any], module: nn.Module, asked: bool) -> bool:
        """Whether any rank `asked`, once all agree on what step they take with what.

        Args:
            digest: 16 hex digits of the rows of the step, of all ranks.
            batches: this rank's, nested NamedTuples of tensors; as many rows are expected on every rank.

        Raises:
            Diverged: on all ranks, if one differs from the others.
        """
        if self._group is None:
            return asked
        weights = 0
        if self._first or step % self._weights_every == 0:
            weights = weights_digest(module, self._zero_stage, frozen=self._first)
        self._first = False
        own = [step, _signed(digest), _number([_shapes(batch) for batch in batches]), slicing.slices_run, weights]
        facts = torch.tensor([*own, int(asked)])
        everyone = [torch.empty_like(facts) for _ in self._hosts]
        distributed.all_gather(everyone, facts, group=self._group)
        ranks = torch.stack(everyone).tolist()
        if problem := difference(ranks, self._hosts):
            raise Diverged(problem)
        return any(rank[-1] for rank in ranks)


def difference(ranks: list[list[int]], hosts: list[str]) -> str:
    """In which of FACTS which ranks differ from most, in one line; empty if none does."""
    for place, name in enumerate(FACTS):
        values = [facts[place] for facts in ranks]
        (usual, count), *others = Counter(values).most_common()
        if not others:
            continue
        tied = others[0][1] == count
        odd = [r for r, value in enumerate(values) if value != usual or tied]
        named = ", ".join(f"rank {r} ({hosts[r]})" for r in odd[:4]) + (", ..." if len(odd) > 4 else "")
        step = Counter(facts[0] for facts in ranks).most_common(1)[0][0]
        found = ": " + ", ".join(str(values[r]) for r in odd[:4]) if name in ("step", "slices") else ""
        whom = "have not the same" if tied else "not the other ranks'"
        return (
            f"{named}: {whom} {name}{found}, before step {step}; nothing is saved of it, the same command goes on from "
            "the last checkpoint"
        )
    return ""


@torch.no_grad()
def weights_digest(module: nn.Module, zero_stage: int, frozen: bool) -> int:
    """A number of the bits of weights and state that every rank holds whole: at ZeRO 3 of the state alone.

    Args:
        frozen: also of parameters that are not trained, as at the start, when each rank has read its own copy.
    """
    held: list[Tensor] = [] if zero_stage == 3 else [p for p in module.parameters() if p.requires_grad or frozen]
    state = module.extra_state()  # pyright: ignore[reportCallIssue]
    return _number([int(_bits(tensor)) for tensor in [*held, *state.values()]])


def _bits(tensor: Tensor) -> Tensor:
    """Sum of a tensor's bits, read as integers; those of each chunk count by its place."""
    whole = tensor.detach().contiguous().view(VIEWS[tensor.element_size()]).view(-1)
    chunks = [chunk.sum(dtype=torch.int64) * place for place, chunk in enumerate(whole.split(CHUNK), start=1)]
    return torch.stack(chunks).sum()


def _shapes(batch: Any) -> Any:
    """Rows of every tensor; their lengths follow from a rank's own texts."""
    if batch is None:
        return None
    return len(batch) if isinstance(batch, Tensor) else [_shapes(part) for part in batch]


def _number(value: Any) -> int:
    return _signed(hashlib.blake2b(str(value).encode(), digest_size=8).hexdigest())


def _signed(digest: str) -> int:
    return int(np.uint64(int(digest, 16)).astype(np.int64))
