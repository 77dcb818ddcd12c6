"""A whole Revela step at growing pools over several ranks, beside that at the smallest; prints one table. Not a test.

PYTHONPATH=tests python tests/benchmarks/bench_revela_step.py [--pools 16,32,64,128,256,512] [--temperatures 1e-4,0.05]
    [--layers 4]

The engine of a training run (ZeRO 1), small Llamas with LoRA, passages of the embedded corpus. Every cell runs in fresh
processes: a warm-up step on half the smallest pool, then whole steps, whose CPU seconds and peak memory count.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributed import launch
from steps import CELL_SECONDS, MIB, VOCABULARY, resident, settled
from tiny import models_at, revela_stage

from toolkit.collectives import gather, rank, world_size
from toolkit.data.spans import PoolPlan, cut
from toolkit.data.stdlib_corpus import training_files
from toolkit.data.train_tokenizer import BOS, EOS, train_tokenizer
from toolkit.methods.revela.keys import RevelaObjective
from toolkit.methods.revela.rows import RevelaBatch, collate_revela
from toolkit.models.backbone import build_llama, llama_config, load_tokenizer
from toolkit.ranks.last_words import end
from toolkit.ranks.process_group import start_distributed
from toolkit.recipe.models import BuildTokenizer
from toolkit.recipe.stage import Stage
from toolkit.training.engine import build_engine, train_step

CPU = torch.device("cpu")
SEED, WORDS, MAX_TOKENS, INTERLEAVE = 3, 100, 160, 8
FEWEST = 64  # passages of a cell: small pools run several steps, so that all cells read texts of about one length
LORA = {
    "rank": 16,
    "alpha": 16.0,
    "dropout": 0.0,
    "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
SHAPE = {
    "tokenizer": {"vocab_size": VOCABULARY},
    "hidden_size": 256,
    "intermediate_size": 704,
    "heads": 4,
    "kv_heads": 2,
    "max_tokens": 512,
    "tie_embeddings": True,
}
# Columns that a step logs, by the names of Loss.parts: the head of the column and its format.
LOGGED = {
    "row_entropy": ("entropy", ".2f"),
    "kept_sources": ("kept", ".2f"),
    "dropped_mass": ("dropped", ".1e"),
    "keys_values_mib_sent": ("MiB sent", ".1f"),
    "keys_values_mib_least": ("least", ".1f"),
}


def save_models(folder: Path, layers: int) -> None:
    """The passages, a retriever and a language model, below `folder`.

    The retriever starts as its embeddings alone, so that its similarities are those of texts with more or fewer words
    in common; other random weights send all texts one way.
    """
    passages = [
        (text, number) for number, (_, file) in enumerate(training_files()) for text in cut(file, "lines", WORDS)
    ]
    texts, documents = zip(*passages, strict=True)
    tokenizer = train_tokenizer(BuildTokenizer(vocab_size=VOCABULARY, pieces="text"), iter(texts))
    vocabulary = tokenizer.get_vocab()
    config = llama_config(SHAPE | {"layers": layers}, vocabulary[BOS], vocabulary[EOS], vocabulary[EOS])
    for seed, name in enumerate(("retriever", "language_model")):
        build_llama(config, seed, name == "retriever").save_pretrained(folder / name)  # pyright: ignore
        tokenizer.save_pretrained(folder / name)
    (folder / "passages.json").write_text(json.dumps([texts, documents]), encoding="utf-8")


def stage_of_cell(cell: dict[str, Any]) -> Stage:
    stage = revela_stage(
        encoder__pooling="mean",
        encoder__append_eos=False,
        encoder__query_prefix="",
        encoder__passage_prefix="",
        encoder__max_tokens=MAX_TOKENS,
        lora=LORA,
        objective__half_query=False,
        objective__language_model__lora=LORA,
        objective__language_model__max_tokens=MAX_TOKENS,
        batch={"pool": cell["pool"], "span": "world", "pools_per_step": 1, "forward_tokens": cell["forward_tokens"]},
        **{f"objective__{key}": value for key, value in cell["objective"].items()},
    )
    return stage


class Pools:
    """This rank's rows of pools of any size, dealt as in training."""

    def __init__(self, folder: Path, stage: Stage) -> None:
        texts, documents = json.loads((folder / "passages.json").read_text(encoding="utf-8"))
        self._texts, self._documents = texts, np.array(documents)
        self._stage = stage
        self._tokenizer = load_tokenizer(folder / "language_model")

    def batches(self, pool: int, steps: int) -> list[RevelaBatch]:
        plan = PoolPlan(self._documents, None, pool, INTERLEAVE, SEED)
        share = pool // world_size()
        own = slice(rank() * share, (rank() + 1) * share)
        return [self._collated(plan.pool(step)[own]) for step in range(steps)]

    def _collated(self, rows: np.ndarray) -> RevelaBatch:
        objective = self._stage.objective
        assert isinstance(objective, RevelaObjective)
        return collate_revela(
            [self._texts[row] for row in rows],
            self._documents[rows],
            tokenizer=self._tokenizer,
            lm_tokenizer=self._tokenizer,
            encoder=self._stage.encoder,
            half_query=objective.half_query,
            lm_max_tokens=objective.language_model.max_tokens,
            near_duplicates=None,
        )


