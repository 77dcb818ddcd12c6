"""Speed of encoding beside SentenceTransformer.encode with the same export, on real ragged texts; not a test.

python tests/benchmarks/bench_encode.py [--model FOLDER] [--texts 2000] [--times 5] [--threads 2] [--busy 2]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel

from toolkit.data.stdlib_corpus import collection
from toolkit.data.tokens import Tokens, tokenize
from toolkit.data.train_tokenizer import train_tokenizer
from toolkit.export.write import write_export
from toolkit.models.backbone import load_encoder_backbone, load_tokenizer
from toolkit.prepare.models import ModelSource
from toolkit.recipe.evaluation import EvalSettings
from toolkit.recipe.models import BuildTokenizer, EncoderSettings
from toolkit.retrieval.embed import Retriever, embed_texts
from toolkit.retrieval.retrievers import load_any

VOCABULARY = 8192
CHANGES = EvalSettings()  # pyright: ignore[reportCallIssue]
CARD = {
    "recipe": "bench", "recipe_digest": "", "stage": "bench", "method": "contrastive", "method_card": "none",
    "data": "none",
    "data_digest": "", "steps": 0, "rows_seen": 0, "tokens_seen": 0, "command": "", "seed": 0,
}  # fmt: skip


def export(folder: Path, texts: list[str], max_tokens: int) -> Path:
    """A retriever of MiniLM's shape (6 layers, 384 wide) with random weights, in sentence-transformers layout."""
    tokenizer = train_tokenizer(BuildTokenizer(vocab_size=VOCABULARY, pieces="text"), iter(texts))
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12,
        max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    backbone = load_encoder_backbone(folder / "base", torch.float32)
    settings = EncoderSettings(
        pooling="mean", normalize=True, append_eos=False, query_prefix="", passage_prefix="", max_tokens=max_tokens,
        eval_max_tokens=max_tokens,
    )  # fmt: skip
    write_export(
        folder / "export", backbone=backbone, state=backbone.state_dict(), settings=settings,
        tokenizer=load_tokenizer(folder / "base"), base=ModelSource(folder / "base", str(folder / "base"), None),
        dtype=torch.float32, merged=False, card=CARD,
    )  # fmt: skip
    return folder / "export"


def padded(lengths: list[int], rows: int) -> float:
    """Tokens with padding, for each token, of batches of `rows` texts in this order."""
    batches = [lengths[i : i + rows] for i in range(0, len(lengths), rows)]
    return sum(max(batch) * len(batch) for batch in batches) / sum(lengths)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes beside that do nothing but compute."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a sentence-transformers folder (default: of MiniLM's shape)")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--tokens", type=int, nargs="*", default=[], help="of a batch of ours, besides the default")
    parser.add_argument("--times", type=int, default=5, help="alternations of all forms")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="processes that compute beside")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    corpus = collection("train")
    every = [*corpus.documents.values(), *corpus.queries.values()]
    texts = [every[i] for i in np.random.default_rng(0).permutation(len(every))[: args.texts]]
    with tempfile.TemporaryDirectory() as folder, busy(args.busy):
        made = args.model or export(Path(folder), every, args.max_tokens)
        retriever = load_any(str(made), None, CHANGES, torch.device(args.device)).retriever
        theirs = SentenceTransformer(str(made), device=args.device, local_files_only=True)
        compare(retriever, theirs, texts, args)


def compare(retriever: Retriever, theirs: SentenceTransformer, texts: list[str], args: argparse.Namespace) -> None:
    """Encode the texts in all forms in turn, so often, and print the ratios."""
    most = retriever.settings.eval_max_tokens
    rows = tokenize(retriever.tokenizer, sorted(texts, key=len, reverse=True), "", most, retriever.settings.append_eos)
    lengths = [len(row) for row in rows]
    forms: dict[str, Callable[[list[str]], np.ndarray]] = {
        "sentence-transformers": lambda some: theirs.encode(some, show_progress_bar=False),
        "ours": lambda some: embed_texts(retriever, some, "passage"),
    }
    for tokens in args.tokens:
        forms[f"ours, {tokens}"] = lambda some, tokens=tokens: embed_texts(retriever, some, "passage", tokens)
    off = np.abs(forms["ours"](texts[:64]) - forms["sentence-transformers"](texts[:64])).max()  # and a warm-up
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"cpu, {args.threads} threads"
    what = f"{len(texts):,} texts ({len(set(texts)):,} different), {sum(lengths):,} tokens, fp32, {where}"
    print(f"{what}, {args.busy} busy processes beside; largest difference of the vectors: {off:.1e}", flush=True)
    run_tokens: dict[str, int] = dict.fromkeys(forms, 0)  # padding included
    name = ""

    def count(_: object, tokens: tuple[Tokens], __: object) -> None:
        run_tokens[name] += tokens[0].input_ids.numel()

    retriever.encoder.register_forward_hook(count)
    runs = []
    for _ in range(args.times):
        taken = {}
        for name, encode in forms.items():
            start, cpu = time.perf_counter(), time.process_time()
            encode(texts)
            taken[name] = (time.perf_counter() - start, time.process_time() - cpu)
        runs.append(taken)
        print("  ".join(f"{name} {a:.2f} s (CPU {b:.2f} s)" for name, (a, b) in taken.items()), flush=True)
    for name in [name for name in forms if name != "sentence-transformers"]:
        said = f"{name}: {run_tokens[name] / args.times / sum(lengths):.3f} tokens run for each (theirs "
        said += f"{padded(lengths, 32):.3f}); speed / theirs by"
        for part, clock in enumerate(("clock", "CPU")):
            ratios = sorted(run["sentence-transformers"][part] / run[name][part] for run in runs)
            said += f" {clock} {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        print(f"{said}, median of {args.times}", flush=True)


if __name__ == "__main__":
    main()
