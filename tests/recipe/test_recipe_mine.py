"""What data.mine must agree on with the rest of a stage."""

import copy
from typing import Any

import pytest
from recipe_changes import changed, problems, write
from test_recipe_checks import OF_A_TEXT, OF_CONTRASTIVE, second

from toolkit.recipe.schema import load_recipe
from toolkit.recipe.search import Bm25Mine, RetrieverMine

MINE: dict[str, Any] = {"by": "previous", "ranks": [1, 20], "negatives": 3}
BM25: dict[str, Any] = MINE | {"by": "bm25", "text": "code"}
FINDS = "stages.1.data.negatives: {}, but data.mine finds {} a row; set negatives to {}, or remove mine"
FIRST = second("contrastive")[0][1] | {"name": "first", "start": {"hub": "a/b"}}  # a stage of pairs


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            [("stages.0.data.mine", MINE), ("stages.0.data.negatives", 1)],
            [
                f"stages.0.data.mine: {OF_CONTRASTIVE}; {OF_A_TEXT}",
                f"stages.0.data.negatives: {OF_CONTRASTIVE}; {OF_A_TEXT}",
            ],
        ),
        (
            [
                *second("contrastive"),
                ("stages.0", copy.deepcopy(FIRST)),
                ("stages.0.data.mine", MINE),
                ("stages.0.data.negatives", 1),
                ("stages.1.lora", FIRST["lora"]),
            ],
            ['stages.0.data.mine.by: there is no stage before the first; write {"by": "bm25", "text": ...}'],
        ),
        (second("contrastive", data__mine=MINE), [FINDS.format(0, 3, "1 to 3")]),
        (second("contrastive", data__mine=MINE | {"negatives": 2}), [FINDS.format(0, 2, "1 or 2")]),
        (second("contrastive", data__mine=MINE | {"negatives": 1}), [FINDS.format(0, 1, "1")]),
        (
            second("contrastive", data__mine=MINE, data__negatives=4),
            [FINDS.format(4, 3, "1 to 3, raise mine.negatives to 4")],
        ),
        (
            second("contrastive", data__mine=MINE | {"ranks": [4, 5]}, data__negatives=1),
            [
                "stages.1.data.mine.ranks: 4 to 5 hold 2 passages, but negatives asks for 3; set ranks to 4 and 6 "
                "or more, or negatives to 2"
            ],
        ),
        (
            second("contrastive", data__mine=MINE | {"ranks": [5, 4], "negatives": 1}, data__negatives=1),
            [
                "stages.1.data.mine.ranks: 5 to 4 hold 0 passages, but negatives asks for 1; set ranks to 5 and 5 "
                "or more"
            ],
        ),
        (
            second("contrastive", data__mine=MINE | {"positive": "lowest", "max_score": 0.5}, data__negatives=1),
            [
                "stages.1.data.mine.positive: only max_share and margin count from it; set one of them, or leave "
                "positive out"
            ],
        ),
        (
            second("contrastive", data__mine=MINE | {"positive": "median", "margin": 0.1}, data__negatives=1),
            ["stages.1.data.mine.positive: input should be 'lowest', 'mean' or 'highest'; found \"median\""],
        ),
        (
            second("contrastive", data__mine=BM25 | {"language": "german"}, data__negatives=1),
            [
                'stages.1.data.mine.language: code is read without a language; leave it out, or set text to "prose"',
            ],
        ),
        (
            second(
                "contrastive", data__mine=MINE | {"max_share": 1.5, "margin": -0.1, "negatives": 0}, data__negatives=1
            ),
            [
                "stages.1.data.mine.negatives: input should be greater than 0; found 0",
                "stages.1.data.mine.max_share: input should be less than or equal to 1; found 1.5",
                "stages.1.data.mine.margin: input should be greater than or equal to 0; found -0.1",
            ],
        ),
        (
            second("contrastive", data__mine=MINE | {"by": "bm24"}, data__negatives=1),
            ["stages.1.data.mine.by: 'bm24' is unknown; did you mean bm25?"],
        ),
        (
            second("contrastive", data__mine={"ranks": [1, 2], "negatives": 1}, data__negatives=1),
            ["stages.1.data.mine.by: missing; add this key"],
        ),
        (
            second("contrastive", data__mine=BM25 | {"max_shares": 0.5}, data__negatives=1),
            ["stages.1.data.mine.max_shares: unknown key; did you mean max_share?"],
        ),
    ],
    ids=[
        "no pairs",
        "nothing before",
        "not taken",
        "not taken, two",
        "not taken, one",
        "too many",
        "few ranks",
        "no ranks",
        "no limit",
        "which",
        "code in German",
        "out of range",
        "unknown by",
        "no by",
        "misspelt",
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, lines):
    assert problems(tmp_path, changed(*changes)) == lines


@pytest.mark.parametrize(
    ("mine", "kind"),
    [
        (MINE | {"ranks": [3, 5], "margin": 0.05, "positive": "lowest"}, RetrieverMine),
        (MINE | {"positive": "highest"}, RetrieverMine),  # as a resolved recipe writes it
        (BM25, Bm25Mine),
        (BM25 | {"text": "prose", "language": "ngrams"}, Bm25Mine),
    ],
)
def test_what_fits_is_let_through(tmp_path, mine, kind):
    recipe = load_recipe(write(tmp_path, changed(*second("contrastive", data__mine=mine, data__negatives=3))))
    assert isinstance(recipe.stages[1].data.mine, kind)
