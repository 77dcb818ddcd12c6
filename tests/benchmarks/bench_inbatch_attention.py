"""One layer's in-batch term beside the plain B x B x L x L form of the paper; prints one table.

PYTHONPATH=tests python tests/benchmarks/bench_inbatch_attention.py [--passages 16,32] [--times 3] [--device cpu]

Not a test. 8 heads of 64 channels, passages of 160 tokens, forward and backward; weights: a softmax of random scores
(dense) and of random cosines at temperature 1e-4. A GPU takes bf16 and is timed by its own clock, also against plain
causal attention over the same rows; a CPU takes fp32 and counts CPU seconds. Saved memory is that of the tensors which
autograd keeps between forward and backward, inputs not counted.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from read_others import read_others
from reference import in_batch_term
from torch import Tensor

HEADS, WIDTH, LENGTH, MIB = 8, 64, 160, 2**20


def inputs(passages: int, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = (passages, HEADS, LENGTH, WIDTH)
    return [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]


def weights_of(passages: int, sparse: bool, device: str) -> Tensor:
    """[B, B] with a diagonal of zeros; cosines as in specification of the method: 0.8 +- 0.05."""
    scores = torch.randn(passages, passages, generator=torch.Generator().manual_seed(1))
    scores = (0.8 + 0.05 * scores) / 1e-4 if sparse else scores
    itself = torch.eye(passages).bool()
    return scores.masked_fill(itself, -math.inf).softmax(-1).to(device).requires_grad_()


def plain(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return in_batch_term(
        q, k, v, real=torch.ones(len(k), LENGTH, device=k.device), w=w, scaling=WIDTH**-0.5, v_norm=True
    )


def ours(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return read_others(q, k, v, (LENGTH,) * len(k), w, WIDTH**-0.5, True)


def causal(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def measure(form: Callable[..., Tensor], passages: int, sparse: bool, device: str) -> tuple[float, float, list[Tensor]]:
    """(seconds, MiB kept for the backward pass, result and gradients) of one forward and backward."""
    tensors = [*inputs(passages, device), weights_of(passages, sparse, device)]
    given = {t.untyped_storage().data_ptr() for t in tensors}
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in given:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    began = clock(device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = form(*tensors)
    out.float().square().sum().backward()
    seconds = clock(device) - began
    return seconds, sum(kept.values()) / MIB, [out.detach(), *(t.grad for t in tensors if t.grad is not None)]


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", default="16,32")
    parser.add_argument("--times", type=int, default=3, help="alternations of the forms")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"{HEADS} heads of {WIDTH}, {LENGTH} tokens, {args.device}, {args.threads} threads\n"
        f"{'passages':>8}{'weights':>9}{'read':>7}{'seconds':>17}{'time':>8}{'saved MiB':>17}{'memory':>9}"
        f"{'against':>9}{'difference':>12}\n{'':>24}{'ours':>9}{'plain':>8}{'ratio':>8}{'ours':>9}{'plain':>8}{'ratio':>9}{'causal':>9}"
    )
    for passages in (int(n) for n in args.passages.split(",")):
        for sparse in (False, True):
            forms = (ours, plain, causal)
            runs = [[measure(form, passages, sparse, args.device) for form in forms] for _ in range(args.times)]
            print(row(passages, sparse, runs), flush=True)


def row(passages: int, sparse: bool, runs: list[list[tuple[float, float, list[Tensor]]]]) -> str:
    seconds = [statistics.median(run[form][0] for run in runs) for form in range(3)]
    time_ratio, causal_ratio = (statistics.median(run[0][0] / run[form][0] for run in runs) for form in (1, 2))
    (_, mib, found), (_, plain_mib, true), _ = runs[0]
    kept = weights_of(passages, sparse, "cpu") > 0
    found[-1] = found[-1] * kept.to(found[-1].device)  # the softmax before it has no gradient for a weight of 0
    true[-1] = true[-1] * kept.to(true[-1].device)
    off = max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(found, true, strict=True))
    read = int(kept.sum()) / passages
    return (
        f"{passages:>8}{'1e-4' if sparse else 'dense':>9}{read:>7.1f}{seconds[0]:>9.3f}{seconds[1]:>8.3f}"
        f"{time_ratio:>8.3f}{mib:>9.2f}{plain_mib:>8.0f}{mib / plain_mib:>9.4f}{causal_ratio:>9.2f}{off:>12.1e}"
    )


if __name__ == "__main__":
    main()
