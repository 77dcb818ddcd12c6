"""toolkit/training/feed.py: what is refused once texts are known, and which stages see the same order of data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipe_changes import RECIPES, changed, write
from tiny import models_at

from toolkit.data.tokens import frame
from toolkit.data.train_tokenizer import train_tokenizer
from toolkit.methods.method import Feed
from toolkit.models.backbone import load_tokenizer
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.models import BuildTokenizer
from toolkit.recipe.schema import Recipe, data_seed, load_recipe, recipe_type
from toolkit.training.feed import open_feed, stage_run

DOCUMENTS = 1100  # one chunk each, so four pools of 256 an epoch
Open = Callable[..., Feed]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(BuildTokenizer(vocab_size=300, pieces="text"), iter(["word of text"])).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300}))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Documents that are pairs too; the last two are too short for crops."""
    rows = [{"text": f"text number {i}", "query": f"number {i}", "positive": f"{i}"} for i in range(DOCUMENTS)]
    rows += [{"text": "a", "query": "a", "positive": "b"}] * 2
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "in"


@pytest.fixture
def feed(data: Path, tokenizer_folder: Path, tmp_path: Path) -> Open:
    """open_feed of stage `index` of a shipped recipe, or of a raw one, on `data`."""

    def of(recipe: str | dict[str, Any], index: int, *overrides: str, folder: Path = tokenizer_folder) -> Feed:
        path = RECIPES / f"{recipe}.json" if isinstance(recipe, str) else write(tmp_path, recipe)
        found = on(load_recipe(path, overrides), index, data)
        run = stage_run(found, index, tmp_path / "run", "cpu")
        return open_feed(run, models_at(folder), load_tokenizer(tokenizer_folder))

    return of


def on(recipe: Recipe, index: int, data: Path) -> Recipe:
    """The recipe with stage `index` on the texts of `data`."""
    raw = json.loads(recipe.to_json())
    of_pairs = raw["stages"][index]["objective"]["name"] == "contrastive"
    kind, no_mix = ("pairs", {"mix": None}) if of_pairs else ("documents", {})
    raw["stages"][index]["data"] |= {"sources": [{"folder": str(data), "format": kind}], **no_mix}
    return recipe_type().model_validate_json(json.dumps(raw))


