"""Time and memory of paired K-means, its assignment, and an epoch of pools, at two numbers of random pairs. Not a test.

python tests/benchmarks/bench_clusters.py [--rows 250000,1000000] [--dim 128] [--size 512] [--iterations 2] [--pool 512]
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from bench_search import MIB, measured

from toolkit.data.clusters import ClusterStore, write_clusters
from toolkit.data.packing import ClusterPlan, greedy_walk
from toolkit.prepare.clusters import NEIGHBOURS
from toolkit.retrieval.kmeans import Fit, assign, mean_documents, nearest_others, paired_kmeans, point_bytes

SIDES = ("query", "document")


def write_vectors(folder: Path, rows: int, dim: int) -> dict[str, np.ndarray]:
    """Random vectors of unit length, fp16 on disk: those of a document lie near its query's."""
    draw = np.random.default_rng(0)
    made = {side: np.lib.format.open_memmap(folder / f"{side}.npy", "w+", np.float16, (rows, dim)) for side in SIDES}
    for first in range(0, rows, 2**16):
        count = min(2**16, rows - first)
        query = draw.normal(size=(count, dim)).astype(np.float32)
        for side, block in (("query", query), ("document", query + draw.normal(size=query.shape))):
            made[side][first : first + count] = block / np.linalg.norm(block, axis=1, keepdims=True)
    for array in made.values():
        array.flush()
    return {side: np.load(folder / f"{side}.npy", mmap_mode="r") for side in SIDES}


def run(rows: int, options: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Seconds, CPU seconds and MiB of each part."""
    vectors = write_vectors(folder, rows, options.dim)
    clusters = -(-rows // options.size)
    began = time.perf_counter()

    def read(some: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        query, document = (vectors[side][some].astype(np.float32) for side in SIDES)
        return query, document

    def say(text: str) -> None:
        if "iteration" in text:
            starts.append((time.perf_counter(), time.process_time()))
        if time.perf_counter() - said[0] > 20:
            said[0] = time.perf_counter()
            print(f"  {rows:,} rows, {said[0] - began:,.0f} s: {text}", flush=True)

    starts: list[tuple[float, float]] = []  # of the iterations, by the clock and of the CPU
    said = [began]
    figures: dict[str, dict[str, float]] = {}

    def part(name: str, work: Callable[[], Any]) -> Any:
        result, one = measured(work)
        figures[name] = one | {"RssAnon": max(0.0, one["RssAnon"])}  # what ends at once is not looked at
        return result

    def fitted() -> Fit:
        wanted: dict[str, Any] = {"iterations": options.iterations, "restarts": 1, "seed": 1, "say": say}
        fit = paired_kmeans(read, np.arange(rows), clusters, **wanted)
        starts.append((time.perf_counter(), time.process_time()))
        return fit

    fit = part("K-means", fitted)
    seconds, cpu = (np.diff(starts, axis=0).mean(0)).tolist()
    figures["an iteration of it"] = figures["K-means"] | {"seconds": seconds, "cpu": cpu}
    found = part("assignment", lambda: assign(read, rows, fit.centroids, say))
    used, cluster = np.unique(found, return_inverse=True)
    means = part("means", lambda: mean_documents(read, cluster, len(used), say))
    near = part("neighbours", lambda: nearest_others(means, NEIGHBOURS, say))
    (folder / "clusters").mkdir()
    write_clusters(folder / "clusters", [cluster], [means], [near])
    store = ClusterStore(folder / "clusters", [rows])
    part("an epoch of pools, greedy", lambda: ClusterPlan(store, options.pool, "greedy", "all", 1).pool(0))
    held = rows * point_bytes(options.dim) / MIB
    print(
        f"{rows:,} rows, {clusters:,} clusters, {len(used):,} of them hold rows; points by arithmetic {held:,.0f} MiB"
    )
    for name, one in figures.items():
        told = f"{one['seconds']:10,.1f} s {one['cpu']:10,.1f} s of CPU {one['RssAnon']:10,.0f} MiB"
        print(f"  {name:28}{told}", flush=True)
    return figures


def walk(count: int, dim: int) -> None:
    """A greedy walk over many clusters: no square of their number is held."""
    means = np.random.default_rng(0).normal(size=(count, dim)).astype(np.float32)
    near, of_lists = measured(lambda: nearest_others(means, NEIGHBOURS, lambda _: None))
    _, of_walk = measured(lambda: greedy_walk(means, near, 0))
    for name, one in (("neighbours", of_lists), ("greedy walk", of_walk)):
        told = f"{one['seconds']:,.1f} s, {one['cpu']:,.1f} s of CPU, {one['RssAnon']:,.0f} MiB"
        print(f"{count:,} clusters, {name}: {told}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="250000,1000000")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--pool", type=int, default=512)
    parser.add_argument("--walk", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    faiss.omp_set_num_threads(options.threads)
    found = []
    for rows in map(int, options.rows.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            found.append(run(rows, options, Path(folder)))
    for name, last in found[-1].items() if len(found) > 1 else ():
        first = found[0][name]
        memory = f", {last['RssAnon'] / first['RssAnon']:.1f} times the memory" if first["RssAnon"] else ""
        print(f"{name}: {last['cpu'] / first['cpu']:.1f} times the CPU time{memory}")
    if options.walk:
        walk(options.walk, options.dim)


if __name__ == "__main__":
    main()
