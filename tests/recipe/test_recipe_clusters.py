"""What data.clusters and data.packing must agree on with the rest of a stage, and what is said of mistakes in them."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from garbage import VALUES, examples
from hypothesis import given
from hypothesis import strategies as st
from recipe_changes import changed, problems, write
from test_recipe_checks import NO_LANGUAGE, second
from test_recipe_garbage import load, places, replaced

from toolkit.recipe.schema import load_recipe
from toolkit.recipe.surrogate import Bm25Surrogate, PreviousSurrogate, RetrieverSurrogate

FROM: dict[str, Any] = {"by": "retriever", "from": "somebody/model", "svd": 128}
BM25: dict[str, Any] = {"by": "bm25", "text": "prose", "svd": 64}
CLUSTERS: dict[str, Any] = {"surrogate": FROM, "size": 512, "seed": 42}
GREEDY: dict[str, Any] = {"walk": "greedy"}
TWO = [{"folder": "a", "format": "pairs"}, {"folder": "b", "format": "pairs"}]
AT = "stages.1.data"
FIRST = second("contrastive")[0][1] | {"name": "first", "start": {"hub": "a/b"}}


def with_keys(**keys: Any) -> list[tuple[str, Any]]:
    return second("contrastive", **{f"data__{key}": value for key, value in keys.items()})


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            with_keys(clusters=CLUSTERS),
            [f'{AT}.clusters: has no effect without packing; add "packing": {{"walk": "greedy"}}, or remove it'],
        ),
        (with_keys(packing=GREEDY), [f"{AT}.packing: cuts pools from clusters; add data.clusters, or remove it"]),
        (
            with_keys(clusters=CLUSTERS, packing=GREEDY, sources=TWO),
            [f'{AT}.packing.within: missing; write "all" (a pool may straddle two sources) or "source" (never)'],
        ),
        (
            with_keys(clusters=CLUSTERS, packing=GREEDY | {"within": "all"}),
            [f"{AT}.packing.within: there is one source; remove the key"],
        ),
        (
            with_keys(clusters=CLUSTERS, packing=GREEDY | {"within": "all"}, sources=TWO, mix="rows"),
            [f"{AT}.mix: has no effect with packing, which has data.packing.within; remove the key"],
        ),
        (
            with_keys(clusters=CLUSTERS, packing=GREEDY, mix="rows"),
            [f"{AT}.mix: has no effect with packing, which has data.packing.within; remove the key"],
        ),
        (
            with_keys(
                clusters=CLUSTERS, packing=GREEDY | {"within": "source"}, sources=[TWO[0], TWO[1] | {"weight": 2.0}]
            ),
            [
                f"{AT}.sources.1.weight: packing takes every row of a source once an epoch; remove it (limit lets a "
                "source give fewer rows)"
            ],
        ),
        (
            with_keys(clusters=CLUSTERS | {"surrogate": BM25 | {"text": "code", "language": "german"}}, packing=GREEDY),
            [f"{AT}.clusters.surrogate.language: {NO_LANGUAGE}"],
        ),
        (
            [
                ("stages.0", copy.deepcopy(FIRST)),
                ("stages.0.data.clusters", CLUSTERS | {"surrogate": {"by": "previous"}}),
                ("stages.0.data.packing", GREEDY),
                *second("contrastive", lora=FIRST["lora"]),
            ],
            ['stages.0.data.clusters.surrogate.by: there is no stage before the first; write "retriever" or "bm25"'],
        ),
        (
            with_keys(clusters={"surrogate": BM25}, packing={"walk": "nearest"}),
            [
                f"{AT}.clusters.size: missing; add this key: rows of a cluster on average: a source of n rows has "
                "ceil(n / size) clusters",
                f"{AT}.clusters.seed: missing; add this key: of K-means and of its sample; not of the order of "
                "training",
                f"{AT}.packing.walk: input should be 'random' or 'greedy'; found \"nearest\"",
            ],
        ),
        (
            with_keys(clusters=CLUSTERS | {"surrogate": {"by": "bm25", "text": "prose"}}, packing=GREEDY),
            [
                f"{AT}.clusters.surrogate.svd: missing; add this key: dimensions that the weights are reduced to by "
                "truncated SVD (no centring, fitted on the first 100,000 queries), then scaled to unit length"
            ],
        ),
        (
            with_keys(clusters=CLUSTERS | {"size": 0, "sample": 0, "restarts": 0, "iterations": 0, "seed": -1}),
            [
                f"{AT}.clusters.{key}: input should be greater than {bound}; found {found}"
                for key, bound, found in (
                    ("size", 0, 0), ("iterations", 0, 0), ("restarts", 0, 0), ("seed", "or equal to 0", -1),
                    ("sample", 0, 0),
                )
            ],
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_named(changes: list[tuple[str, Any]], lines: list[str], tmp_path: Path):
    assert problems(tmp_path, changed(*changes)) == lines


def test_the_key_from_is_named_as_the_file_writes_it(tmp_path: Path):
    def of(surrogate: dict[str, Any]) -> list[str]:
        keys = with_keys(clusters=CLUSTERS | {"surrogate": surrogate}, packing=GREEDY)
        return problems(tmp_path, changed(*keys))

    at = f"{AT}.clusters.surrogate"
    (missing,) = of({"by": "retriever"})
    assert missing.startswith(f"{at}.from: missing; add this key: a hub id, or a folder: an export, ")
    assert of({"by": "retriever", "form": "a/b"}) == [f"{at}.form: unknown key; did you mean from?"]
    (unknown,) = of(FROM | {"from_": "a/b"})
    assert unknown.startswith(f"{at}.from_: unknown key; did you mean from?")
    assert of(FROM | {"from": 3}) == [f"{at}.from: input should be a valid string; found 3"]
    assert of({"by": "gtr"}) == [f"{at}.by: 'gtr' is unknown; known: retriever, previous, bm25"]


@pytest.mark.parametrize(
    ("surrogate", "kind"), [(FROM, RetrieverSurrogate), ({"by": "previous"}, PreviousSurrogate), (BM25, Bm25Surrogate)]
)
def test_a_stage_with_clusters_loads_and_is_written_as_it_was_read(surrogate: Any, kind: type, tmp_path: Path):
    keys = with_keys(clusters=CLUSTERS | {"surrogate": surrogate}, packing=GREEDY | {"within": "source"}, sources=TWO)
    recipe = load_recipe(write(tmp_path, changed(*keys)))
    data = recipe.stages[1].data
    assert isinstance(data.clusters.surrogate, kind) and (data.clusters.iterations, data.clusters.restarts) == (100, 3)
    path = tmp_path / "again.json"
    path.write_text(recipe.to_json())
    written = json.loads(recipe.to_json())["stages"][1]["data"]["clusters"]["surrogate"]
    assert surrogate.items() <= written.items() and "from_" not in written
    assert load_recipe(path) == recipe and load_recipe(path).digest() == recipe.digest()
    other = load_recipe(path, ("stages.1.data.clusters.seed=43",))
    assert other.digest() != recipe.digest()


@examples(100)
@given(st.data())
def test_whatever_stands_in_the_sections_is_a_recipe_or_lines(tmp_path_factory: pytest.TempPathFactory, data: Any):
    path = tmp_path_factory.mktemp("garbage") / "r.json"
    surrogate = data.draw(st.sampled_from([FROM, BM25, {"by": "previous", "svd": 3}]))
    sections = {"clusters": CLUSTERS | {"surrogate": surrogate, "sample": 10}, "packing": GREEDY | {"within": "all"}}
    at = data.draw(st.sampled_from(places(sections)))
    sections = replaced(sections, at, data.draw(VALUES))
    load(path, json.dumps(changed(*with_keys(sources=TWO, **sections))).encode())
