"""Worker: a pool's keys and values shared between ranks against gathering them all. Request: {"rows"}."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from toolkit.collectives import rank, world_size
from toolkit.methods.revela.pool_memory import share_pool
from toolkit.ranks.last_words import end
from toolkit.ranks.process_group import start_distributed


def random_pool(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's keys and values [rows, 2, 3 layers, 2 heads, L, 4] and lengths; ranks differ in their longest."""
    random = torch.Generator().manual_seed(seed)
    length = torch.randint(1, 4 + seed, (rows,), generator=random)
    return torch.randn(rows, 2, 3, 2, int(length.max()), 4, dtype=torch.float64, generator=random), length


def main() -> None:
    rows = json.loads(Path(sys.argv[-2]).read_text())["rows"]
    start_distributed()
    everyone = [random_pool(rows, r) for r in range(world_size())]
    own, length = everyone[rank()]
    own.requires_grad_()
    needs = torch.rand(world_size(), world_size() * rows, generator=torch.Generator().manual_seed(9)) < 0.5
    needs[-1] = False  # the last rank reads nothing, and is read
    needed = needs[rank()]
    memory, traffic = share_pool(own, length, needed, "world")
    wide = max(kv.shape[-2] for kv, _ in everyone)
    whole = torch.cat([torch.nn.functional.pad(kv, (0, 0, 0, wide - kv.shape[-2])) for kv, _ in everyone]).detach()
    same = memory.length.equal(torch.cat([lengths for _, lengths in everyone])[needed])
    same &= memory.place[needed].equal(torch.arange(int(needed.sum())))
    for index, layer in enumerate(memory.layers):
        layer.ready()
        same &= layer.keys_values.equal(whole[needed][:, :, index])
        if needed.any():
            sources = torch.arange(int(needed.sum())).flip(0)
            weight = float(rank() + 1 + index)
            layer.add_gradient(sources, layer.keys_values[sources, 0] * weight, layer.keys_values[sources, 1] * weight)
    memory.ticket.sum().backward()
    mine = needs[:, rank() * rows : (rank() + 1) * rows].double()  # [readers, rows]
    assert own.grad is not None

    def off(readers: torch.Tensor) -> float:
        """Largest difference from the gradient that these ranks' reading gives."""
        times = [(readers * (torch.arange(world_size()) + 1 + layer)[:, None]).sum(0) for layer in range(3)]
        factor = torch.stack(times, 1)[:, None, :, None, None, None]
        return float((own.grad - own.detach() * factor).abs().max())  # pyright: ignore[reportOptionalOperand]

    others = torch.arange(world_size()) != rank()
    answer: dict[str, Any] = {
        "same": bool(same),
        "gradient": off(mine),
        "gradient of own readers": off(mine * ~others[:, None]),
        "traffic": list(traffic),
    }
    sent = mine[others].sum(0)
    per_token = 2 * 2 * 3 * 2 * 4 * 8  # there and back; keys, values; layers; heads; channels; bytes
    answer["expected"] = [float(sent.sum() * wide * per_token), float((sent * length).sum() * per_token)]
    answers: list[Any] = [None] * world_size()
    dist.all_gather_object(answers, answer)
    if rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
    end(0)
