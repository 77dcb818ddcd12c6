"""Speed of encoding beside SentenceTransformer.encode with the same export, on real ragged texts; not a test.

python tests/benchmarks/bench_encode.py [--texts 2000] [--max-tokens 256] [--times 3] [--threads 2] [--device cuda]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel

from toolkit.data.stdlib_corpus import collection
from toolkit.data.tokens import tokenize
from toolkit.data.train_tokenizer import train_tokenizer
from toolkit.embed import embed_texts
from toolkit.export import load_export, write_export
from toolkit.models.backbone import load_encoder_backbone, load_tokenizer
from toolkit.prepare import ModelSource
from toolkit.recipe import BuildTokenizer, EncoderSettings

VOCABULARY = 8192
CARD = {
    "recipe": "bench", "recipe_digest": "", "stage": "bench", "method": "contrastive", "data": "none",
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--times", type=int, default=3, help="alternations of the two")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    corpus = collection("train")
    every = [*corpus.documents.values(), *corpus.queries.values()]
    texts = [every[i] for i in np.random.default_rng(0).permutation(len(every))[: args.texts]]
    with tempfile.TemporaryDirectory() as folder:
        made = export(Path(folder), every, args.max_tokens)
        retriever = load_export(made, args.device)
        theirs = SentenceTransformer(str(made), device=args.device, local_files_only=True)
        rows = tokenize(retriever.tokenizer, sorted(texts, key=len, reverse=True), "", args.max_tokens, False)
        lengths = [len(row) for row in rows]
        forms: dict[str, Callable[[list[str]], np.ndarray]] = {
            "ours": lambda some: embed_texts(retriever, some, "passage"),
            "sentence-transformers": lambda some: theirs.encode(some, show_progress_bar=False),
        }
        off = np.abs(forms["ours"](texts[:64]) - forms["sentence-transformers"](texts[:64])).max()  # and a warm-up
        where = torch.cuda.get_device_name() if args.device == "cuda" else f"cpu, {args.threads} threads"
        print(f"{len(texts):,} texts ({len(set(texts)):,} different), {sum(lengths):,} tokens, fp32, {where}")
        print(f"largest difference of the vectors: {off:.1e}")
        runs, run_tokens = [], []  # tokens that our batches run, padding included
        retriever.encoder.register_forward_hook(lambda _, tokens, __: run_tokens.append(tokens[0].input_ids.numel()))
        for _ in range(args.times):
            taken = {}
            for name, encode in forms.items():
                start, cpu = time.perf_counter(), time.process_time()
                encode(texts)
                taken[name] = (time.perf_counter() - start, time.process_time() - cpu)
            runs.append(taken)
            print("  ".join(f"{name} {a:.2f} s (CPU {b:.2f} s)" for name, (a, b) in taken.items()), flush=True)
        ran = sum(run_tokens) / args.times / sum(lengths)
        print(f"tokens run for each token of a text: {ran:.3f}, theirs {padded(lengths, 32):.3f}")
        for part, what in enumerate(("clock", "CPU")):
            ratios = sorted(run["sentence-transformers"][part] / run["ours"][part] for run in runs)
            print(
                f"speed ours / theirs by {what}: {statistics.median(ratios):.3f} (median of {args.times}, "
                f"{ratios[0]:.3f} to {ratios[-1]:.3f})"
            )


if __name__ == "__main__":
    main()
