"""A collection to search and how it is scored; or a task of mteb that mteb scores itself. Called by all of eval."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from toolkit.data.records import Collection


class Official(NamedTuple):
    """What mteb knows of its task that a collection is (a part of)."""

    main_score: str  # of the task in mteb; a suite may report another one
    parts: int  # subsets times splits, each a collection


class Task(NamedTuple):
    """A collection and how it is scored."""

    collection: Collection
    task_name: str
    subset: str
    split: str
    revision: str
    languages: list[str]
    main_score: str = "ndcg_at_10"
    reported: tuple[str, ...] = ()  # scores that are shown besides the usual ones and the main score
    code: bool = False  # BM25 reads identifiers, not prose
    ignore_identical_ids: bool = (
        False  # drop the document whose id equals the query's (mteb: off unless the task says so)
    )
    candidates: dict[str, list[str]] | None = None  # query id -> the documents it may find; None: all
    excluded: dict[str, list[str]] | None = None  # query id -> the documents that it must not find
    answers: dict[str, list[str]] | None = None  # query id -> what a passage must hold (open question answering)
    body_starts: np.ndarray | None = None  # with answers: length of the title before each document's text
    task_type: str = "Retrieval"
    official: Official | None = None  # None: a collection that is no task of mteb
    group: str = ""  # the mean that it counts in, as (a part of) `member`
    member: str = ""


class MtebTask(NamedTuple):
    """A task that is not searched here: clustering, classification, similarity and so on."""

    task: Any  # of mteb, its data perhaps not yet loaded
    name: str
    folder: Path | None = None  # where its data are, if not on the hub
    group: str = ""
    member: str = ""
