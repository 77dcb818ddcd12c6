"""The contract of a method: plain functions that the engine, the dry run and the export call, chosen once by name.

`METHOD` in a method's method.py is one of these; its keys.py has the half that needs no torch (toolkit.methods.keys).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from toolkit.data.faults import Skipped
from toolkit.data.first_look import Look
from toolkit.data.stream import Collate, Plan
from toolkit.methods.costs import Costs
from toolkit.methods.objective import Objective
from toolkit.models.places import ModelSource
from toolkit.recipe.stage import Stage

CHECKED_TEXTS = 8  # texts whose live vectors the reloaded export must reproduce


class StageRun(NamedTuple):
    """A stage on its way: its part of the recipe, where it reads and writes, and what it computes on."""

    number: int  # of the stage
    stage: Stage[Any, Any]
    seed: int  # the recipe's
    data_seed: int  # of the order of its data
    run: Path  # the run folder
    folder: Path  # of the stage
    before: Path | None  # folder of the stage before
    device: torch.device | str


class Models(NamedTuple):
    """A stage's models on disk."""

    retriever: ModelSource  # or what becomes the retriever
    others: dict[str, ModelSource]  # name in MethodKeys.models -> model


class Feed(NamedTuple):
    """Rows of a stage: their order (`plan`), their batches (`collate`), and what is said of them."""

    plan: Plan
    collate: Collate
    size: int
    unit: str  # what a row is, in the plural
    digest: str
    examples: list[str]  # CHECKED_TEXTS of them, if there are so many


class Row(NamedTuple):
    """What a row of a batch is, for derived numbers."""

    what: str  # in the plural, with its parts
    texts: int  # at most
    longest: int | None  # tokens of a text; None before it is known
    sides: dict[str, int]  # what is run in slices of its own -> texts of a row


Lines = list[tuple[str, str]]  # (name, value), as the dry run prints them
Tokenizers = Callable[[str], Any]  # name in MethodKeys.models -> a tokenizer, or the text why there is none


@dataclass(frozen=True)
class Method:
    """What a method does.

    Attributes:
        row: stage -> what its rows are.
        open_feed: (stage on its way, models, the retriever's tokenizer) -> its rows. Collective. Raises RecipeError,
            on every rank, with a line that begins with the key below the stage if one is to blame.
        build: (stage, seed, device, models) -> the module whose forward is the loss, in training mode. ValueError for
            models and recipes that do not fit.
        costs: (stage, objective) -> what a token of each side of a batch costs.
        fit: (stage, name in MethodKeys.models -> config) raises RecipeError or ValueError, before anything is loaded,
            for models and keys that do not fit; None if all that other checks let through fit.
        look: (source, data section) -> what its first rows show. RecipeError as the readers.
        warn: (data section, number of a source -> its first rows) -> (is it a problem, line that begins with the key
            below the stage) of what the first rows of the sources show together.
        epochs: (stage, seed, rows of each source, their first rows, tokenizer) -> what the steps make of the data, for
            the dry run. The tokenizer is None where there is none yet.
        example: (stage, number of a source, its first rows, tokenizers) -> one row as the models get it.
        training_text: (data section, counts, skipped) -> the texts that a tokenizer is trained on; None for methods
            that train no model from random weights.
        card: what it learns from and its paper, for the model card.
    """

    row: Callable[[Any], Row]
    open_feed: Callable[[StageRun, Models, Any], Feed]
    build: Callable[[Any, int, torch.device | str, Models], Objective]
    costs: Callable[[Any, Any], Costs]
    fit: Callable[[Any, dict[str, PretrainedConfig]], None] | None
    look: Callable[[Any, Any], Look]
    warn: Callable[[Any, dict[int, Look]], Iterator[tuple[bool, str]]]
    epochs: Callable[[Any, int, list[int], list[Look], Any], str]
    example: Callable[[Any, int, Look, Tokenizers], Lines]
    training_text: Callable[[Any, Counter[str], Skipped | None], Iterator[str]] | None
    card: str
