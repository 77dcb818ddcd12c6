"""A contrastive step in slices beside one that keeps all activations, at equal lengths; prints one table. Not a test.

python tests/benchmarks/bench_cached_step.py [--pairs 64] [--tokens 128] [--forward-rows 16] [--times 5] [--threads 1]

Every slice is run twice and differentiated once, which costs as much as two runs: 4/3 is what arithmetic allows.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from steps import VOCABULARY, apart, arguments_of, measure, our_step, pairs_of, parse, real_rows, save_model

from toolkit.data.pairs import PairBatch
from toolkit.data.tokens import Tokens

WARM_UP = 2


def random_batch(pairs: int, tokens: int) -> PairBatch:
    """Pairs of random texts that all have as many tokens."""
    torch.manual_seed(0)
    sides = (torch.randint(3, VOCABULARY, (pairs, tokens)) for _ in range(2))
    return pairs_of(*(Tokens(ids, torch.ones_like(ids)) for ids in sides))


def run_cell(cell: dict[str, Any]) -> dict[str, float]:
    torch.set_num_threads(cell["threads"])
    module, loss_of = our_step(Path(cell["folder"]), cell["kind"], cell["pairs"], forward_rows=cell["forward_rows"])
    small, batch = (random_batch(n, cell["tokens"]) for n in (WARM_UP, cell["pairs"]))
    return measure(module, loss_of, small, batch)


def ratios(folder: Path, kind: str, args: argparse.Namespace) -> tuple[list[float], list[float], list[float]]:
    """Seconds of the cached and of the plain form, and their ratios, in alternation in this process."""
    forms = [our_step(folder, kind, args.pairs, forward_rows=rows) for rows in (args.forward_rows, None)]
    batch = random_batch(args.pairs, args.tokens)
    runs = []
    for _ in range(args.times + 1):
        runs.append([])
        for module, loss_of in forms:
            module.zero_grad(set_to_none=True)
            start = time.process_time()
            loss_of(batch).backward()
            runs[-1].append(time.process_time() - start)
    cached, plain = zip(*runs[1:], strict=True)
    return list(cached), list(plain), sorted(a / b for a, b in zip(cached, plain, strict=True))


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="of every text")
    parser.add_argument("--forward-rows", type=int, default=16, help="texts of a slice")
    parser.add_argument("--times", type=int, default=5, help="alternations of the two forms")
    args = parse(parser, run_cell)
    torch.set_num_threads(args.threads)
    _, _, tokenizer = real_rows(1, args.tokens)
    print(
        f"4 layers, 256 wide, fp32, {args.threads} threads, {args.pairs} pairs of {args.tokens} tokens each, slices of "
        f"{args.forward_rows} texts\n{'':<7}{'CPU seconds':>17}{'time cached / plain':>30}{'MiB beyond model':>20}\n"
        f"{'model':<7}{'cached':>8}{'plain':>9}{'median (least to most)':>30}{'cached':>10}{'plain':>10}"
    )
    for kind in args.models.split(","):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_model(folder, kind, tokenizer)
            cell = {"kind": kind, "folder": name, "pairs": args.pairs, "tokens": args.tokens, "threads": args.threads}
            memory = [apart(__file__, forward_rows=rows, **cell)["mib"] for rows in (args.forward_rows, None)]
            cached, plain, shares = ratios(folder, kind, args)
        ratio = f"{statistics.median(shares):.3f} ({shares[0]:.3f} to {shares[-1]:.3f})"
        print(
            f"{kind:<7}{statistics.median(cached):>8.2f}{statistics.median(plain):>9.2f}{ratio:>30}"
            f"{memory[0]:>10.0f}{memory[1]:>10.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
