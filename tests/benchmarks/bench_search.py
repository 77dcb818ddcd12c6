"""Time and memory of exact search over vectors on disk, and of a plain torch form on a part. Not a test.

python tests/benchmarks/bench_search.py [--rows 1000000] [--dim 768] [--queries 1000] [--k 1000] [--threads 2]
"""

import argparse
import ctypes
import gc
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from toolkit.retrieval.search import search
from toolkit.retrieval.vectors import DTYPES, Shard, Vectors, open_shard, save_shard

ROWS, MIB = 2**14, 2**20


def resident(field: str) -> int:
    """Bytes by /proc/self/status: RssAnon, this process's own; RssFile, pages of files, given back on demand."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def measured(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What it returns, its seconds (by the clock and of the CPU), and the peak of its memory, looked at every 5 ms."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, peak, done = (
        {f: resident(f) for f in ("RssAnon", "RssFile")},
        {"RssAnon": 0, "RssFile": 0},
        threading.Event(),
    )

    def look() -> None:
        while not done.wait(0.005):
            for field in peak:
                peak[field] = max(peak[field], resident(field))

    watcher = threading.Thread(target=look)
    watcher.start()
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    figures = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    done.set()
    watcher.join()
    return result, figures | {field: (peak[field] - before[field]) / MIB for field in peak}


def write(folder: Path, rows: int, dim: int, dtype: str) -> Vectors:
    """Random vectors of unit length in shards."""
    shards = []
    for start in range(0, rows, ROWS):
        count = min(ROWS, rows - start)
        made = np.random.default_rng(start).standard_normal((count, dim), np.float32)
        made /= np.linalg.norm(made, axis=1, keepdims=True)
        path = folder / f"{start // ROWS:05d}.npy"
        save_shard(path, made.astype(DTYPES[dtype]))
        shards.append(Shard(np.arange(start, start + count), open_shard(path)))
    return Vectors(shards, np.arange(rows))


def plain(queries: np.ndarray, vectors: Vectors, k: int) -> np.ndarray:
    """All vectors and all scores in memory, in fp32."""
    scores = torch.from_numpy(queries) @ torch.from_numpy(vectors.array()).T
    return scores.topk(k, dim=1).indices.numpy()


def plain_fp64(queries: np.ndarray, vectors: Vectors, k: int) -> np.ndarray:
    scores = queries.astype(np.float64) @ vectors.array().astype(np.float64).T
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def show(name: str, rows: int, figures: dict[str, float]) -> None:
    print(f"{name:<22}{rows:>10,}" + "".join(f"{value:>12.1f}" for value in figures.values()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--part", type=int, default=100_000, help="rows at which the plain form is measured, too")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--k", type=int, default=1000)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp16")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    queries = np.random.default_rng(-1 % 2**32).standard_normal((args.queries, args.dim), np.float32)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {args.threads} threads"
    with tempfile.TemporaryDirectory() as folder:
        vectors = write(Path(folder), args.rows, args.dim, args.dtype)
        part = Vectors(vectors.shards[: args.part // ROWS], np.arange(args.part // ROWS * ROWS))
        search(queries[:8], part, args.k)  # libraries load their own buffers
        print(f"{args.queries:,} queries, k {args.k}, dim {args.dim}, {args.dtype} on disk, {where}")
        print(f"{'':<22}{'vectors':>10}{'seconds':>12}{'CPU seconds':>12}{'MiB its own':>12}{'MiB mapped':>12}")
        (_, ours), figures = measured(lambda: search(queries, part, args.k))
        show("search", len(part.first), figures)
        theirs, figures = measured(lambda: plain(queries, part, args.k))
        show("plain torch, fp32", len(part.first), figures)
        some = slice(0, 50)
        exact = plain_fp64(queries[some], part, args.k)
        right = [f"{(found[some] == exact).mean():.6f}" for found in (ours, theirs)]
        print(f"ids equal to those of fp64: {right[0]}, plain torch {right[1]}")
        show("search", args.rows, measured(lambda: search(queries, vectors, args.k))[1])


if __name__ == "__main__":
    main()
