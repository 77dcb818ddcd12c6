"""Texts -> vectors by a trained retriever, shared out over the ranks. Called by export, preparation and evaluation."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from peft.tuners.lora import LoraLayer

from toolkit.collectives import first_of_any_rank, on_rank_zero, rank, world_size
from toolkit.data.tokens import Tokens, frame, pad, pad_id, tokenize
from toolkit.files import replace_text
from toolkit.models.in_context import InContext
from toolkit.models.retriever import Retriever
from toolkit.retrieval.vectors import DTYPES, Shard, Store, Vectors, gather_rows, is_finished, open_shard, save_shard

# A shard is what one rank encodes at a time and what an interruption can cost: equal work, and enough of them to share.
SHARDS, SHARD_CHARACTERS, SHARD_ROWS = 64, 2**16, 2**14
CHARACTERS_PER_TOKEN = 4  # more or less; only the sizes of shards depend on it
# Tokens of a batch. On a CPU larger ones are no faster a token, but hold texts of less similar lengths.
TOKENS_PER_BATCH = {"cpu": 512, "cuda": 16384}
SAME = {"fp32": 1e-5, "fp16": 1e-3}  # rounding of one vector, relative to its largest element
MOST_AT_ONCE = 4  # batches on a CPU: between the operations of one a thread holds Python's lock

Kind = Literal["query", "passage"]
Item = TypeVar("Item")
Result = TypeVar("Result")


def checkpoint_digest(retriever: Retriever) -> str:
    """16 hex digits of all that decides the vectors: weights and their dtype, structure, tokenizer, settings."""
    encoder, tokenizer, settings, _ = retriever
    backbone: Any = encoder.backbone
    config = {k: v for k, v in backbone.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    scaling = {name: module.scaling for name, module in encoder.named_modules() if isinstance(module, LoraLayer)}
    words = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}  # of the last call
    special = [frame(tokenizer, settings.append_eos), tokenizer.eos_token_id, pad_id(tokenizer)]
    parts = [settings.model_dump(), config, scaling, words, special]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for name, weight in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def embed_texts(retriever: Retriever, texts: list[str], kind: Kind, tokens_per_batch: int | None = None) -> np.ndarray:
    """Vectors of a few texts in memory, fp32 [n, dim], all of them on every rank; errors number the texts.

    See `encode`.
    """
    numbered = {str(i): text for i, text in enumerate(texts)}
    return encode(retriever, numbered, kind, tokens_per_batch=tokens_per_batch).array()


def encode(
    retriever: Retriever,
    texts: Mapping[str, str],
    kind: Kind,
    store: Store | None = None,
    may_collapse: bool = False,
    tokens_per_batch: int | None = None,
) -> Vectors:
    """The vectors of texts, in their order; every rank calls it with the same texts and gets the same.

    Identical texts run once. The different ones are sorted by length and cut into shards of about equal work, whatever
    the number of ranks; the shards that are not done are dealt to the ranks. The batches of a shard are made of texts
    of nearly equal numbers of tokens.

    Args:
        retriever: in eval mode.
        texts: id -> text; errors name the ids.
        kind: whose prefix.
        store: keeps the shards on disk, in a folder that all ranks see, where the same checkpoint finds those of the
            same texts again; a damaged one is named and encoded again. None: in memory, all vectors on every rank.
        may_collapse: one vector for all texts is a warning. For models that training starts from: one that was built
            anew may do so, and its scores, those of ties, are what training is compared with.
        tokens_per_batch: most tokens of a batch, padding included (or one text); None: what suits the device.

    Raises:
        ValueError: if there are no texts; naming ids, if vectors are not finite, do not fit into fp16, or if all texts
            (more than one, not all of the same tokens) got the same up to rounding (1e-5 of the largest element; 1e-3
            in fp16).
    """
    if not texts:
        raise ValueError("no texts to embed")
    ids, first, parts = list(texts), *_plan(list(texts.values()), retriever.settings.eval_max_tokens)
    work = _Work(retriever, list(texts.values()), ids, kind, tokens_per_batch)
    arrays = _in_memory(work, parts) if store is None else _on_disk(work, parts, store)
    vectors = Vectors([Shard(part, array) for part, array in zip(parts, arrays, strict=True)], first)
    if _collapsed(vectors, SAME["fp32" if store is None else store.dtype]) and _read_differently(work, parts):
        count, named = sum(map(len, parts)), _named(ids, range(len(ids)))
        problem = f"collapsed retriever: all {count:,} different texts (as {kind}) got one vector ({named})"
        if not may_collapse:
            raise ValueError(f"{problem}; no order of them means anything")
        if rank() == 0:
            print(f"warning: {problem}; their order means nothing", file=sys.stderr, flush=True)
    return vectors


class _Work(NamedTuple):
    retriever: Retriever
    texts: list[str]
    ids: list[str]
    kind: Kind
    tokens_per_batch: int | None


def _prefix(work: _Work) -> str:
    settings = work.retriever.settings
    return settings.query_prefix if work.kind == "query" else settings.passage_prefix


def _plan(texts: list[str], max_tokens: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The first text identical to each, and the numbers of the different texts, cut into shards, longest first."""
    seen: dict[str, int] = {}
    first = np.array([seen.setdefault(text, i) for i, text in enumerate(texts)])
    numbers = np.flatnonzero(first == np.arange(len(texts)))
    lengths = np.array([len(texts[i]) for i in numbers])
    order = np.argsort(-lengths, kind="stable")
    work = np.minimum(lengths[order], CHARACTERS_PER_TOKEN * max_tokens) + 1
    done = np.cumsum(work) - work
    group = done // max(SHARD_CHARACTERS, -(-int(work.sum()) // SHARDS))
    groups = np.split(numbers[order], np.flatnonzero(np.diff(group)) + 1)
    return first, [part for rows in groups for part in np.split(rows, range(SHARD_ROWS, len(rows), SHARD_ROWS))]


