"""Memory and time of the chunked next-token loss beside the plain form, on a CPU; prints one table. Not a test.

python tests/benchmarks/bench_vocabulary_logits.py [--rows 16] [--length 128] [--vocabulary 32768] [--shortest 0.25]
"""

import json
from typing import Any

import torch
import torch.nn.functional as F
from steps import apart, arguments_of, measure, parse
from torch import Tensor, nn

from toolkit.losses.language import row_nll

WIDTH = 256
CHUNKS = (1, 8, 32)


def plain(head: nn.Module, states: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of every position, padding included."""
    labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    return F.cross_entropy(head(states)[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def run_cell(cell: dict[str, Any]) -> dict[str, float]:
    """Loss, CPU seconds, and peak MiB beyond head and states of one forward and backward."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, cell["vocabulary"], bias=False)

    def texts(rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        states = torch.randn(rows, length, WIDTH, requires_grad=True)
        real = torch.linspace(cell["shortest"], 1, rows)[:, None] * length
        return states, torch.randint(cell["vocabulary"], (rows, length)), (torch.arange(length) < real).long()

    def loss_of(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return row_nll(head, *batch, cell["chunks"]).sum() if cell["chunks"] else plain(head, *batch)

    return measure(head, loss_of, texts(2, 4), texts(cell["rows"], cell["length"]))


def main() -> None:
    parser = arguments_of(__doc__)
    for name, default in {"rows": 16, "length": 128, "vocabulary": 32768}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shortest", type=float, default=1.0, help="shortest row as a share of the longest")
    args = parse(parser, run_cell)
    sizes = {name: vars(args)[name] for name in ("rows", "length", "vocabulary", "shortest")}
    print(f"{json.dumps(sizes)}, width {WIDTH}, fp32")
    print(f"{'form':<10}{'MiB':>9}{'of plain':>10}{'CPU s':>9}{'of plain':>10}")
    base: dict[str, float] = {}
    for chunks in (0, *CHUNKS):
        found = apart(__file__, chunks=chunks, **sizes)
        base = base or found
        ratios = [found[name] / base[name] for name in ("mib", "seconds")]
        name = f"{chunks} chunks" if chunks else "plain"
        print(f"{name:<10}{found['mib']:>9.0f}{ratios[0]:>10.3f}{found['seconds']:>9.2f}{ratios[1]:>10.2f}", flush=True)
        assert abs(found["loss"] / base["loss"] - 1) < 1e-5


if __name__ == "__main__":
    main()
