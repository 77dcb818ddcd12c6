"""The rows of a stage: groups that are new in each epoch, ranks that share a pool, and what a dry run says of them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from graded import make_data, row, write_rows

from toolkit.data.first_look import Look
from toolkit.data.stream import Stream
from toolkit.data.train_tokenizer import train_tokenizer
from toolkit.methods.method import Models, StageRun
from toolkit.methods.sycl.preview import epochs, example, look, warn
from toolkit.methods.sycl.rows import open_groups
from toolkit.models.backbone import load_tokenizer
from toolkit.models.places import ModelSource
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.graded import GradedData
from toolkit.recipe.models import BuildTokenizer, EncoderSettings

ENCODER = {"pooling": "mean", "normalize": True, "append_eos": True, "query_prefix": "q: ", "passage_prefix": "p: "}
ENCODER |= {"max_tokens": 12, "eval_max_tokens": 12}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    settings = BuildTokenizer(vocab_size=300, pieces="text")
    train_tokenizer(settings, iter(["query passage of grade"])).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300}))
    return folder


def stage_of(data: GradedData, pool: int = 4, steps: int = 6) -> Any:
    batch, optim = SimpleNamespace(pool=pool, pools_per_step=2), SimpleNamespace(steps=steps)
    return SimpleNamespace(
        data=data, batch=batch, optim=optim, encoder_settings=EncoderSettings.model_validate(ENCODER)
    )


def open_feed(data: GradedData, model: Path, run: Path, pool: int = 4, data_seed: int = 3) -> Any:
    stage = StageRun(0, stage_of(data, pool), 1, data_seed, run, run, None, "cpu")
    return open_groups(stage, Models(ModelSource(model, str(model)), {}), load_tokenizer(model))


def rows_in(folder: Path, count: int = 10, **keys: Any) -> dict[str, Any]:
    rows = [row(f"query {i}", *((f"passage {i} {k}", k) for k in range(5)), **keys) for i in range(count)]
    return {"folder": str(write_rows(folder / "rows.jsonl", rows).parent)}


def test_an_epoch_holds_every_query_once_and_the_next_one_other_groups(tmp_path: Path, model: Path):
    data = make_data([rows_in(tmp_path / "in", 12)], size=3, by="random", few="refuse")
    feed = open_feed(data, model, tmp_path / "run")
    assert feed.size == 12 and feed.unit == "queries" and len(feed.examples) == 8 and feed.plan.pools_per_epoch == 3
    seen: list[dict[int, tuple[Any, ...]]] = []
    for t in range(9):
        rows = feed.plan.pool(t)
        batch = feed.collate(t, np.arange(4), rows)
        assert (
            batch.query.input_ids.shape[0] == 4
            and batch.passage.input_ids.shape[0] == 12
            and batch.grade.shape == (4, 3)
        )
        seen += [{}] * (t % 3 == 0)
        seen[-1] = seen[-1] | {r: tuple(grade) for r, grade in zip(rows.tolist(), batch.grade.tolist(), strict=True)}
    assert all(epoch.keys() == set(range(12)) for epoch in seen)
    assert sum(seen[0][r] == seen[1][r] for r in range(12)) < 4 and seen[0] != seen[2]


@pytest.mark.parametrize(("span", "world_size"), [("world", 2), ("world", 4), ("rank", 2)])
def test_ranks_read_what_one_process_reads(tmp_path: Path, model: Path, span: Any, world_size: int):
    data = make_data([rows_in(tmp_path / "in", 12)], size=3, by="random", few="refuse")
    feed = open_feed(data, model, tmp_path / "run")

    def grades(rank: int, world_size: int, start: int = 0) -> list[list[Any]]:
        settings = {"pools_per_step": 2, "span": span, "rank": rank, "world_size": world_size}
        with Stream(feed.plan, feed.collate, **settings, start_step=start, num_steps=4) as stream:
            return [[batch.grade for batch in step.batches] for step in stream]

    whole = grades(0, 1)
    parts = [grades(rank, world_size) for rank in range(world_size)]
    for step, batches in enumerate(whole):
        if span == "world":
            shared = [torch.cat([part[step][pool] for part in parts]) for pool in range(2)]
        else:
            shared = [batch for part in parts for batch in part[step]]
        assert all(torch.equal(a, b) for a, b in zip(shared, batches, strict=True))
    later = grades(0, 1, start=2)  # resumed
    assert all(
        torch.equal(a, b) for one, two in zip(later, whole[2:], strict=True) for a, b in zip(one, two, strict=True)
    )


def test_a_pool_of_more_rows_than_there_are_is_refused(tmp_path: Path, model: Path):
    data = make_data([rows_in(tmp_path / "in", 3)], size=3)
    with pytest.raises(
        RecipeError, match=r"^data\.sources\.0: 3 rows are fewer than the 4 it gives to a pool of 4; lower"
    ):
        open_feed(data, model, tmp_path / "run")


# --------------------------------------------------------------------------- before the run


def looks_of(data: GradedData) -> list[Look]:
    return [look(source, data) for source in data.sources]


def shown(data: GradedData, model: Path, number: int = 0) -> list[tuple[str, str]]:
    tokenizer = load_tokenizer(model)
    return example(stage_of(data), number, looks_of(data)[number], lambda _: tokenizer)


def test_the_dry_run_shows_a_query_and_each_passage_with_its_grade(tmp_path: Path, model: Path):
    graded = write_rows(tmp_path / "1.jsonl", [row("query 0", ("a", 4), ("b", 3), ("c", 1), query_id="1")])
    found = write_rows(tmp_path / "2.jsonl", [row("query 0", ("found", 0.5), query_id="1")])
    one = {"folder": str(graded), "at_least": 3}
    data = make_data([one, {"folder": str(found), "grade": 1.5}], "query_id", size=3, by="least_relevant")
    lines = shown(data, model)
    assert [name for name, _ in lines] == [
        "example query",
        "example passage of grade 1.5",
        "example passage of grade 3",
        "example passage of grade 4",
    ]
    assert "q: query 0" in lines[0][1] and "p: found" in lines[1][1]
    too_few = make_data([one], size=3, few="refuse")
    assert shown(too_few, model)[1] == (
        "example passages",
        "not shown: the first query looked at has 2 of the 3 passages that a group needs; set data.group.few "
        'to "cycle", lower data.group.size, or set data.faulty_rows to "skip"',
    )


def test_rows_without_ids_are_told_before_the_run(tmp_path: Path, model: Path):
    source = rows_in(tmp_path / "in")
    data = make_data([source], "query_id", size=3)
    line = 'data.sources.0: 10 of 10 rows looked at have no query_id; set data.join to "query_text"'
    assert list(warn(data, dict(enumerate(looks_of(data))))) == [(True, line)]
    skipping = data.model_copy(update={"faulty_rows": "skip"})
    assert list(warn(skipping, dict(enumerate(looks_of(skipping))))) == [(False, line)]
    assert shown(data, model) == [("example row", "not shown: the rows looked at have no query_id")]
    by_text = make_data([source], "query_text", size=3)
    assert list(warn(by_text, dict(enumerate(looks_of(by_text))))) == []


def test_grades_that_are_all_the_same_are_told(tmp_path: Path):
    source = rows_in(tmp_path / "in")
    data = make_data([source | {"grade": 1}], size=3)
    line = "data.sources: all passages looked at have grade 1, so that no order is learnt within a row"
    assert list(warn(data, dict(enumerate(looks_of(data))))) == [(False, line)]
    two = make_data([source | {"grade": 1}, source | {"grade": 0}], "query_text", size=3)
    assert list(warn(two, dict(enumerate(looks_of(two))))) == []
    assert list(warn(two, {0: looks_of(two)[0]})) == []  # of the other nothing is known


def test_grades_that_may_be_ranks_are_told(tmp_path: Path):
    ranks = write_rows(tmp_path / "r.jsonl", [row("q", *((f"p {rank}", rank) for rank in range(1, 101)))])
    data = make_data([{"folder": str(ranks)}], size=3)
    ((is_problem, line),) = warn(data, dict(enumerate(looks_of(data))))
    assert not is_problem and line.startswith("data.sources: grades looked at reach from 1 to 100; each counts e times")
    few = make_data([{"folder": str(ranks), "below": 21}], size=3)
    assert list(warn(few, dict(enumerate(looks_of(few))))) == []


def test_rows_with_too_few_passages_are_told_before_the_run(tmp_path: Path):
    source = rows_in(tmp_path / "in")  # 5 passages each
    data = make_data([source], size=6, few="refuse")
    start = "data.sources.0: 10 of 10 rows looked at have too few passages, the first: "
    lack = 'has 5 of the 6 passages that a group needs; set data.group.few to "cycle"'
    ((is_problem, line),) = warn(data, dict(enumerate(looks_of(data))))
    assert is_problem and line.startswith(start) and f"rows.jsonl: line 1: {lack}" in line
    skipping = data.model_copy(update={"faulty_rows": "skip"})
    assert [each for each, _ in warn(skipping, dict(enumerate(looks_of(skipping))))] == [False]
    none = make_data([source | {"at_least": 9}], size=3)
    (_, left), (is_problem, line) = warn(none, dict(enumerate(looks_of(none))))
    assert left.startswith("data.sources.0: no passage of the rows looked at is left by at_least and below")
    assert is_problem and "has 0 of the 1 passages" in line
    joint = make_data([source, source | {"below": 0}], "query_text", size=3)
    ((_, left),) = warn(joint, dict(enumerate(looks_of(joint))))
    assert left.startswith("data.sources.1: no passage of the rows")
    for fits in (make_data([source], size=6), make_data([source], "query_text", size=6, few="refuse")):
        assert list(warn(fits, dict(enumerate(looks_of(fits))))) == []  # cycled; other rows may be of the same query
    assert list(warn(data, {})) == []  # it could not be looked at


def test_epochs_are_a_range_where_rows_are_joined(tmp_path: Path):
    source = rows_in(tmp_path / "in")
    alone = make_data([source], size=3)
    assert epochs(stage_of(alone, pool=4), 0, [10], [], None) == "4.80 (more if rows are left out)"
    joint = make_data([source, source], "query_text", size=3)
    assert epochs(stage_of(joint, pool=4), 0, [10, 14], [], None) == (
        "2.00 to 3.43, by how many of the sources' rows are of the same query (more if rows are left out)"
    )
    with pytest.raises(RecipeError, match=r"data\.sources\.0: 3 rows are fewer than the 4"):
        epochs(stage_of(alone, pool=4), 0, [3], [], None)
