"""Texts -> vectors by a trained retriever, shared out over the ranks. Called by export and evaluation."""

import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from toolkit.collectives import gather, group_device, is_distributed, rank, world_size
from toolkit.data.tokens import Tokens, pad, pad_id, tokenize
from toolkit.models.backbone import check_length, load_adapted, load_encoder_backbone, load_tokenizer, read_config
from toolkit.models.encoder import Encoder
from toolkit.recipe import EncoderSettings

ROWS_PER_GATHER = 65536  # vectors travel between ranks in blocks: all at once they would not fit on a GPU


class Retriever(NamedTuple):
    """A model that embeds, with the tokenizer and the settings it was trained with."""

    encoder: Encoder
    tokenizer: Any
    settings: EncoderSettings


def load_retriever(
    folder: str | Path,
    settings: EncoderSettings,
    dtype: torch.dtype,
    device: torch.device | str,
    adapter: Path | None = None,
) -> Retriever:
    """The retriever of a model folder, with the adapter of another one if given, in eval mode.

    Raises:
        ValueError: for an unsupported model type, damaged weights, or eval_max_tokens above the model's positions.
    """
    check_length(read_config(folder), settings.eval_max_tokens)
    plain = adapter is None
    backbone = load_encoder_backbone(folder, dtype, device) if plain else load_adapted(folder, adapter, dtype, device)
    encoder = Encoder(backbone, settings.pooling, settings.normalize).eval()
    return Retriever(encoder, load_tokenizer(folder), settings)


def embed_texts(
    retriever: Retriever, texts: list[str], kind: Literal["query", "passage"], tokens_per_batch: int = 16384
) -> np.ndarray:
    """Vectors of the texts, fp32 [n, dim]; every rank calls it with the same texts and gets all vectors, in order.

    Identical texts run once. Batches are made of texts of similar length and hold at most `tokens_per_batch` tokens,
    padding included (or one text). If different texts all got one vector, rank 0 says so in one line: such a retriever
    is scored like any other, so that a run can start from it or end with it.

    Raises:
        ValueError: if there are no texts, or if a vector is not finite.
    """
    if not texts:
        raise ValueError("no texts to embed")
    unique = {text: row for row, text in enumerate(dict.fromkeys(texts))}  # text -> row of `vectors`
    by_length = sorted(unique, key=len, reverse=True)  # dealt in turn, so that the ranks get equal work
    own = _embed_own(retriever, by_length[rank() :: world_size()], kind, tokens_per_batch)
    vectors = np.empty((len(unique), own.shape[1]), np.float32)
    counts = [len(by_length[r :: world_size()]) for r in range(world_size())]
    for r, part in enumerate(np.split(gather_rows(own), np.cumsum(counts)[:-1])):
        vectors[[unique[text] for text in by_length[r :: world_size()]]] = part
    vectors = vectors[[unique[text] for text in texts]]
    _check_finite(vectors)
    if rank() == 0 and len(unique) > 1 and _collapsed(vectors):
        problem = f"all {len(unique):,} different texts (as {kind}) got one vector; their order means nothing"
        print(f"warning: collapsed retriever: {problem}", file=sys.stderr, flush=True)
    return vectors


@torch.inference_mode()
def _embed_own(retriever: Retriever, texts: list[str], kind: str, tokens_per_batch: int) -> np.ndarray:
    encoder, tokenizer, settings = retriever
    device = next(encoder.parameters()).device
    prefix = settings.query_prefix if kind == "query" else settings.passage_prefix
    if not texts:  # more ranks than texts
        width = len(encoder(_batch([[tokenizer.eos_token_id]], tokenizer, device))[0])
        return np.empty((0, width), np.float32)
    rows = tokenize(tokenizer, texts, prefix, settings.eval_max_tokens, settings.append_eos)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]), reverse=True)
    parts, first = [], 0
    while first < len(order):
        last = first + max(1, tokens_per_batch // len(rows[order[first]]))  # the first is the longest of its batch
        parts.append(encoder(_batch([rows[row] for row in order[first:last]], tokenizer, device)).float().cpu().numpy())
        first = last
    vectors = np.concatenate(parts)
    return vectors[np.argsort(order)]


def _batch(rows: list[list[int]], tokenizer: Any, device: torch.device) -> Tokens:
    return Tokens(*(part.to(device) for part in pad(rows, pad_id(tokenizer))))


def gather_rows(own: np.ndarray) -> np.ndarray:
    """Rows of all ranks in rank order; the ranks may hold different numbers of rows, but equal widths and dtypes."""
    if not is_distributed():
        return own
    device = group_device()
    counts = gather(torch.tensor([len(own)], device=device)).tolist()
    parts: list[list[np.ndarray]] = [[] for _ in counts]
    for first in range(0, max(counts), ROWS_PER_GATHER):
        rows = min(ROWS_PER_GATHER, max(counts) - first)
        block = torch.zeros((rows, *own.shape[1:]), dtype=torch.from_numpy(own).dtype, device=device)
        mine = torch.from_numpy(own[first : first + rows])
        block[: len(mine)] = mine
        for part, count, got in zip(parts, counts, gather(block).cpu().numpy().reshape(-1, *block.shape), strict=True):
            part.append(got[: max(0, count - first)])
    return np.concatenate([block for part in parts for block in part])


def _check_finite(vectors: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise ValueError(f"{len(bad)} of {len(vectors)} vectors are not finite; the first texts: {bad[:5].tolist()}")


def _collapsed(vectors: np.ndarray) -> bool:
    """Whether all rows are one vector but for rounding."""
    spread, size = np.abs(vectors - vectors[0]).max(), np.abs(vectors[0]).max()
    return bool(spread <= 1e-6 * max(1.0, size))
