"""Rows of a contrastive stage: a query with its positives and hard negatives."""

from functools import partial
from typing import Any

import numpy as np

from toolkit.data.pairs import PairBatch, PairPlan, PairStore, collate_pairs
from toolkit.data.tokens import pad_id
from toolkit.methods.method import Feed, Models, StageRun
from toolkit.prepare.negatives import with_negatives
from toolkit.prepare.pairs import prepare_pairs


def open_pairs(run: StageRun, models: Models, tokenizer: Any) -> Feed:
    """The pairs of a stage; mined first, where the recipe asks for it."""
    stage = run.stage
    previous = None if run.before is None else run.before / "export"
    data = with_negatives(stage.data, previous, run.run, run.seed, run.device)
    # Limits draw by the recipe's seed, so that those of several stages are nested.
    store = prepare_pairs(data, stage.encoder_settings, models.retriever.folder, run.run, run.seed)
    weights = [source.weight for source in data.sources if source.weight is not None]
    plan = PairPlan(store.sizes, weights or None, stage.batch.pool, data.mix, run.data_seed)
    slots = {"positives": data.positives, "negatives": data.negatives}
    collate = partial(_collate, store, slots | {"seed": run.data_seed, "pad_id": pad_id(tokenizer)})
    return Feed(plan, collate, len(store), "pairs", store.digest, store.examples)


def _collate(store: PairStore, settings: dict[str, Any], pool: int, places: np.ndarray, rows: np.ndarray) -> PairBatch:
    return collate_pairs(store, rows, pool, places, **settings)
