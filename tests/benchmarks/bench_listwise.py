"""The list-wise Wasserstein loss beside KL and beside its plain form with a whole Q x N target; prints one table.

PYTHONPATH=tests python tests/benchmarks/bench_listwise.py [--queries 64,256,1024] [--size 4] [--times 3]

Not a test. Value and gradient of fp32 scores on one rank, CPU seconds; the forms take turns. Kept memory is that of the
tensors which autograd keeps between the passes, scores not counted; made memory is the largest sum of tensors that
are alive at once.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from reference_listwise import plain_wasserstein
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import toolkit.losses.listwise
from toolkit.losses.listwise import kl, wasserstein

MIB = 2**20


def dense(scores: Tensor, grades: Tensor, temperature: float) -> Tensor:
    return plain_wasserstein(scores, grades, temperature)


def mean_kl(scores: Tensor, grades: Tensor, temperature: float) -> Tensor:
    return kl(scores, grades, temperature).mean()


FORMS: dict[str, Callable[..., Tensor]] = {"ours": wasserstein, "kl": mean_kl, "plain": dense}


def inputs(queries: int, size: int) -> tuple[Tensor, Tensor]:
    """Scores of a retriever that is nearly right: structure in every singular value."""
    torch.manual_seed(0)
    grades = torch.stack([torch.randperm(size) for _ in range(queries)])
    own = torch.arange(queries * size).view(queries, size)
    scores = 0.5 * torch.randn(queries, queries * size).scatter_add(1, own, grades.float())
    return scores.requires_grad_(), grades


def seconds(form: Callable[..., Tensor], scores: Tensor, grades: Tensor) -> float:
    began = time.process_time()
    torch.autograd.grad(form(scores, grades, 1.0), scores)
    return time.process_time() - began


def of_decomposition(scores: Tensor, grades: Tensor) -> float:
    """Seconds that the singular values and vectors take of a pass."""
    taken = 0.0
    svd = torch.linalg.svd

    def timed(matrix: Tensor) -> Any:
        nonlocal taken
        began = time.process_time()
        found = svd(matrix)
        taken += time.process_time() - began
        return found

    toolkit.losses.listwise.torch.linalg.svd = timed
    try:
        seconds(wasserstein, scores, grades)
    finally:
        toolkit.losses.listwise.torch.linalg.svd = svd
    return taken


def memory(form: Callable[..., Tensor], scores: Tensor, grades: Tensor) -> tuple[float, float]:
    """MiB that autograd keeps, and the most that is alive at once, of one pass."""
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() != scores.untyped_storage().data_ptr():
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = form(scores, grades, 1.0)
    held = sum(kept.values()) / MIB
    del loss
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        torch.autograd.grad(form(scores, grades, 1.0), scores)
    alive = most = 0
    for event in profiler.profiler.kineto_results.events():  # pyright: ignore[reportOptionalMemberAccess]
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return held, most / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", default="64,256,1024")
    parser.add_argument("--size", type=int, default=4, help="passages of a query")
    parser.add_argument("--times", type=int, default=3, help="alternations of the forms")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"groups of {args.size}, fp32 scores, value and gradient, CPU, {args.threads} threads")
    print(
        f"{'queries':>8}{'seconds':>10}{'/ kl':>8}{'/ plain':>9}{'decomposition':>15}"
        f"{'kept MiB':>10}{'/ kl':>8}{'/ plain':>9}{'made MiB':>10}{'/ kl':>8}{'/ plain':>9}"
    )
    for queries in (int(n) for n in args.queries.split(",")):
        print(row(queries, args.size, args.times), flush=True)


def row(queries: int, size: int, times: int) -> str:
    scores, grades = inputs(queries, size)
    for form in FORMS.values():
        seconds(form, scores, grades)
    runs = [{name: seconds(form, scores, grades) for name, form in FORMS.items()} for _ in range(times)]
    share = statistics.median(of_decomposition(scores, grades) / run["ours"] for run in runs)
    ratios = [statistics.median(run["ours"] / run[other] for run in runs) for other in ("kl", "plain")]
    found = {name: memory(form, scores, grades) for name, form in FORMS.items()}
    (kept, made), others = found["ours"], (found["kl"], found["plain"])
    return (
        f"{queries:>8}{statistics.median(run['ours'] for run in runs):>10.4f}{ratios[0]:>8.1f}{ratios[1]:>9.3f}"
        f"{share:>15.2f}{kept:>10.2f}"
        + "".join(f"{kept / x[0]:>{8 + i}.2f}" for i, x in enumerate(others))
        + f"{made:>10.2f}"
        + "".join(f"{made / x[1]:>{8 + i}.2f}" for i, x in enumerate(others))
    )


if __name__ == "__main__":
    main()