def refused(feed: Open, *arguments: Any, **folder: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        feed(*arguments, **folder)
    return str(caught.value)


def test_crops_longer_than_the_input_are_refused(feed: Open, tokenizer_folder: Path):
    longest = int(96 * 0.6) + sum(map(len, frame(load_tokenizer(tokenizer_folder), append_eos=False)))
    assert longest > int(96 * 0.6)  # special ids count
    assert feed("crops_compared", 1, f"stages.1.encoder.max_tokens={longest}").size == DOCUMENTS
    assert refused(feed, "crops_compared", 1, f"stages.1.encoder.max_tokens={longest - 1}") == (
        f"stages.1.encoder.max_tokens: {longest - 1} is below the longest crop with its special tokens ({longest}); "
        "raise it, or lower data.crops.max_ratio"
    )


def test_a_queue_of_more_than_an_epoch_is_refused(feed: Open):
    keys = 4 * 256  # of an epoch, at one view
    assert feed("crops_compared", 0, f"stages.0.objective.queue.size={keys}").plan.pools_per_epoch == 4
    assert feed("crops_compared", 2, f"stages.2.objective.queue.size={4 * keys}").size == DOCUMENTS  # four views
    assert refused(feed, "crops_compared", 0, f"stages.0.objective.queue.size={keys + 256}") == (
        f"stages.0.objective.queue.size: {keys + 256} keys are more than an epoch's {keys}, so that texts would meet "
        "their own old keys as negatives; lower it, or set objective.queue to null"
    )


def test_refusals_about_a_key_name_the_stage_and_others_do_not(feed: Open, data: Path, tmp_path: Path):
    assert refused(feed, "crops_compared", 1, "stages.1.batch.pool=2048") == (
        f"stages.1.batch.pool: 2048 is more than the data's {DOCUMENTS} chunks of up to 96 tokens (2 documents under 4 "
        "tokens left out); lower it or add data"
    )
    assert refused(feed, changed(("stages.0.batch.pool", 2048)), 0) == (
        f"stages.0.batch.pool: 2048 passages are more than the data's {DOCUMENTS + 2}; lower it or add data"
    )
    assert refused(feed, "quickstart", 3, "stages.3.batch.pool=2048").startswith(
        f"stages.3.data.sources.0: {DOCUMENTS + 2} rows are fewer than the 2048 it gives to a pool of 2048; lower"
    )
    (tmp_path / "none").mkdir()
    assert refused(feed, "crops_compared", 1, folder=tmp_path / "none").startswith(f"start: {tmp_path}/none: cannot")


def test_documents_that_are_left_out_are_counted(feed: Open, capsys: pytest.CaptureFixture[str]):
    feed("crops_compared", 1)
    assert "data: 2 documents under 4 tokens are left out\n" in capsys.readouterr().out
    feed("quickstart", 3)
    assert "left out" not in capsys.readouterr().out


def pools(feed: Feed) -> np.ndarray:
    return np.stack([feed.plan.pool(t) for t in range(6)])  # of two epochs


def test_stages_side_by_side_see_the_same_data(feed: Open):
    queues = [f"stages.{i}.objective.queue.size=1024" for i in (0, 2)]
    moco, contriever, recontriever = (feed("crops_compared", index, *queues) for index in range(3))
    assert np.array_equal(pools(moco), pools(contriever)) and np.array_equal(pools(moco), pools(recontriever))
    rows = moco.plan.pool(0)[:8]
    batches = [each.collate(0, np.arange(8), rows) for each in (moco, contriever, recontriever)]
    assert batches[0].key.input_ids.equal(batches[1].key.input_ids)  # the crops too, where as many are drawn
    assert batches[0].document.tolist() == batches[2].document.tolist() == rows.tolist()
    another = feed("crops_compared", 1, "seed=43")
    assert not np.array_equal(pools(moco), pools(another))
    assert not another.collate(0, np.arange(8), rows).key.input_ids.equal(batches[0].key.input_ids)


def test_a_stage_that_goes_on_sees_another_order(feed: Open):
    quickstart = load_recipe(RECIPES / "quickstart.json")
    starts = [stage.start == "previous" for stage in quickstart.stages]
    assert starts == [False, True, False, True]
    assert [data_seed(quickstart, index) for index in range(4)] == [42, 43, 42, 43]
    again = changed(("stages.1", changed()["stages"][0] | {"name": "again", "start": "previous"}))
    third = again["stages"][1] | {"name": "third"}
    again["stages"].append(third)
    orders = [pools(feed(again, index)) for index in range(3)]
    assert not any(np.array_equal(orders[a], orders[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    anew = changed(("stages.1", changed()["stages"][0] | {"name": "anew"}))
    assert np.array_equal(pools(feed(anew, 1)), orders[0])


def test_limits_of_stages_that_go_on_are_nested(tmp_path: Path, data: Path, tokenizer_folder: Path):
    """A limit draws by the recipe's own seed, so that a longer stage's pairs hold those of the stage before."""
    raw, limits, drawn = json.loads((RECIPES / "fewshot.json").read_text()), (8, 32, 128), []
    for stage, limit in zip(raw["stages"], limits, strict=True):
        stage["start"] = stage["start"] if limit == 8 else "previous"
        stage["data"]["sources"] = [{"folder": str(data), "format": "pairs", "limit": limit}]
    recipe, tokenizer = recipe_type().model_validate_json(json.dumps(raw)), load_tokenizer(tokenizer_folder)
    for index, limit in enumerate(limits):
        rows = np.arange(limit)
        run = stage_run(recipe, index, tmp_path / "run", "cpu")
        batch = open_feed(run, models_at(tokenizer_folder), tokenizer).collate(0, rows, rows)
        drawn.append(set(batch.query_key.tolist()))
    assert [len(each) for each in drawn] == [8, 32, 128] and drawn[0] < drawn[1] < drawn[2]


def test_neighbours_come_together_and_are_told_by_the_digest(feed: Open, data: Path):
    """Documents in pairs that share their words, scattered: a pool of two is a pair."""
    number = np.random.default_rng(0).permutation(DOCUMENTS)
    texts = [{"text": f"alpha{i // 2} beta{i // 2} w{i}"} for i in number]
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    keys = [("stages.0.data.interleave", 2), ("stages.0.batch.pool", 2)]
    bm25 = ("stages.0.data.neighbours", {"by": "bm25", "text": "code"})

    def together(found: Feed) -> float:
        return float(np.mean([len(set((number // 2)[found.plan.pool(t)].tolist())) == 1 for t in range(100)]))

    plain, neighbours = feed(changed(*keys), 0), feed(changed(*keys, bm25), 0)
    assert together(neighbours) == 1 and together(plain) < 0.1
    assert plain.digest != neighbours.digest and len(plain.digest) == len(neighbours.digest) == 16
    assert neighbours.digest == feed(changed(*keys, bm25), 0).digest
    assert refused(feed, changed(*keys, bm25, ("stages.0.data.interleave", 2000)), 0) == (
        "stages.0.data.interleave: 2000 documents are more than the data's 1100; lower it or add data"
    )
