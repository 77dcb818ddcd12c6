"""What the benchmarks of a contrastive step share: small models, real ragged pairs, time and peak memory of a step."""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from toolkit.data.pairs import PairBatch
from toolkit.data.stdlib_corpus import collection
from toolkit.data.stdlib_names import named_code
from toolkit.data.tokens import Tokens, pad, tokenize
from toolkit.data.train_tokenizer import train_tokenizer
from toolkit.methods.contrastive.keys import ContrastiveObjective
from toolkit.methods.contrastive.objective import Contrastive
from toolkit.models.backbone import load_encoder_backbone
from toolkit.models.encoder import Encoder
from toolkit.recipe.models import BuildTokenizer
from toolkit.recipe.training import Batch

POOLING = {"bert": "mean", "llama": "eos"}
VOCABULARY, TEMPERATURE, MIB = 8192, 0.05, 2**20
CELL_SECONDS = 4 * 3600  # that a cell may take; the largest batches take hours on one core


def save_model(folder: Path, kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """A retriever of random weights: 4 layers, 256 wide, without dropout; "bert" or "llama"."""
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if kind == "bert" else {}
    config = AutoConfig.for_model(
        kind,
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024 if kind == "bert" else 704,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **dropout,
    )
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def texts_of(rows: int) -> tuple[list[str], list[str]]:
    """Docstrings and the code that each describes; when these run out, names and the code that each names.

    Either kind in a fixed random order. Raises ValueError if there are too few.
    """
    documented = collection("train")
    pairs = _shuffled(
        [(text, documented.documents[next(iter(documented.qrels[n]))]) for n, text in documented.queries.items()]
    )
    if rows > len(pairs):
        code_of = dict(named_code())
        name_of = {code: name for name, code in code_of.items()}  # so that no name and no code is there twice
        pairs += _shuffled([(name, code) for code, name in name_of.items()])
    if rows > len(pairs):
        raise ValueError(f"the standard library has {len(pairs)} pairs; found a batch of {rows}")
    queries, documents = zip(*pairs[:rows], strict=True)
    return list(queries), list(documents)


def _shuffled(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]


def real_rows(rows: int, max_tokens: int) -> tuple[list[list[int]], list[list[int]], PreTrainedTokenizerFast]:
    """Token ids of as many queries and documents, and their tokenizer."""
    texts = collection("train")
    every = iter([*texts.queries.values(), *texts.documents.values()])
    tokenizer = train_tokenizer(BuildTokenizer(vocab_size=VOCABULARY, pieces="text"), every)
    query, document = (tokenize(tokenizer, side, "", max_tokens, True) for side in texts_of(rows))
    return query, document, tokenizer


def pairs_of(query: Tokens, document: Tokens) -> PairBatch:
    """Pairs taken as sharing no text: nothing is masked, as in the losses that they are measured beside."""
    rows = len(query.input_ids)
    key = torch.arange(rows)
    none, weight = torch.empty(rows, 0, dtype=torch.int64), torch.ones(rows)
    return PairBatch(query, document, key, key[:, None] + rows, none, key[:, None] + rows, weight)


def our_step(
    folder: Path, kind: str, rows: int, **slices: int | None
) -> tuple[Contrastive, Callable[[PairBatch], Any]]:
    """The contrastive objective of a saved model, and its loss as a function of the batch."""
    encoder = Encoder(load_encoder_backbone(folder, torch.float32).train(), POOLING[kind], True)
    settings = ContrastiveObjective(name="contrastive", temperature=TEMPERATURE)  # pyright: ignore[reportCallIssue]
    batch = Batch(pool=rows, span="rank", pools_per_step=1, **slices)
    objective = Contrastive(encoder, settings, batch)
    return objective, lambda pairs: objective(pairs).total


def padded(rows: list[list[int]], first: int, last: int) -> Tokens:
    return pad(rows[first:last], 0)


def resident(field: str) -> int:
    """Bytes by /proc/self/status: VmRSS now, VmHWM the highest since `settled`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def settled() -> int:
    """Bytes resident once what was freed has gone back; the peak (VmHWM) is counted anew from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what a warm-up freed goes back, so that the step has to ask for it
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def measure(
    module: torch.nn.Module, loss_of: Callable[[Any], torch.Tensor], small: Any, batch: Any
) -> dict[str, float]:
    """Loss, CPU seconds, and peak MiB beyond model and texts of forward and backward, after a small batch's warm-up.

    CPU seconds, of all threads, leave out what other programs of the machine take.
    """
    loss_of(small).backward()
    module.zero_grad(set_to_none=True)
    before, start = settled(), time.process_time()
    loss = loss_of(batch)
    loss.backward()
    taken = time.process_time() - start
    return {"loss": float(loss.detach()), "seconds": taken, "mib": (resident("VmHWM") - before) / MIB}


def apart(script: str, **cell: Any) -> dict[str, Any]:
    """One cell in a fresh process of the script: what it prints as JSON.

    The allocator gives large blocks back when they are freed, so that the peak is of memory in use, without its gaps.
    """
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, script, "--cell", json.dumps(cell, default=str)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=CELL_SECONDS)
    if done.returncode:
        raise RuntimeError(f"{cell} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def arguments_of(description: str | None) -> argparse.ArgumentParser:
    """The options that the benchmarks of a step share; `parse` reads them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--models", default="bert,llama")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cell", help="measure one cell here and print JSON")
    return parser


def parse(parser: argparse.ArgumentParser, run_cell: Callable[[dict[str, Any]], dict[str, float]]) -> Any:
    """The command line; in a process that `apart` started, measure its cell, print it and end."""
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(run_cell(json.loads(args.cell))))
        raise SystemExit
    return args
