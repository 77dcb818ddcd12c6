"""Losses on graded judgements: Wasserstein with a share of KL, KL, and InfoNCE on binary grades, by cross-validation.

python tests/benchmarks/compare_graded.py COLLECTION START OUTPUT [--folds 2] [--seeds 42 43 44] [--steps 30]

Not a test. COLLECTION is a folder in BEIR layout with graded judgements (the split test), START a folder with a
retriever. The queries are dealt into folds; on each, every loss trains from the same start, with the same queries,
passages, steps and learning rate, on the judgements of the other folds and four passages a query that BM25 finds
(grade 0). So every query is scored by models that did not train on it. A query's nDCG@10 is averaged over the seeds,
and losses are compared by paired tests over all queries. What is finished is not done again.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from eval.compare import interval, p_text
from eval.significance import compare, holm
from toolkit.determinism import generator

ROOT = Path(__file__).resolve().parents[2]
LOSSES = {
    "infonce": {"infonce": 1.0},
    "kl": {"kl": 1.0},
    "wasserstein": {"wasserstein": 1.0},
    "mixture": {"wasserstein": 1.0, "kl": 0.1},
}
METRIC = "ndcg_at_10"


def main() -> None:
    arguments = parsed()
    judged = lines_of(arguments.collection / "qrels" / "test.tsv")
    deal(arguments, judged)
    for fold in range(arguments.folds):
        mine(arguments, fold)
        for seed in arguments.seeds:
            train(arguments, fold, seed)
    show(arguments)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("collection", type=Path)
    parser.add_argument("start", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--pool", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    return parser.parse_args()


def lines_of(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]


def deal(arguments: argparse.Namespace, judged: list[list[str]]) -> None:
    """A folder in BEIR layout for every fold: its queries are the split test, the others the split train."""
    queries = sorted({line[0] for line in judged})
    order = generator("folds", 0).permutation(len(queries))
    fold_of = {queries[place]: number % arguments.folds for number, place in enumerate(order)}
    for fold in range(arguments.folds):
        folder = arguments.output / f"fold_{fold}"
        (folder / "qrels").mkdir(parents=True, exist_ok=True)
        for name in ("corpus.jsonl", "queries.jsonl"):
            shutil.copyfile(arguments.collection / name, folder / name)
        for split, tested in (("train", False), ("test", True)):
            rows = ["\t".join(line) for line in judged if (fold_of[line[0]] == fold) is tested]
            header = "query-id\tcorpus-id\tscore\n"
            (folder / "qrels" / f"{split}.tsv").write_text(header + "\n".join(rows) + "\n", encoding="utf-8")


def mine(arguments: argparse.Namespace, fold: int) -> None:
    output = arguments.output / f"bm25_{fold}"
    if not output.exists():
        of = ["--pairs", str(arguments.output / f"fold_{fold}"), "--split", "train", "--output", str(output)]
        command = ["toolkit.mine", "bm25", "--text", "prose", "--ranks", "1", "100", "--negatives", "50", "--seed", "1"]
        run("-m", *command, *of)


def train(arguments: argparse.Namespace, fold: int, seed: int) -> None:
    """One run with a stage for each loss, all from the same start."""
    name = f"fold_{fold}_seed_{seed}"
    recipe = {
        "name": name,
        "seed": seed,
        "stages": [stage(arguments, fold, loss) for loss in arguments.losses],
    }
    path = arguments.output / f"{name}.json"
    path.write_text(json.dumps(recipe, indent=2), encoding="utf-8")
    run("launcher/run.py", str(path), "--output", str(arguments.output / "runs" / name))


def stage(arguments: argparse.Namespace, fold: int, loss: str) -> dict[str, Any]:
    folder, found = str(arguments.output / f"fold_{fold}"), str(arguments.output / f"bm25_{fold}")
    binary = {"grade": 1} if loss == "infonce" else {}
    return {
        "name": loss,
        "start": {"folder": str(arguments.start)},
        "encoder": {"max_tokens": arguments.max_tokens, "eval_max_tokens": 256},
        "lora": None,
        "objective": {"name": "sycl", "losses": LOSSES[loss], "temperature": 0.05},
        "data": {
            "sources": [
                {"folder": found, "format": "pairs", "below": 1, "pick": {"random": 4}, "grade": 0},
                {"folder": folder, "format": "beir", "at_least": 1, **binary},
            ],
            "join": "query_text",
            "group": {"size": 4, "by": "positive_first" if binary else "random", "few": "cycle"},
        },
        "batch": {"pool": arguments.pool, "span": "world", "pools_per_step": 1, "forward_rows": None},
        "optim": {
            "lr": arguments.lr,
            "warmup_steps": 3,
            "warmup": "linear",
            "schedule": "linear",
            "steps": arguments.steps,
            "weight_decay": 0.0,
            "clip": 1.0,
        },
        "precision": arguments.precision,
        "zero": {"stage": 1},
        "save": {"every": 1000, "keep": 1},
        "eval": {"suites": [f"{folder}:test"]},
        "export": {"merged": False},
    }


def run(*command: str) -> None:
    print("$ python", *command, flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def show(arguments: argparse.Namespace) -> None:
    """Means, deviations over seeds, and every pair of systems tested over the queries."""
    systems = ["start", *arguments.losses]
    found = {system: [scores_of_all(arguments, seed, system) for seed in arguments.seeds] for system in systems}
    print(f"{'system':14}{METRIC:>14}   {'seeds':30}")
    for system, by_seed in found.items():
        means = [float(np.mean(list(scores.values()))) for scores in by_seed]
        print(f"{system:14}{np.mean(means):14.4f}   {' '.join(f'{mean:.4f}' for mean in means)}")
    queries = sorted(found["start"][0])
    mean = {
        system: np.mean([[scores[query] for query in queries] for scores in by_seed], axis=0)
        for system, by_seed in found.items()
    }
    pairs = list(itertools.combinations(systems, 2))
    compared = [compare(mean[before], mean[after], seed=0) for before, after in pairs]
    print(f"{len(queries)} queries, paired; p Holm: over all pairs")
    for (before, after), change, p_holm in zip(pairs, compared, holm([c.p_value for c in compared]), strict=True):
        counts = f"{change.wins}/{change.ties}/{change.losses}"
        tested = f"p {p_text(change.p_value)}, Holm {p_text(p_holm)}  {counts}"
        print(f"{before + ' -> ' + after:28}{interval(change):28} {tested}")


def scores_of_all(arguments: argparse.Namespace, seed: int, system: str) -> dict[str, float]:
    """Query -> nDCG@10, each of the fold in which it was not trained on."""
    scores: dict[str, float] = {}
    for fold in range(arguments.folds):
        folder = arguments.output / "runs" / f"fold_{fold}_seed_{seed}"
        result = next(folder.glob("start/eval" if system == "start" else f"stage_*_{system}/eval"))
        (by_metric,) = json.loads((result / "per_query.json").read_text(encoding="utf-8")).values()
        scores |= by_metric[METRIC]
    return scores


if __name__ == "__main__":
    main()
