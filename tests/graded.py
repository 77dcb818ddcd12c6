"""Sources, stores and groups of graded data for tests, with texts instead of token ids."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.data.faults import Skipped
from toolkit.data.graded import GradedStore
from toolkit.data.graded_records import read_graded
from toolkit.data.graded_write import How, write_graded
from toolkit.prepare.graded import picks_of, shared_ids
from toolkit.recipe.graded import GradedData

FIXTURES = Path(__file__).parent / "fixtures" / "graded"
BM25 = FIXTURES / "bm25_qrels.jsonl"

Grouped = tuple[str, list[str], list[float]]  # query, passages, grades


def published(folder: Path, name: str) -> str:
    """A folder in BEIR layout of the published layout's files: "real" or "synth"."""
    beir = folder / name
    if not beir.exists():
        (beir / "qrels").mkdir(parents=True)
        shutil.copy(FIXTURES / f"corpus_{name}.jsonl", beir / "corpus.jsonl")
        shutil.copy(FIXTURES / "queries.jsonl", beir)
        shutil.copy(FIXTURES / f"qrels_{name}.tsv", beir / "qrels" / "train.tsv")
    return str(beir)


def write_rows(path: Path, rows: Iterable[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(query: str, *passages: tuple[str, float], **keys: Any) -> dict[str, Any]:
    """A row of format graded."""
    return {"query": query, "passages": [{"text": text, "grade": grade} for text, grade in passages]} | keys


def make_data(
    sources: list[dict[str, Any]], join: str | None = None, faulty: str = "refuse", **group: Any
) -> GradedData:
    group = {"size": 4, "by": "first", "few": "cycle"} | group
    return GradedData.model_validate({"sources": sources, "join": join, "group": group, "faulty_rows": faulty})


def encode(texts: list[str]) -> list[list[int]]:
    """A token for each byte, and an end token."""
    return [[*text.encode(), 2] for text in texts]


def decoded(ids: Iterable[int]) -> str:
    *text, end = map(int, ids)
    assert end == 2
    return bytes(text).decode()


def make_store(
    folder: Path, data: GradedData, skipped: Skipped | None = None, prefixes=("", ""), encode=encode
) -> GradedStore:
    folder.mkdir(parents=True)
    how = How(data.join, picks_of(data), data.group, prefixes)
    rows = (read_graded(source, Counter(), skipped) for source in data.sources)
    sources = list(zip(shared_ids(data), rows, strict=True))
    write_graded(sources, how, encode, folder, skipped)
    return GradedStore(folder)


def texts_of(store: GradedStore, numbers: np.ndarray) -> list[str]:
    return [decoded(store.passage[number]) for number in numbers.tolist()]


def query_of(store: GradedStore, number: int) -> str:
    return decoded(store.query[int(store.query_of_row[number])])


def groups(store: GradedStore, data: GradedData, epoch: int = 0, seed: int = 0) -> list[Grouped]:
    """The group of every row."""
    found = []
    for number in range(len(store)):
        text, grade = store.group(number, epoch, picks_of(data), data.group, seed)
        found.append((query_of(store, number), texts_of(store, text), grade.tolist()))
    return found
