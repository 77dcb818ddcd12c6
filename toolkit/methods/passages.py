"""Rows that are passages, of several methods: prepared, put in order, and looked at before anything is trained."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from toolkit.data.bundles import BundlePlan
from toolkit.data.faults import Skipped
from toolkit.data.first_look import Look
from toolkit.data.records import check_group_sizes
from toolkit.data.spans import PoolPlan
from toolkit.data.texts import of_groups, passage_texts
from toolkit.methods.method import CHECKED_TEXTS, Feed, Models, StageRun
from toolkit.methods.preview import passages_of, text_epochs
from toolkit.prepare.neighbours import prepare_bundles
from toolkit.prepare.passages import prepare_passages
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.sources import source_name
from toolkit.recipe.stage import Stage
from toolkit.recipe.texts import PassagesData, TextsData


def open_passages(run: StageRun, models: Models, read: Callable[[list[str], np.ndarray], Any]) -> Feed:
    """The passages of a stage in their order; `read` makes a batch of texts and int64 [rows] numbers of documents."""
    data, pool = run.stage.data, run.stage.batch.pool
    store = prepare_passages(data, run.run)
    if data.neighbours is None:
        plan, digest = PoolPlan(store.document, store.group_size, pool, data.interleave, run.data_seed), store.digest
    else:
        assert data.interleave is not None  # the recipe demands it
        order = prepare_bundles(run.stage, store, models.retriever, run.run, run.device)
        plan = BundlePlan(store.document, order, data.interleave, pool, run.data_seed)
        digest = hashlib.blake2b(store.digest.encode() + order.tobytes(), digest_size=8).hexdigest()
    examples = store.texts(range(min(CHECKED_TEXTS, len(store))))

    def collate(_pool: int, _places: np.ndarray, rows: np.ndarray) -> Any:
        return read(store.texts(rows), store.document[rows])

    return Feed(plan, collate, len(store), "passages", digest, examples)


def warn_of_groups(data: TextsData, looks: dict[int, Look]) -> Iterator[tuple[bool, str]]:
    """The problem of groups of several sizes."""
    sizes = {
        len(record.texts): source_name(data.sources[number])
        for number, each in looks.items()
        for record in each.texts
        if of_groups(data.sources[number])
    }
    try:
        check_group_sizes(sizes)
    except RecipeError as error:
        yield True, str(error)


def passage_epochs(
    stage: Stage[Any, PassagesData], seed: int, counts: list[int], looks: list[Look], tokenizer: Any
) -> str:
    """What the steps make of the passages."""
    del seed, tokenizer  # passages are counted by words
    return text_epochs(stage, counts, looks, "passages", passages_of(stage.data))


def passages_alone(data: PassagesData, counts: Counter[str], skipped: Skipped | None) -> Iterator[str]:
    """The passages, for training a tokenizer."""
    return (text for text, _ in passage_texts(data, counts, skipped))
