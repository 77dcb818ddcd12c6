"""What is mined and what never is: rows beside their passages, and the choice among the places of a ranking."""

import numpy as np
import pytest

from toolkit.data.negatives import ANCHORS, anchors, eligible, known_positives, lowest_limit, mining_rows, plain
from toolkit.data.pair_records import PairRecord
from toolkit.recipe.search import MineSettings

RECORDS = [
    PairRecord("Who wrote it?", ["An author.", "A  poet."], ["a POET.", "no one", "No  One", "the sea"], 1.0),
    PairRecord("who wrote  IT?", ["the sea"], [], 1.0),
    PairRecord("what is blue", ["The Sea"], ["an author."], 1.0),
]
CORPUS = ["THE SEA", "what is  blue", "", " ", "ﬁsh", "fish", "a stone"]


def settings(first: int = 1, last: int = 10, count: int = 1, **limits: float) -> MineSettings:
    return MineSettings.model_validate({"ranks": [first, last], "negatives": count, **limits})


def test_texts_are_the_same_but_for_case_space_and_form():
    assert plain(" The\n ﬁsh\u3000STRASSE ") == plain("the fish straße") == "the fish strasse"
    assert plain("the fish") != plain("thefish") != plain("the fish.")


def test_passages_are_there_once_and_known_positives_are_excluded():
    rows = mining_rows(RECORDS, CORPUS, known_positives(RECORDS))
    assert rows.passages == ["An author.", "A  poet.", "the sea", "no one", "what is  blue", "ﬁsh", "a stone"]
    assert [row.tolist() for row in rows.positives] == [[0, 1], [2], [2]]
    # Of the first query (in any case) all three positives; "no one" is a negative that it has, "the sea" is none.
    assert rows.own == [["no one"], [], ["an author."]]
    assert [row.tolist() for row in rows.excluded] == [[0, 1, 2, 3], [0, 1, 2], [0, 2, 4]]


def test_rows_of_other_sources_tell_of_positives():
    known = known_positives([*RECORDS, PairRecord("WHAT is blue", ["A stone", "not here"], [], 1.0)])
    assert mining_rows(RECORDS, CORPUS, known).excluded[2].tolist() == [0, 2, 4, 6]


def by_hand(scores: np.ndarray, indices: np.ndarray, excluded: set[int], highest: float, first: int, last: int):
    """Place after place."""
    rank, places, too_high = 0, [], 0
    for place, (score, index) in enumerate(zip(scores.tolist(), indices.tolist(), strict=True)):
        if index == -1 or index in excluded:
            continue
        rank += 1
        if first <= rank <= last and score > highest:
            too_high += 1
        elif first <= rank <= last:
            places.append(place)
    return places, too_high


def test_places_are_those_that_go_one_by_one():
    random = np.random.default_rng(0)
    without_exclusion = 0
    for _ in range(300):
        found = int(random.integers(1, 40))
        scores = np.sort(random.standard_normal(40).astype(np.float32))[::-1]
        indices = np.concatenate([random.permutation(90)[:found], np.full(40 - found, -1)])
        excluded = np.sort(random.permutation(90)[: random.integers(1, 30)])
        first = int(random.integers(1, 12))
        last, highest = first + int(random.integers(0, 12)), float(random.normal())
        places, window, ranked = eligible(scores, indices, excluded, highest, settings(first, last))
        expected = by_hand(scores, indices, set(excluded.tolist()), highest, first, last)
        assert (places.tolist(), len(window) - len(places)) == expected
        assert ranked == sum(index >= 0 and index not in excluded for index in indices)
        assert not set(indices[places].tolist()) & set(excluded.tolist())
        without_exclusion += by_hand(scores, indices, set(), highest, first, last) != expected
    assert without_exclusion > 50  # control: the exclusion decides


@pytest.mark.parametrize(
    ("positives", "limits", "highest"),
    [
        ([0.8, 0.5], {}, np.inf),
        ([0.8, 0.5], {"max_share": 0.9}, 0.45),
        ([0.8, 0.5], {"max_share": 1.0}, 0.5),
        ([0.8, -0.5], {"max_share": 0.9}, -0.55),
        ([0.8, 0.5], {"margin": 0.1}, 0.4),
        ([0.8, -0.5], {"margin": 0.0}, -0.5),
        ([20.0], {"margin": 3.0, "max_share": 0.95}, 17.0),
        ([20.0], {"max_share": 0.95, "max_score": 7.0}, 7.0),
        ([2.0], {"max_share": 0.5, "max_score": 7.0}, 1.0),
    ],
)
def test_the_highest_score_that_is_allowed(positives: list[float], limits: dict[str, float], highest: float):
    lowest = anchors(np.array(positives))[ANCHORS.index("lowest")]
    assert lowest_limit(lowest, settings(**limits)) == pytest.approx(highest, abs=1e-12)


def test_what_limits_count_from():
    assert dict(zip(ANCHORS, anchors(np.array([0.5, -0.5, 0.9])).tolist(), strict=True)) == pytest.approx(
        {"lowest": -0.5, "mean": 0.3, "highest": 0.9}
    )
