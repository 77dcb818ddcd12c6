"""Rows of a recontriever stage: a query and its keys, all crops of one chunk of text."""

from functools import partial
from typing import Any

import numpy as np

from toolkit.collectives import rank
from toolkit.data.tokens import frame, pad_id
from toolkit.methods.method import Feed, Models, StageRun
from toolkit.methods.recontriever.crops import SHORTEST_DOCUMENT, CropBatch, CropPlan, collate_crops
from toolkit.methods.recontriever.prepared import prepare_crops
from toolkit.recipe.errors import RecipeError


def open_crops(run: StageRun, models: Models, tokenizer: Any) -> Feed:
    """The chunks of a stage, cropped anew in every epoch."""
    stage, objective, crops = run.stage, run.stage.objective, run.stage.data.crops
    store = prepare_crops(stage.data, models.retriever.folder, run.run)
    plan = CropPlan(store, crops, stage.batch.pool, run.data_seed)
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
        "seed": run.data_seed,
        "pad_id": pad_id(tokenizer),
        "max_tokens": encoder.max_tokens,
    }
    return Feed(plan, partial(_collate, plan, settings), plan.chunks, "chunks", store.digest, store.examples)


def _collate(plan: CropPlan, settings: dict[str, Any], pool: int, places: np.ndarray, rows: np.ndarray) -> CropBatch:
    return collate_crops(plan, rows, pool, places, **settings)
