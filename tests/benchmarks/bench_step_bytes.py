"""Bytes that a contrastive training step sends, by kind, beside the least it has to; prints one table. Not a test.

PYTHONPATH=tests python tests/benchmarks/bench_step_bytes.py [--ranks 2,4] [--pool 64] [--forward-rows 8]

The small Llama of steps.py, span world, in slices; all its weights or LoRA. Counted is what each rank sends in the
third step, by the best algorithm of every collective: (W - 1) / W of the whole tensor, twice that for an all-reduce.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from distributed import launch
from steps import TEMPERATURE, padded, pairs_of, real_rows, save_model
from tiny import models_at, rows_of_pairs, stage_of
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.collectives import rank, world_size
from toolkit.ranks.last_words import end
from toolkit.ranks.process_group import start_distributed
from toolkit.training.engine import build_engine, train_step

CPU = torch.device("cpu")
SEED, MAX_TOKENS = 3, 64
# What an operation's whole tensor is (its argument) and how often it is sent
OPERATIONS = {
    "allreduce_": (0, 2),
    "allreduce_coalesced_": (0, 2),
    "reduce_": (0, 1),
    "broadcast_": (0, 1),
    "allgather_": (0, 1),
    "_allgather_base_": (0, 1),
    "allgather_into_tensor_coalesced_": (0, 1),
    "reduce_scatter_": (1, 1),
    "_reduce_scatter_base_": (1, 1),
    "reduce_scatter_tensor_coalesced_": (1, 1),
}
KINDS = ("embeddings", "their gradients", "gradients", "weights", "keys, numbers")


class SentBytes(TorchDispatchMode):
    """Counts what this rank sends, by kind and operation, whichever library asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._opname != "barrier":
            place, times = OPERATIONS[func._opname]  # another operation is an error, not a zero
            size = sum(t.nbytes for t in tensors_of(args[place]))
            sent = times * size * (world_size() - 1) / world_size()
            self.sent[kind_of(func._opname, size), func._opname.strip("_")] += round(sent)
        return func(*args, **(kwargs or {}))


def tensors_of(nested: Any) -> list[torch.Tensor]:
    return [nested] if isinstance(nested, torch.Tensor) else [t for part in nested for t in tensors_of(part)]


def kind_of(operation: str, size: int) -> str:
    """Which of KINDS a collective carries, by who called it."""
    frame = sys._getframe(2)
    while frame is not None:
        name, file = frame.f_code.co_qualname, frame.f_code.co_filename
        if name == "_GatherWithGrad.forward":
            return "embeddings"
        if name == "_GatherWithGrad.backward":
            return "their gradients"
        if size <= 64 or ("/toolkit/" in file and name != "gather"):
            return "keys, numbers"
        if "/deepspeed/runtime/" in file:
            return "weights" if "gather" in operation or "broadcast" in operation else "gradients"
        frame = frame.f_back
    raise ValueError(f"{operation} of {size} bytes is called by neither the toolkit nor DeepSpeed")


def least_bytes(engine: Any, rows: int) -> int:
    """One gather of the pool's documents, one reduce-scatter of their gradients, one all-reduce of the gradients."""
    dim = engine.module.encoder.backbone.config.hidden_size
    trainable = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters() if p.requires_grad)
    return round(4 * (2 * rows * dim + 2 * trainable) * (world_size() - 1) / world_size())


def worker(request: dict[str, Any]) -> dict[str, Any]:
    """Bytes of the third step of one case on this rank."""
    changes = {"lora": None} if not request["lora"] else {}
    stage = stage_of(
        "contrastive",
        objective__temperature=TEMPERATURE,
        zero__stage=request["zero"],
        batch__pool=request["pool"],
        batch__span="world",
        batch__pools_per_step=1,
        batch__forward_rows=request["forward_rows"],
        **changes,
    )
    folder = Path(request["folder"])
    engine = build_engine(stage, SEED, CPU, models_at(folder))
    query, document = json.loads((folder / "texts.json").read_text())
    pairs = pairs_of(padded(query, 0, None), padded(document, 0, None))
    share = request["pool"] // world_size()
    own = rows_of_pairs(pairs, rank() * share, (rank() + 1) * share)
    for step in range(2):
        train_step(engine, stage, [own], step, SEED, 0.0, CPU)
    with SentBytes() as counted:
        train_step(engine, stage, [own], 2, SEED, 0.0, CPU)
    least = least_bytes(engine, request["pool"])
    engine.destroy()
    return {"least": least, "sent": [[*key, value] for key, value in counted.sent.items()]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--pool", type=int, default=64, help="pairs of the pool, over all ranks")
    parser.add_argument("--forward-rows", type=int, default=8, help="texts of a slice")
    args = parser.parse_args()
    query, document, tokenizer = real_rows(args.pool, MAX_TOKENS)
    print(
        f"4 layers, 256 wide, fp32, pool of {args.pool} pairs, slices of {args.forward_rows} texts; KiB that a rank "
        f"sends in a step\n{'ranks':<6}{'zero':>5}{'lora':>6}{''.join(f'{kind:>17}' for kind in KINDS)}{'sum':>9}"
        f"{'least':>9}{'ratio':>7}{'without weights':>17}  gradients by"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder, "llama", tokenizer)
        (folder / "texts.json").write_text(json.dumps([query, document]))
        common = {"folder": name, "pool": args.pool, "forward_rows": args.forward_rows}
        cases = [{"zero": zero, "lora": lora} | common for lora in (False, True) for zero in range(4)]
        (folder / "cases.json").write_text(json.dumps(cases))
        for ranks in args.ranks.split(","):
            done = launch(__file__, int(ranks), "--worker", name)
            if done.returncode:
                raise RuntimeError(
                    f"{ranks} ranks ended with {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}"
                )
            for case, found in zip(cases, json.loads((folder / "answers.json").read_text()), strict=True):
                print(f"{ranks:<6}{case['zero']:>5}{'yes' if case['lora'] else 'no':>6}{row(found)}", flush=True)


def row(found: dict[str, Any]) -> str:
    """A line of the table, from `worker`."""
    kinds, used = Counter(), set()
    for kind, operation, sent in found["sent"]:
        kinds[kind] += sent
        if kind == "gradients" and sent > 0.01 * found["least"]:
            used.add(operation)
    total = sum(kinds.values())
    return (
        f"{''.join(f'{kinds[kind] / 1024:>17.1f}' for kind in KINDS)}{total / 1024:>9.0f}{found['least'] / 1024:>9.0f}"
        f"{total / found['least']:>7.3f}{(total - kinds['weights']) / found['least']:>17.3f}  {' '.join(sorted(used))}"
    )


def answer(folder: Path) -> None:
    """What every rank runs."""
    start_distributed()
    answers = [worker(case) for case in json.loads((folder / "cases.json").read_text())]
    if rank() == 0:
        (folder / "answers.json").write_text(json.dumps(answers))
    end(0)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        answer(Path(sys.argv[-1]))
    else:
        main()
