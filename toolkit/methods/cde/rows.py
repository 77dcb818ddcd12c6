"""Rows of a cde stage: pairs, and the documents of their pool that make its context."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.data.pairs import PairBatch, PairStore, document_numbers
from toolkit.data.stream import Collate, Plan
from toolkit.data.text_store import padded
from toolkit.data.tokens import Tokens, pad_id
from toolkit.determinism import generator
from toolkit.methods.cde.keys import CdeStage
from toolkit.methods.method import Feed, Models, StageRun
from toolkit.methods.pairs import open_pairs
from toolkit.models.contextual_files import FIRST_FOLDER, is_contextual
from toolkit.models.vocabulary import model_tokenizer
from toolkit.prepare.pairs import tokens_of_pairs
from toolkit.recipe.context import ContextSettings
from toolkit.recipe.pairs import PairsData


class CdeBatch(NamedTuple):
    """Rows of one pool, all or a rank's part, with that part of the pool's context documents."""

    pairs: PairBatch
    context: Tokens  # [documents, length]: as many on every rank of a pool, together as many as the context or more
    null: Tensor  # bool [context vectors], of the whole pool: which the null vector replaces
    repeated: Tensor  # float32 [1]: of the whole pool's context documents, those that stand in it once more


class Context(NamedTuple):
    """How the context of a pool is drawn."""

    settings: ContextSettings
    slots: dict[str, int]  # positives and negatives of a row
    seed: int
    pad_id: int  # of the first stage's tokenizer


def open_feed(run: StageRun, models: Models, tokenizer: Any) -> Feed:
    """The pairs of a stage, and their pool's context."""
    return open_pairs(run, models, tokenizer, partial(_with_context, run, first_folder(run.stage, models)))


def first_folder(stage: CdeStage, models: Models) -> Path:
    """Where the first stage's model and tokenizer lie; with a second adapter they are the retriever's."""
    if "first_stage" in models.others:
        return models.others["first_stage"].folder
    source = models.retriever
    trained = source.adapter or source.folder
    if is_contextual(trained) and stage.objective.first_stage.adapter is None:
        return trained / FIRST_FOLDER
    return source.folder


def _with_context(
    run: StageRun, folder: Path, plan: Plan, store: PairStore, data: PairsData, collate: Collate
) -> Collate:
    settings = run.stage.objective.context
    encoder = run.stage.encoder_settings.model_copy(update={"max_tokens": settings.max_tokens})
    documents = tokens_of_pairs(data, encoder, folder, run.run, run.seed)
    slots = {"positives": data.positives, "negatives": data.negatives}
    context = Context(settings, slots, run.data_seed, pad_id(model_tokenizer(folder)))

    def with_context(pool: int, places: np.ndarray, rows: np.ndarray) -> CdeBatch:
        return collate_context(collate(pool, places, rows), documents, plan.pool(pool), pool, places, context)

    return with_context


def collate_context(
    pairs: PairBatch, store: PairStore, whole: np.ndarray, pool: int, places: np.ndarray, context: Context
) -> CdeBatch:
    """Pairs with a rank's part of their pool's context, which is a function of the seed and the pool's number.

    Args:
        pairs: rows at these places of the pool.
        store: the same pairs, as the first stage reads them.
        whole: row ids of the whole pool.
        pool: its number.
        places: as many on every rank, in the order of the ranks.
    """
    settings, each = context.settings, context.settings.vectors_per_document
    count, seed = settings.size // each, context.seed
    numbers = document_numbers(store, whole, pool, np.arange(len(whole)), seed=seed, **context.slots)
    chosen = drawn_documents(numbers, count, seed, pool)
    parts = len(whole) // len(places)
    share = -(-count // parts)
    first = int(places[0]) // len(places) * share
    own = chosen[np.arange(first, first + share) % count]  # those beyond the context are read and left out
    tokens = padded(store.document, own, context.pad_id)
    if each > 1:  # a document's vectors share out a length that is the same on all ranks
        longest = int((store.document.offsets[chosen + 1] - store.document.offsets[chosen]).max())
        missing = longest - tokens.input_ids.shape[1]
        ids, mask = tokens
        tokens = Tokens(F.pad(ids, (0, missing), value=context.pad_id), F.pad(mask, (0, missing)))
    null = generator("null", seed, pool).random(settings.size) < settings.null_probability
    repeated = torch.tensor([float(count - len(np.unique(chosen)))])
    return CdeBatch(pairs, tokens, torch.from_numpy(null), repeated)


def drawn_documents(numbers: np.ndarray, count: int, seed: int, pool: int) -> np.ndarray:
    """`count` of a pool's documents [rows, slots] (-1: absent) without replacement, in random order: int64 [count].

    Where absent slots leave fewer than that, they are drawn over again.
    """
    there = numbers[numbers >= 0]
    return np.resize(there[generator("context", seed, pool).permutation(len(there))], count)