def _in_memory(work: _Work, parts: list[np.ndarray]) -> list[np.ndarray]:
    own: dict[int, np.ndarray] = {}
    _encode_share(work, parts, list(range(len(parts))), np.float32, own.__setitem__)
    width = gather_rows(np.array([max((array.shape[1] for array in own.values()), default=0)])).max()
    rows = gather_rows(np.concatenate([np.empty((0, width), np.float32), *own.values()]))
    dealt = [i for r in range(world_size()) for i in range(r, len(parts), world_size())]  # the order of `rows`
    arrays = np.split(rows, np.cumsum([len(parts[i]) for i in dealt])[:-1])
    return [array for _, array in sorted(zip(dealt, arrays, strict=True), key=lambda pair: pair[0])]


def _on_disk(work: _Work, parts: list[np.ndarray], store: Store) -> list[np.ndarray]:
    folder = store.folder / store.checkpoint / f"{work.kind}_{_key(work, parts)}_{store.dtype}"
    paths = [folder / f"{i:05d}.npy" for i in range(len(parts))]
    on_rank_zero(lambda: _describe(folder, work, store))
    mine = range(rank(), len(parts), world_size())
    missing = [i for i in mine if not is_finished(paths[i], lambda line: print(line, file=sys.stderr, flush=True))]
    missing = sorted(gather_rows(np.array(missing, np.int64)).tolist())
    _encode_share(work, parts, missing, DTYPES[store.dtype], lambda i, array: save_shard(paths[i], array))
    return _told_by_all(lambda: [open_shard(path) for path in paths])


def _key(work: _Work, parts: list[np.ndarray]) -> str:
    """16 hex digits of the texts with their prefix and their context, and of their shards."""
    encoder = work.retriever.encoder
    context = encoder.digest if isinstance(encoder, InContext) else ""
    digest = hashlib.sha256(context.encode() + _prefix(work).encode(errors="surrogatepass") + b"\0")
    for part in parts:
        for i in part:
            data = work.texts[i].encode(errors="surrogatepass")
            digest.update(f"{i} {len(data)} ".encode())
            digest.update(data)
        digest.update(b"shard")
    return digest.hexdigest()[:16]


