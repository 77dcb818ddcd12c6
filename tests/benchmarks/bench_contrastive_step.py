"""A cached contrastive step beside sentence-transformers' CachedMultipleNegativesRankingLoss; prints one table.

python tests/benchmarks/bench_contrastive_step.py [--batches 256] [--max-tokens 256] [--times 1] [--threads 1]

Not a test. Forward and backward of one process, without optimizer; texts are tokenised and padded before: docstrings
and their code, and in batches larger than all these (some 3,800) names and their code. Every cell runs in a fresh
process: a warm-up on 8 pairs, then one step, whose CPU seconds and peak memory count. A batch of 1024 takes some 20
minutes on one core.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from steps import (
    POOLING,
    TEMPERATURE,
    apart,
    arguments_of,
    measure,
    our_step,
    padded,
    pairs_of,
    parse,
    real_rows,
    save_model,
)

THEIR_ROWS = 32  # their default mini batch
WARM_UP = 8
THEIR_POOLING: dict[str, Literal["mean", "lasttoken"]] = {"mean": "mean", "eos": "lasttoken"}


def their_loss(folder: Path, kind: str, num_tokens: int | None) -> CachedMultipleNegativesRankingLoss:
    """Their loss around the same weights; `num_tokens`: mini_batch_num_tokens."""
    options: dict[str, Any] = {"add_pooling_layer": False} if kind == "bert" else {}
    transformer = Transformer(str(folder), model_kwargs=options)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode=THEIR_POOLING[POOLING[kind]])
    model = SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu").train()
    return CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_num_tokens=num_tokens)


def run_cell(cell: dict[str, Any]) -> dict[str, float]:
    """Measures of one form, model and batch; writes the gradient of all parameters as one vector."""
    torch.set_num_threads(cell["threads"])
    folder, rows, budget = Path(cell["folder"]), cell["batch"], THEIR_ROWS * cell["max_tokens"]
    texts = json.loads((folder / "texts.json").read_text())
    parts = [[padded(side, 0, n) for side in texts] for n in (WARM_UP, rows)]
    if cell["form"] == "ours":
        module, loss_of = our_step(folder, cell["kind"], rows, forward_tokens=budget)
        small, batch = (pairs_of(*part) for part in parts)
    else:
        module = their_loss(folder, cell["kind"], budget if cell["form"] == "num_tokens" else None)
        small, batch = ([tokens._asdict() for tokens in part] for part in parts)

        def loss_of(features: Any, /) -> torch.Tensor:
            return module([dict(side) for side in features], torch.empty(0))

    found = measure(module, loss_of, small, batch)
    gradient = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    np.save(folder / f"{cell['form']}.npy", gradient.numpy())
    return found


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--batches", default="256", help="pairs of a step")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--times", type=int, default=1, help="alternations of the three forms")
    args = parse(parser, run_cell)
    batches = [int(batch) for batch in args.batches.split(",")]
    query, document, tokenizer = real_rows(max(batches), args.max_tokens)
    print(
        f"4 layers, 256 wide, fp32, {args.threads} threads, texts of at most {args.max_tokens} tokens; slices: ours "
        f"{THEIR_ROWS * args.max_tokens} padded tokens, theirs {THEIR_ROWS} rows, or mini_batch_num_tokens "
        f"{THEIR_ROWS * args.max_tokens} (which counts no padding)\n"
        f"{'':<12}{'CPU seconds':>21}{'time ours / theirs':>24}{'MiB beyond model, texts':>27}{'|difference|':>20}\n"
        f"{'model':<7}{'pairs':>5}{'ours':>7}{'rows':>7}{'tokens':>7}{'rows':>12}{'tokens':>12}"
        f"{'ours':>9}{'rows':>9}{'tokens':>9}{'loss':>10}{'gradient':>10}"
    )
    for kind in args.models.split(","):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_model(folder, kind, tokenizer)
            (folder / "texts.json").write_text(json.dumps([query, document]))
            for batch in batches:
                cell = {"kind": kind, "folder": folder, "batch": batch, "max_tokens": args.max_tokens}
                forms = ("ours", "rows", "num_tokens")
                runs = [
                    {form: apart(__file__, form=form, threads=args.threads, **cell) for form in forms}
                    for _ in range(args.times)
                ]
                print(row(kind, batch, runs, folder), flush=True)


def row(kind: str, batch: int, runs: list[dict[str, Any]], folder: Path) -> str:
    """A line of the table: medians of seconds, ratios and MiB; the larger difference to either of their forms."""

    def middle(form: str, what: str) -> float:
        return statistics.median(run[form][what] for run in runs)

    forms = ("ours", "rows", "num_tokens")
    ratios = [statistics.median(run["ours"]["seconds"] / run[form]["seconds"] for run in runs) for form in forms[1:]]
    ours, *theirs = (np.load(folder / f"{form}.npy") for form in forms)
    gradient = max(float(np.linalg.norm(ours - x) / np.linalg.norm(x)) for x in theirs)
    loss = max(abs(runs[0]["ours"]["loss"] / runs[0][form]["loss"] - 1) for form in forms[1:])
    seconds = "".join(f"{middle(form, 'seconds'):>7.1f}" for form in forms)
    memory = "".join(f"{middle(form, 'mib'):>9.0f}" for form in forms)
    shares = "".join(f"{ratio:>12.3f}" for ratio in ratios)
    return f"{kind:<7}{batch:>5}{seconds}{shares}{memory}{loss:>10.1e}{gradient:>10.1e}"


if __name__ == "__main__":
    main()
