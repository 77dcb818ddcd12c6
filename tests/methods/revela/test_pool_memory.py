"""A pool's keys and values on the ranks that read them, and their gradients at the owners."""

from pathlib import Path

import torch
from distributed import run_on_ranks

from toolkit.methods.revela.pool_memory import share_pool


def test_every_rank_gets_what_it_reads_and_the_owner_the_gradients(tmp_path: Path) -> None:
    answers = run_on_ranks("pool_ranks.py", 3, {"rows": 5}, tmp_path, timeout=500)
    for answer in answers:
        assert answer["same"] and answer["gradient"] < 1e-13
        assert answer["gradient of own readers"] > 0.1  # those of the others count
        assert answer["traffic"] == answer["expected"]
    assert all(answer["traffic"][0] > answer["traffic"][1] > 0 for answer in answers)


def test_alone_nothing_travels() -> None:
    own = torch.randn(4, 2, 3, 2, 5, 4, requires_grad=True)
    length = torch.tensor([5, 2, 3, 1])
    memory, traffic = share_pool(own, length, torch.tensor([True, False, True, True]), "world")
    assert traffic == (0, 0) and memory.place.tolist() == [0, 1, 2, 3] and memory.length is length
    layer = memory.layers[1]
    assert layer.keys_values.data_ptr() == own[:, :, 1].data_ptr()  # no copy
    layer.add_gradient(torch.tensor([2, 2]), *torch.ones(2, 2, 2, 3, 4))
    memory.ticket.sum().backward()
    assert own.grad is not None and own.grad.sum() == own.grad[2, :, 1, :, :3].sum() == 2 * 2 * 2 * 3 * 4
    detached, _ = share_pool(own.detach(), length, torch.ones(4).bool(), "world")
    assert memory.ticket.requires_grad and not detached.ticket.requires_grad
