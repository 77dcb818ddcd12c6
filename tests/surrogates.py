"""Sources of pairs, prepared, for tests of surrogates and clusters."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.data.pairs import PairStore
from toolkit.prepare.pairs import prepare_pairs
from toolkit.recipe.models import EncoderSettings
from toolkit.recipe.pairs import PairsData

TOPICS = ["light water leaf plants", "stone sand desert heat", "engine wheel road driver", "paper pencil words letter"]
ENCODER = EncoderSettings(
    pooling="mean", normalize=True, append_eos=None, query_prefix="q: ", passage_prefix="p: ", max_tokens=16,
    eval_max_tokens=24,
)  # fmt: skip


def rows_of_topics(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of few words of a topic; some have two positives, negatives, or texts that come in other rows too."""
    draw = np.random.default_rng(seed)

    def text(topic: int) -> str:
        return " ".join(draw.choice(TOPICS[topic].split(), 5)) + f" {draw.integers(10 * count)}"

    rows: list[dict[str, Any]] = []
    for i in range(count):
        topic = i % len(TOPICS)
        row = {"query": text(topic), "positives": [text(topic)], "negatives": []}
        if i % 5 == 1:
            row["query"] = rows[i - 1]["query"]
            row["positives"] = [text(topic), rows[i - 1]["positives"][0], text(topic)]
        if i % 7 == 2:
            row["negatives"] = [text((topic + 1) % 4), rows[i - 1]["positives"][0], row["positives"][0]]
        rows.append(row)
    return rows


def write_source(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A source of these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"folder": str(folder), "format": "pairs"}


def data_of(*sources: dict[str, Any], **keys: Any) -> PairsData:
    mix = {} if len(sources) == 1 or "packing" in keys else {"mix": "rows"}
    return PairsData.model_validate_json(json.dumps({"sources": sources, **mix, **keys}))


def prepared(data: PairsData, model: Path, run: Path) -> PairStore:
    """The store of a stage that starts from the model of a folder."""
    return prepare_pairs(data, ENCODER, model, run, 0)
