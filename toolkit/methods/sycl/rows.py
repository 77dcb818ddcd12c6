"""Rows of a stage that learns from grades: a query with a group of its passages, drawn anew in each epoch."""

from functools import partial
from typing import Any

import numpy as np

from toolkit.data.graded import GradedBatch, GradedStore, collate_graded
from toolkit.data.pairs import PairPlan
from toolkit.data.tokens import pad_id
from toolkit.methods.method import Feed, Models, StageRun
from toolkit.prepare.graded import picks_of, prepare_graded


def open_groups(run: StageRun, models: Models, tokenizer: Any) -> Feed:
    """The graded rows of a stage."""
    stage = run.stage
    store = prepare_graded(stage.data, stage.encoder_settings, models.retriever.folder, run.run)
    plan = PairPlan([len(store)], None, stage.batch.pool, None, run.data_seed)
    settings = {
        "picks": picks_of(stage.data),
        "group": stage.data.group,
        "seed": run.data_seed,
        "pad_id": pad_id(tokenizer),
    }
    of_an_epoch = len(store) // stage.batch.pool
    return Feed(
        plan, partial(_collate, store, of_an_epoch, settings), len(store), "queries", store.digest, store.examples
    )


def _collate(
    store: GradedStore, of_an_epoch: int, settings: dict[str, Any], pool: int, places: np.ndarray, rows: np.ndarray
) -> GradedBatch:
    del places  # a row has the same group wherever it stands
    return collate_graded(store, rows, pool // of_an_epoch, **settings)