def _describe(folder: Path, work: _Work, store: Store) -> None:
    """What a folder of shards holds, for whoever finds it."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"checkpoint": store.checkpoint, "kind": work.kind, "texts": len(work.texts), "dtype": store.dtype}
    settings = work.retriever.settings.model_dump()
    replace_text(folder / "encoding.json", json.dumps(record | {"settings": settings}, indent=1) + "\n")


def _encode_share(work: _Work, parts: list[np.ndarray], missing: list[int], dtype: Any, keep: Any) -> None:
    """Encode this rank's share of the missing shards.

    The ranks meet once, after their last shard, so that one with nothing to do only waits.
    """

    def encode_own() -> None:
        for i in missing[rank() :: world_size()]:
            keep(i, _checked(work, parts[i], _embed(work, parts[i]), dtype))

    _told_by_all(encode_own)


def _told_by_all(work: Callable[[], Result]) -> Result:
    """What `work` returns, on each rank its own; what went wrong on any rank is a ValueError on all of them."""
    result: Any = None
    problem = ""
    try:
        result = work()
    except (ValueError, OSError) as error:
        problem = str(error) or type(error).__name__
    problem = first_of_any_rank(problem)
    if problem:
        raise ValueError(problem)
    return result


def _token_rows(work: _Work, part: np.ndarray) -> list[list[int]]:
    _, tokenizer, settings, _ = work.retriever
    texts = [work.texts[i] for i in part]
    return tokenize(tokenizer, texts, _prefix(work), settings.eval_max_tokens, settings.append_eos)


def _embed(work: _Work, part: np.ndarray) -> np.ndarray:
    """The vectors of the texts of one shard, fp32 [rows, dim]."""
    encoder, tokenizer = work.retriever.encoder, work.retriever.tokenizer
    device = next(encoder.parameters()).device
    rows = _token_rows(work, part)
    limit = work.tokens_per_batch or TOKENS_PER_BATCH[device.type]
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]), reverse=True)
    batches, first = [], 0
    while first < len(order):
        last = first + max(1, limit // len(rows[order[first]]))  # the first is the longest of its batch
        batches.append([rows[row] for row in order[first:last]])
        first = last

    @torch.inference_mode()
    def encoded(batch: list[list[int]]) -> torch.Tensor:
        tokens = pad(batch, pad_id(tokenizer))
        return encoder(Tokens(*(tensor.to(device) for tensor in tokens))).float()

    at_once = 1 if device.type != "cpu" or _follows_lengths(encoder.backbone.config) else MOST_AT_ONCE
    return torch.cat(_on_threads(encoded, batches, at_once)).cpu().numpy()[np.argsort(order)]


def _on_threads(work: Callable[[Item], Result], items: list[Item], most: int) -> list[Result]:
    """What `work` gives for each item, in order; up to `most` run at once, each on its share of torch's threads.

    Of one batch on several threads every operation ends when its last thread does, and the others spin until then:
    beside busy processes that took six times the CPU time, and longer than the batches took one thread each.
    """
    threads = torch.get_num_threads()
    at_once = min(threads, most, len(items))
    if at_once == 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(at_once, "encode", torch.set_num_threads, (threads // at_once,)) as pool:
        try:
            return list(pool.map(work, items))
        finally:
            torch.set_num_threads(threads)  # what threads that are started later take over


def _follows_lengths(config: Any) -> bool:
    """Whether the rotary embedding changes with the lengths that it meets: batches at once would disturb each other."""
    written = json.dumps(config.to_dict(), default=str)
    return any(f'"rope_type": "{kind}"' in written for kind in ("dynamic", "longrope"))


def _checked(work: _Work, part: np.ndarray, vectors: np.ndarray, dtype: Any) -> np.ndarray:
    """The vectors in the number format they are kept in; raises ValueError for those that are not finite."""
    with np.errstate(over="ignore"):
        kept = vectors.astype(dtype, copy=False)
    for array, problem in ((vectors, "are not finite"), (kept, "do not fit into fp16; keep them in fp32")):
        bad = part[~np.isfinite(array).all(axis=1)]
        if len(bad):
            raise ValueError(f"vectors of {len(bad)} texts (as {work.kind}) {problem}: {_named(work.ids, bad)}")
    return kept


def _named(ids: list[str], numbers: Any) -> str:
    """The first five of the ids."""
    return ", ".join([*(ids[i] for i in numbers[:5]), *(["..."] if len(numbers) > 5 else [])])


def _collapsed(vectors: Vectors, tolerance: float) -> bool:
    """Whether all rows (two at least) are one vector up to rounding; most often the first shard shows otherwise."""
    reference = vectors.shards[0].vectors[0].astype(np.float32)
    limit = tolerance * max(float(np.abs(reference).max()), np.finfo(np.float32).tiny)
    same = (np.abs(shard.vectors.astype(np.float32) - reference).max() <= limit for shard in vectors.shards)
    return sum(len(shard.numbers) for shard in vectors.shards) > 1 and all(same)


def _read_differently(work: _Work, parts: list[np.ndarray]) -> bool:
    """Whether the texts are different to the model: white space, case or what is cut may be all that differs."""
    rows = (row for part in parts for row in _token_rows(work, part))
    first = next(rows)
    return any(row != first for row in rows)
