"""What a stage trains on: the order of its rows and how they become batches, whatever the method.

Called by the training loop on every rank; rank 0 prepares what is not yet on disk.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from toolkit.collectives import rank
from toolkit.data.bundles import BundlePlan
from toolkit.data.crops import SHORTEST_DOCUMENT, CropPlan, collate_crops
from toolkit.data.pairs import PairPlan, collate_pairs
from toolkit.data.spans import PoolPlan, collate_language_model, collate_revela
from toolkit.data.stream import Collate, Plan
from toolkit.data.tokens import frame, pad_id
from toolkit.models.vocabulary import model_tokenizer
from toolkit.prepare import ModelSource, prepare_passages
from toolkit.prepare_crops import prepare_crops
from toolkit.prepare_negatives import with_negatives
from toolkit.prepare_neighbours import prepare_bundles
from toolkit.prepare_pairs import prepare_pairs
from toolkit.recipe import (
    ContrastiveObjective,
    Data,
    LanguageModelObjective,
    Recipe,
    RecipeError,
    ReContrieverObjective,
    RevelaObjective,
    Stage,
)

CHECKED_TEXTS = 8  # texts whose live vectors the reloaded export must reproduce


class Feed(NamedTuple):
    """Rows of a stage: their order (`plan`), their batches (`collate`), and what is said of them."""

    plan: Plan
    collate: Collate
    size: int
    unit: str  # what a row is, in the plural
    digest: str
    examples: list[str]


def stage_folder(run: Path, recipe: Recipe, index: int) -> Path:
    """The folder of a stage below the run folder."""
    return run / f"stage_{index}_{recipe.stages[index].name}"


def open_feed(
    recipe: Recipe,
    index: int,
    run: Path,
    tokenizer: Any,
    retriever: ModelSource,
    lm: ModelSource | None,
    device: torch.device | str,
) -> Feed:
    """The rows of stage `index`, a function of the recipe alone; their order follows `data_seed`.

    Args:
        tokenizer: the retriever's.
        lm: Revela's language model.
        device: where texts are embedded, if the recipe asks for it.

    Raises:
        RecipeError: for data that is malformed, empty or too small, the same on every rank.
    """
    try:
        return _open(recipe, index, run, tokenizer, retriever, lm, device)
    except RecipeError as error:
        at_a_key = str(error).startswith(("data.", "batch.", "encoder.", "objective."))
        raise RecipeError(f"stages.{index}.{error}" if at_a_key else str(error)) from None


def data_seed(recipe: Recipe, index: int) -> int:
    """The seed of stage `index`'s order of data: the recipe's, plus one for each stage that it goes on from.

    Stages from the same kind of start see the same data in the same order, so that they can be compared; a stage from
    "previous" does not see its predecessor's order again.
    """
    return data_seed(recipe, index - 1) + 1 if recipe.stages[index].start == "previous" else recipe.seed


def _open(
    recipe: Recipe,
    index: int,
    run: Path,
    tokenizer: Any,
    retriever: ModelSource,
    lm: ModelSource | None,
    device: torch.device | str,
) -> Feed:
    stage, seed = recipe.stages[index], data_seed(recipe, index)
    match stage.objective:
        case ContrastiveObjective():
            previous = stage_folder(run, recipe, index - 1) / "export" if index else None
            data = with_negatives(stage.data, previous, run, recipe.seed, device)
            return _pairs(stage, data, recipe.seed, seed, run, tokenizer, retriever.folder)
        case ReContrieverObjective():
            return _crops(stage, stage.objective, seed, run, tokenizer, retriever.folder)
        case LanguageModelObjective() | RevelaObjective():
            return _passages(stage, seed, run, retriever, device, _reader(stage, tokenizer, lm))


def _pairs(stage: Stage, data: Data, limit_seed: int, seed: int, run: Path, tokenizer: Any, folder: Path) -> Feed:
    store = prepare_pairs(data, stage.encoder_settings, folder, run, limit_seed)  # limits of several stages are nested
    weights = [source.weight for source in data.sources if source.weight is not None]
    plan = PairPlan(store.sizes, weights or None, stage.batch.pool, data.mix, seed)
    slots = {"positives": data.positives, "negatives": data.negatives}
    collate = partial(_collate_pairs, store, slots | {"seed": seed, "pad_id": pad_id(tokenizer)})
    return Feed(plan, collate, len(store), "pairs", store.digest, store.examples)


def _collate_pairs(store: Any, settings: dict[str, Any], pool: int, places: np.ndarray, rows: np.ndarray) -> Any:
    return collate_pairs(store, rows, pool, places, **settings)


def _crops(stage: Stage, objective: ReContrieverObjective, seed: int, run: Path, tokenizer: Any, folder: Path) -> Feed:
    crops = stage.data.crops
    assert crops is not None  # the recipe demands it
    store = prepare_crops(stage.data, folder, run)
    plan = CropPlan(store, crops, stage.batch.pool, seed)
    encoder = stage.encoder_settings
    special = frame(tokenizer, encoder.append_eos)
    longest = int(crops.chunk_tokens * crops.max_ratio) + sum(map(len, special))
    if longest > encoder.max_tokens:
        raise RecipeError(
            f"encoder.max_tokens: {encoder.max_tokens} is below the longest crop with its special tokens "
            f"({longest}); raise it, or lower data.crops.max_ratio"
        )
    of_an_epoch = objective.views * plan.pools_per_epoch * stage.batch.pool
    if objective.queue is not None and objective.queue.size > of_an_epoch:
        raise RecipeError(
            f"objective.queue.size: {objective.queue.size} keys are more than an epoch's {of_an_epoch}, so that texts "
            "would meet their own old keys as negatives; lower it, or set objective.queue to null"
        )
    if plan.left_out and rank() == 0:
        print(f"data: {plan.left_out:,} documents under {SHORTEST_DOCUMENT} tokens are left out", flush=True)
    settings = {
        "views": objective.views,
        "crops": crops,
        "frame": special,
        "seed": seed,
        "pad_id": pad_id(tokenizer),
        "max_tokens": encoder.max_tokens,
    }
    collate = partial(_collate_crops, plan, settings)
    return Feed(plan, collate, plan.chunks, "chunks", store.digest, store.examples)


def _collate_crops(plan: CropPlan, settings: dict[str, Any], pool: int, places: np.ndarray, rows: np.ndarray) -> Any:
    return collate_crops(plan, rows, pool, places, **settings)


def _passages(
    stage: Stage,
    seed: int,
    run: Path,
    retriever: ModelSource,
    device: torch.device | str,
    read: Callable[[list[str], np.ndarray], Any],
) -> Feed:
    data, pool = stage.data, stage.batch.pool
    store = prepare_passages(data, run)
    if data.neighbours is None:
        plan, digest = PoolPlan(store.document, store.group_size, pool, data.interleave, seed), store.digest
    else:
        assert data.interleave is not None  # the recipe demands it
        order = prepare_bundles(stage, store, retriever, run, device)
        plan = BundlePlan(store.document, order, data.interleave, pool, seed)
        digest = hashlib.blake2b(store.digest.encode() + order.tobytes(), digest_size=8).hexdigest()
    examples = store.texts(range(min(CHECKED_TEXTS, len(store))))

    def collate(_pool: int, _places: np.ndarray, rows: np.ndarray) -> Any:
        return read(store.texts(rows), store.document[rows])

    return Feed(plan, collate, len(store), "passages", digest, examples)


def _reader(stage: Stage, tokenizer: Any, lm: ModelSource | None) -> Callable[[list[str], np.ndarray], Any]:
    """Texts and document numbers -> batch."""
    objective = stage.objective
    if isinstance(objective, LanguageModelObjective):
        return lambda texts, document: collate_language_model(texts, document, tokenizer, objective.max_tokens)
    assert isinstance(objective, RevelaObjective) and lm is not None
    return partial(
        collate_revela,
        tokenizer=tokenizer,
        lm_tokenizer=model_tokenizer(lm.folder),
        encoder=stage.encoder_settings,
        half_query=objective.half_query,
        lm_max_tokens=objective.language_model.max_tokens,
        near_duplicates=stage.data.near_duplicates,
    )