def run_cell(folder: Path, cell: dict[str, Any]) -> dict[str, Any]:
    """Means over the steps of one cell: CPU seconds of all ranks, peak MiB of each, tokens, and what the step logs."""
    stage = stage_of_cell(cell)
    engine = build_engine(stage, SEED, CPU, models_at(folder / "retriever", None, folder / "language_model"))
    pools = Pools(folder, stage)
    steps = max(1, FEWEST // cell["pool"])
    batches = pools.batches(cell["pool"], steps)
    train_step(engine, stage, pools.batches(cell["warm_up"], 1), 0, SEED, 0.0, CPU)
    before, start = settled(), time.process_time()
    logged = [train_step(engine, stage, [batch], 1 + i, SEED, 0.0, CPU) for i, batch in enumerate(batches)]
    seconds = time.process_time() - start
    tokens = sum(int(batch.text.attention_mask.sum()) for batch in batches)
    own = [seconds / steps, tokens / steps, (resident("VmHWM") - before) / MIB]
    of_ranks = gather(torch.tensor([own], dtype=torch.float64))
    return {
        "seconds": float(of_ranks[:, 0].sum()),
        "tokens": float(of_ranks[:, 1].sum()),
        "mib": of_ranks[:, 2].tolist(),
        "logged": {name: sum(values[name] for values in logged) / steps for name in LOGGED if name in logged[0]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pools", default="16,32,64,128,256,512")
    parser.add_argument("--temperatures", default="1e-4,0.05")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4, help="of both models; time follows the pairs of every layer")
    parser.add_argument("--forward-tokens", type=int, help="of a slice; default: a rank's share of the smallest pool")
    parser.add_argument("--objective", type=json.loads, default={}, help="JSON: further keys of the recipe's objective")
    args = parser.parse_args()
    pools = [int(pool) for pool in args.pools.split(",")]
    forward_tokens = args.forward_tokens or min(pools) // args.ranks * MAX_TOKENS
    print(
        f"{args.ranks} ranks, ZeRO 1, fp32, span world; retriever and language model of {args.layers} layers, "
        f"256 wide, LoRA; passages of at most {WORDS} words and {MAX_TOKENS} tokens; slices of {forward_tokens} "
        f"tokens\nCPU seconds of all ranks; peak memory beyond the model of the rank that needs most, and of all ranks "
        f"a passage; entropy of the weights in nats; kept, dropped, sent: as the step logs them, - if it does not; "
        f"gather: MiB a rank would send if every rank got all real tokens, by a gather or in a ring\n"
        f"{'pool':<6}{'temperature':>11}{'tokens':>8}{'s/passage':>11}{'ratio':>7}{'MiB/rank':>10}{'MiB/passage':>13}"
        f"{'ratio':>7}{''.join(f'{head:>10}' for head, _ in LOGGED.values())}{'gather':>9}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_models(folder, args.layers)
        first: dict[float, list[float]] = {}
        for pool in pools:
            for temperature in map(float, args.temperatures.split(",")):
                cell = {
                    "pool": pool,
                    "warm_up": min(pools) // 2,
                    "forward_tokens": forward_tokens,
                    "objective": args.objective | {"temperature": temperature},
                }
                (folder / "cell.json").write_text(json.dumps(cell))
                found = measured(folder, args.ranks)
                found["gather"] = gathered_mib(found, args.layers)
                costs = [found["seconds"] / pool, sum(found["mib"]) / pool]
                print(row(pool, temperature, found, costs, first.setdefault(temperature, costs)), flush=True)


def measured(folder: Path, ranks: int) -> dict[str, Any]:
    """`run_cell` in fresh processes, large blocks of whose memory go back when they are freed."""
    done = launch(__file__, ranks, "--worker", str(folder), timeout=CELL_SECONDS, MALLOC_MMAP_THRESHOLD_="65536")
    if done.returncode:
        raise RuntimeError(f"{ranks} ranks ended with {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}")
    return json.loads((folder / "answer.json").read_text())


def row(pool: int, temperature: float, found: dict[str, Any], costs: list[float], first: list[float]) -> str:
    """A line of the table; `costs` and `first`: seconds and MiB a passage here and at the smallest pool."""
    seconds, mib = costs
    logged = found["logged"]
    columns = "".join(
        f"{format(logged[name], form) if name in logged else '-':>10}" for name, (_, form) in LOGGED.items()
    )
    return (
        f"{pool:<6}{temperature:>11g}{found['tokens'] / pool:>8.1f}{seconds:>11.3f}{seconds / first[0]:>7.2f}"
        f"{max(found['mib']):>10.0f}{mib:>13.2f}{mib / first[1]:>7.2f}{columns}{found['gather']:>9.1f}"
    )


def gathered_mib(found: dict[str, Any], layers: int) -> float:
    """Keys and values of a rank's tokens in all layers, fp32, to every other rank, and as much back as gradients."""
    width = SHAPE["hidden_size"] // SHAPE["heads"] * SHAPE["kv_heads"]
    ranks = len(found["mib"])
    return found["tokens"] / ranks * (ranks - 1) * layers * 2 * width * 4 * 2 / MIB


def answer(folder: Path) -> None:
    """What every rank runs."""
    start_distributed()
    found = run_cell(folder, json.loads((folder / "cell.json").read_text()))
    if rank() == 0:
        (folder / "answer.json").write_text(json.dumps(found))
    end(0)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        answer(Path(sys.argv[-1]))
    else:
        main()
