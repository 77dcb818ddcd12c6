"""What the data section of graded rows takes, and what in it does not fit together."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from toolkit.recipe.graded import FolderGraded, GradedData, HubGraded, StdlibGraded, check_graded

REAL: dict[str, Any] = {"folder": "msmarco", "format": "beir"}
BM25 = REAL | {"judgements": "bm25.jsonl", "pick": {"random": 2}}
SYNTH: dict[str, Any] = {"folder": "generated"}
GROUP = {"size": 4, "by": "random"}


def section(*sources: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"sources": list(sources), "group": GROUP} | keys


def problems(raw: dict[str, Any]) -> list[str]:
    return [f"{path}: {problem}" for path, problem in check_graded("data", GradedData.model_validate(raw))]


PUBLISHED = {
    "real_binary": section(
        REAL | {"at_least": 1, "grade": 1},
        BM25 | {"grade": 0},
        join="query_id",
        group={"size": 3, "by": "positive_first", "few": "cycle"},
    ),
    "synth_binary": section(
        SYNTH | {"at_least": 2, "grade": 1},
        SYNTH | {"below": 2, "grade": 0},
        join="query_id",
        group={"size": 3, "by": "positive_first", "few": "cycle"},
    ),
    "synth_multilevel": section(SYNTH, group=GROUP | {"few": "cycle"}),
    "synth_plus_real": section(
        REAL | {"at_least": 1, "grade": 3},
        BM25 | {"grade": 1},
        SYNTH,
        join="query_id",
        group={"size": 7, "by": "random", "few": "cycle"},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_configurations_can_be_written(name: str):
    assert problems(PUBLISHED[name]) == []
    data = GradedData.model_validate(PUBLISHED[name])
    assert GradedData.model_validate_json(data.model_dump_json()) == data


def test_the_page_shows_them_as_they_are_checked_here():
    page = (Path(__file__).parent.parent.parent / "docs" / "graded.md").read_text(encoding="utf-8")
    for name, raw in PUBLISHED.items():
        (text,) = re.findall(rf"\*\*{name}\*\*.*?```\n(.*?)\n```", page, re.DOTALL)[:1]
        assert json.loads(f"{{{text}}}") == raw, name


def test_every_kind_of_source_is_told_by_its_key():
    data = GradedData.model_validate(section({"hub": "a/b"}, SYNTH, {"stdlib": "graded"}, join="query_text"))
    assert [type(source) for source in data.sources] == [HubGraded, FolderGraded, StdlibGraded]
    assert data.group.few == "refuse" and data.faulty_rows == "refuse"


@pytest.mark.parametrize(
    ("raw", "lines"),
    [
        (
            section(REAL, SYNTH),
            ['data.join: missing; write "query_id" or "query_text", by which the sources\' rows are put together'],
        ),
        (
            section(SYNTH | {"pick": {}}),
            ['data.sources.0.pick: write {"first": n} or {"random": n}'],
        ),
        (
            section(SYNTH | {"pick": {"first": 1, "random": 1}}),
            ['data.sources.0.pick: write {"first": n} or {"random": n}'],
        ),
        (
            section(SYNTH | {"at_least": 2, "below": 2}),
            ["data.sources.0.below: no grade is at least 2 and below 2; raise it"],
        ),
        (
            section(SYNTH | {"judgements": "x"}),
            ["data.sources.0.judgements: is not read with format graded; remove the key"],
        ),
        (
            section(BM25 | {"split": "train"}),
            ["data.sources.0.split: judgements names the file to read; remove one of the two keys"],
        ),
        (
            section(REAL | {"config": "x"}),
            ["data.sources.0.config: a folder in BEIR layout has none; remove the key"],
        ),
        (
            section(SYNTH | {"fields": {"query": "q"}}, {"hub": "a/b", "fields": {"text": "t"}}, join="query_id"),
            [
                "data.sources.0.fields.query: is not read with format graded; remove the key",
                "data.sources.1.fields.text: is not read with format graded; remove the key",
            ],
        ),
        (
            section(SYNTH | {"format": "pairs", "fields": {"query": "q", "weight": "w"}}, join="query_id"),
            [
                "data.sources.0.fields.weight: graded rows have no weights; remove the key",
                'data.join: data.sources.0 holds pairs, whose queries have no ids; set it to "query_text"',
            ],
        ),
    ],
)
def test_what_does_not_fit_is_told_with_its_path_and_a_fix(raw: dict[str, Any], lines: list[str]):
    assert problems(raw) == lines


@pytest.mark.parametrize(
    "changes",
    [
        {"sources": []},
        {"group": {"size": 0, "by": "random"}},
        {"group": {"by": "random"}},
        {"group": {"size": 4}},
        {"group": GROUP | {"by": "best"}},
        {"group": GROUP | {"few": "drop"}},
        {"join": "query"},
        {"sources": [{"folder": "a", "stdlib": "graded"}]},
        {"sources": [{"stdlib": "docstrings"}]},
        {"sources": [SYNTH | {"grade": "3"}]},
        {"sources": [SYNTH | {"grade": float("nan")}]},
        {"sources": [SYNTH | {"at_least": float("inf")}]},
        {"sources": [SYNTH | {"pick": {"first": 0}}]},
        {"sources": [SYNTH | {"format": "trec"}]},
        {"sources": [SYNTH | {"weight": 1}]},
    ],
)
def test_values_of_another_kind_are_refused(changes: dict[str, Any]):
    with pytest.raises(ValidationError):
        GradedData.model_validate(section(SYNTH) | changes)
