"""Memory and time of the tiled contrastive loss beside the plain form; prints one table. Not a test.

python tests/benchmarks/bench_tiled_loss.py [--rows 65536] [--dim 1024] [--time-rows 8192] [--device cuda]
"""

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.losses.contrastive import negatives

SCALE = 50.0
MIB = 2**20


def tiled(query: Tensor, document: Tensor) -> Tensor:
    return negatives(query, document, SCALE).lse


def plain(query: Tensor, document: Tensor) -> Tensor:
    return (query @ document.T * SCALE).logsumexp(1)


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"tiled": tiled, "plain": plain}


def embeddings(rows: int, dim: int, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    return [F.normalize(torch.randn(rows, dim, device=device), dim=1).requires_grad_() for _ in range(2)]


def seconds(form: str, inputs: list[Tensor]) -> float:
    """Of one forward and backward pass."""
    on_gpu = inputs[0].is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    torch.autograd.grad(FORMS[form](*inputs).sum(), inputs)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def resident(field: str) -> int:
    """Bytes by /proc/self/status: VmRSS now, VmHWM the highest since `measure` reset it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def measure(form: str, rows: int, dim: int, device: str) -> tuple[float, float]:
    """Peak MiB beyond the embeddings and their gradients, and seconds, of the first pass of this process."""
    seconds(form, embeddings(64, dim, device))  # libraries load their own buffers
    inputs = embeddings(rows, dim, device)
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
    taken = seconds(form, inputs)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
    return (peak - before - sum(x.nbytes for x in inputs)) / MIB, taken


def measured_apart(form: str, rows: int, args: argparse.Namespace) -> tuple[float, float]:
    """`measure` in a fresh process, so that nothing freed before is used again."""
    command = [sys.executable, __file__, "--only", form, "--rows", str(rows), "--dim", str(args.dim)]
    done = subprocess.run([*command, "--device", args.device], check=True, capture_output=True, text=True)
    memory, taken = done.stdout.split()
    return float(memory), float(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=65536, help="rows and columns of the tiled form's memory")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--time-rows", type=int, default=8192, help="rows and columns at which both forms are timed")
    parser.add_argument("--times", type=int, default=5, help="alternations of the two forms")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=tuple(FORMS), help="measure one form here and print MiB and seconds")
    args = parser.parse_args()
    if args.only:
        print(*measure(args.only, args.rows, args.dim, args.device))
        return
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"dim {args.dim}, fp32, forward and backward, {where}")
    print(f"{'form':<8}{'rows':>8}{'columns':>9}{'MiB beyond embeddings and gradients':>37}{'seconds':>10}")
    for form, rows in (("tiled", args.rows), ("tiled", args.time_rows), ("plain", args.time_rows)):
        memory, taken = measured_apart(form, rows, args)
        print(f"{form:<8}{rows:>8}{rows:>9}{memory:>37.1f}{taken:>10.2f}", flush=True)
    inputs = embeddings(args.time_rows, args.dim, args.device)
    runs = [{form: seconds(form, inputs) for form in FORMS} for _ in range(args.times + 1)][1:]
    ratios = sorted(run["tiled"] / run["plain"] for run in runs)
    middle = {form: statistics.median(run[form] for run in runs) for form in FORMS}
    print(
        f"time tiled / plain at {args.time_rows}: {statistics.median(ratios):.3f} (median of {args.times}, "
        f"{ratios[0]:.3f} to {ratios[-1]:.3f}; {middle['tiled']:.2f} s and {middle['plain']:.2f} s)"
    )


if __name__ == "__main__":
    main()
