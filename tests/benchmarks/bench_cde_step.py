"""A step with context beside plain steps of the same texts, and a shared context beside one for each text.

python tests/benchmarks/bench_cde_step.py [--pairs 32] [--max-tokens 128] [--sizes 64,128,512] [--threads 1]

Not a test. Forward and backward of one process, without optimizer, in slices of a fixed number of padded tokens of
texts. Both stages have the same size (4 layers, 256 wide, random weights), and as many context documents are read as
there are context vectors. Every cell runs in a fresh process; CPU seconds and peak memory beyond model and texts count.
An encoder reads the context with every text; a causal model once for all of them (shared), or with every text (apart).
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
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

from toolkit.data.tokens import Tokens
from toolkit.methods.cde.keys import CdeObjective
from toolkit.methods.cde.objective import Cde
from toolkit.methods.cde.rows import CdeBatch
from toolkit.methods.objective import Exported
from toolkit.models.backbone import load_encoder_backbone
from toolkit.models.contextual import ContextualEncoder
from toolkit.recipe.context import ContextSettings
from toolkit.recipe.training import Batch

WARM_UP = 8
SLICE_ROWS = 8
FORMS = {"bert": ("apart",), "llama": ("shared", "apart")}


def contextual(folder: Path, kind: str, size: int, share: bool, batch: Batch) -> Cde:
    """The objective of a saved model as both stages, with `size` context vectors."""
    backbone, first = (load_encoder_backbone(folder, torch.float32).train() for _ in range(2))
    form = "tokens" if kind == "bert" else "projected"
    context = {"size": size, "max_tokens": 512, "form": form, "head": "none"}
    settings = CdeObjective.model_validate(
        {"name": "cde", "temperature": TEMPERATURE, "context": context, "share_prefix": share}
    )
    torch.manual_seed(0)
    settings_of_context: ContextSettings = settings.context
    encoder = ContextualEncoder(backbone, first, settings_of_context, POOLING[kind], True, share_prefix=share)
    return Cde(encoder, settings, batch, Exported("encoder.backbone.", first_stage=folder))


def run_cell(cell: dict[str, Any]) -> dict[str, float]:
    """Measures of one form, model and number of context vectors."""
    torch.set_num_threads(cell["threads"])
    folder, rows, size = Path(cell["folder"]), cell["pairs"], cell["size"]
    texts = json.loads((folder / "texts.json").read_text())
    small, whole = ([padded(side, 0, n) for side in texts] for n in (WARM_UP, rows))
    if cell["form"] == "plain":
        module, loss_of = our_step(folder, cell["kind"], rows, forward_rows=SLICE_ROWS)
        return measure(module, loss_of, pairs_of(*small), pairs_of(*whole))
    batch = Batch(pool=rows, span="rank", pools_per_step=1, forward_rows=SLICE_ROWS)  # pyright: ignore[reportCallIssue]
    module = contextual(folder, cell["kind"], size, cell["form"] == "shared", batch)

    def with_context(query: Tokens, document: Tokens) -> CdeBatch:
        places = torch.arange(size) % len(whole[1].input_ids)
        context = Tokens(*(part[places] for part in whole[1]))
        return CdeBatch(pairs_of(query, document), context, torch.zeros(size, dtype=torch.bool), torch.zeros(1))

    return measure(module, lambda pairs: module(pairs).total, with_context(*small), with_context(*whole))


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--sizes", default="64,128,512", help="context vectors, and documents")
    args = parse(parser, run_cell)
    query, document, tokenizer = real_rows(args.pairs, args.max_tokens)
    print(
        f"4 layers, 256 wide, fp32, {args.threads} threads, {args.pairs} pairs of at most {args.max_tokens} tokens, "
        f"slices of {SLICE_ROWS} texts\n{'model':<7}{'context':>9}{'form':>9}{'CPU seconds':>13}"
        f"{'/ two plain steps':>19}{'MiB':>8}{'/ plain':>9}"
    )
    for kind in args.models.split(","):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_model(folder, kind, tokenizer)
            (folder / "texts.json").write_text(json.dumps([query, document]))
            cell = {"kind": kind, "folder": folder, "pairs": args.pairs, "threads": args.threads}
            plain = apart(__file__, form="plain", size=0, **cell)
            print(f"{kind:<7}{0:>9}{'plain':>9}{plain['seconds']:>13.1f}{0.5:>19.2f}{plain['mib']:>8.0f}{1:>9.2f}")
            for size in map(int, args.sizes.split(",")):
                for form in FORMS[kind]:
                    found = apart(__file__, form=form, size=size, **cell)
                    ratio, memory = found["seconds"] / plain["seconds"] / 2, found["mib"] / plain["mib"]
                    print(
                        f"{kind:<7}{size:>9}{form:>9}{found['seconds']:>13.1f}{ratio:>19.2f}{found['mib']:>8.0f}"
                        f"{memory:>9.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
