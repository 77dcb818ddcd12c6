"""Groups of passages against those that the authors' own classes made of the same small files, in their layout.

What hangs on numpy's global stream there is tested as subsets and permutations here.
"""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from graded import BM25, FIXTURES, Grouped, groups, make_data, make_store, published, texts_of

from toolkit.data.groups import joined
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.graded import GradedData, check_graded

EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
MULTILEVEL, BOTH, BINARY = "synth_multilevel", "synth_plus_real", "synth_binary"


def sources(folder: Path, name: str, **of_bm25: object) -> list[dict]:
    """The sources of the four published configurations."""
    real, synth = ({"folder": published(folder, part), "format": "beir"} for part in ("real", "synth"))
    bm25 = real | {"judgements": str(BM25), "pick": {"random": 2}} | of_bm25
    return {
        "real_binary": [real | {"at_least": 1, "grade": 1}, bm25 | {"grade": 0}],
        BINARY: [synth | {"at_least": 2, "grade": 1}, synth | {"below": 2, "grade": 0}],
        MULTILEVEL: [synth],
        BOTH: [real | {"at_least": 1, "grade": 3}, bm25 | {"grade": 1}, synth],
    }[name]


def data_of(folder: Path, name: str, size: int, by: str, **of_bm25: object) -> GradedData:
    data = make_data(sources(folder, name, **of_bm25), None if name == MULTILEVEL else "query_id", size=size, by=by)
    assert not list(check_graded("data", data))
    return data


def expected(name: str, size: int) -> list[Grouped]:
    """Expected groups, cycled to a size."""
    found = []
    for each in EXPECTED[name]:
        passages, labels = (list(itertools.islice(itertools.cycle(each[key]), size)) for key in ("passage", "label"))
        found.append((each["query"], passages, labels))
    return found


@pytest.mark.parametrize(
    ("case", "by"),
    [
        (case, {"none": "first"}.get(case.split("/")[1], case.split("/")[1]))
        for case in EXPECTED
        if "/groups" not in case
    ],
)
def test_groups_are_the_expected_ones(tmp_path: Path, case: str, by: str):
    name, _, number = case.split("/")
    size = int(number) or 8  # 0: all that there are, at most 8; here they are cycled
    data = data_of(tmp_path, name, size, by, pick={"first": 2})
    found = groups(make_store(tmp_path / "store", data), data)
    assert found == expected(case, size)
    if by == "most_relevant":  # the negative controls: another order, and another place of the sources
        least = data_of(tmp_path, name, size, "least_relevant")
        reversed_ = [(query, passages[::-1], labels[::-1]) for query, passages, labels in found]
        assert groups(make_store(tmp_path / "least", least), least) == reversed_ != found
    if name == BOTH:
        turned = make_data(sources(tmp_path, name, pick={"first": 2})[::-1], "query_id", size=size)
        assert groups(make_store(tmp_path / "turned", turned), turned) != found


def test_all_passages_without_a_group(tmp_path: Path):
    """A group of size 0 in the reference: what is there before a group is drawn, nothing cycled."""
    data = data_of(tmp_path, BOTH, 8, "first", pick={"first": 2})
    store = make_store(tmp_path / "store", data)
    for row, each in enumerate(EXPECTED[f"{BOTH}/none/0"]):
        text, parts = store.passages(row)
        places = joined(parts, [None] * 3, (0, 0, row))
        assert texts_of(store, text[places]) == each["passage"]
        assert np.concatenate([part.grade for part in parts])[places].tolist() == each["label"]


@pytest.mark.parametrize(("name", "size"), [(MULTILEVEL, 4), (BOTH, 7)])
def test_random_groups_are_permutations_of_what_is_there(tmp_path: Path, name: str, size: int):
    data = data_of(tmp_path, name, size, "random")
    store = make_store(tmp_path / "store", data)
    whole = {query: dict(zip(passages, grades, strict=True)) for query, passages, grades in everything(tmp_path, name)}
    seen: dict[str, set[tuple[str, ...]]] = {query: set() for query in whole}
    for epoch in range(40):
        for query, passages, grades in groups(store, data, epoch):
            first = list(dict.fromkeys(passages))
            cycled = itertools.islice(itertools.cycle(first), size)  # no second one before all are there
            assert passages == list(cycled)
            assert grades == [whole[query][text] for text in passages]
            bm25 = [text for text in first if whole[query][text] == 1 and text.startswith("real")]
            most = 0 if name == MULTILEVEL else 1 if "13" in query else 2
            assert len(bm25) == most or (len(bm25) < most and "12" in query)  # it has 8 passages, the others fewer
            seen[query].add(tuple(passages))
    assert all(len(orders) > 10 for orders in seen.values())


def everything(folder: Path, name: str) -> list[Grouped]:
    """Every passage that a query has, with its grade; BM25's all."""
    data = data_of(folder, name, 30, "first", pick=None)
    return groups(make_store(folder / f"all_{name}", data), data)


def test_a_pick_draws_every_passage_equally_often(tmp_path: Path):
    data = data_of(tmp_path, BOTH, 7, "first")
    store = make_store(tmp_path / "store", data)
    picked = [groups(store, data, epoch)[0][1][1:3] for epoch in range(600)]
    counts = {text: sum(text in pair for pair in picked) for text in {text for pair in picked for text in pair}}
    assert set(counts) == {f"real passage {n}" for n in (4, 5, 6, 7)}
    assert all(250 < count < 350 for count in counts.values())  # of 300 expected


# --------------------------------------------------------------------------- binary


def reference(pos: list[str], neg: list[str], row: int, seed: int, epoch: int, size: int) -> list[str]:
    """The rule as the README of the reference's cases writes it down."""
    h = hash(row + seed)
    shuffled = list(neg)
    random.Random(h).shuffle(shuffled)
    offset = epoch * (size - 1) % len(neg)
    return [pos[(h + epoch) % len(pos)], *(shuffled * 2)[offset : offset + size - 1]]


@pytest.mark.parametrize("size", [2, 3])
def test_binary_groups_are_those_of_the_reference_s_rule(tmp_path: Path, size: int):
    data = data_of(tmp_path, BINARY, size, "positive_first")
    store = make_store(tmp_path / "store", data)
    differ = 0
    for seed, epoch in itertools.product((0, 1, 42), range(5)):
        for row, (_, passages, grades) in enumerate(groups(store, data, epoch, seed)):
            each = EXPECTED[f"{BINARY}/groups"][row]
            assert passages == reference(each["pos"], each["neg"], row, seed, epoch, size)
            assert grades == [1.0] + [0.0] * (size - 1)
            differ += passages != reference(each["pos"], each["neg"], row, seed + 1, epoch, size)
    assert differ > 30  # the control: another seed


def test_real_binary_has_a_positive_and_two_of_bm25(tmp_path: Path):
    data = data_of(tmp_path, "real_binary", 3, "positive_first")
    store = make_store(tmp_path / "store", data)
    for epoch in range(10):
        for query, passages, grades in groups(store, data, epoch):
            assert grades == [1.0, 0.0, 0.0]
            positives = {"11": (0,), "12": (1, 2), "13": (3,)}[query.split()[-1]]
            negatives = {"11": (4, 5, 6, 7), "12": (4, 8), "13": (10,)}[query.split()[-1]]
            assert passages[0] in {f"real passage {n}" for n in positives}
            assert set(passages[1:]) <= {f"real passage {n}" for n in negatives}
            assert len(set(passages[1:])) == min(2, len(negatives))  # query 13 has one, drawn twice


def test_rows_are_numbered_by_query_id_as_the_reference_sorts_them(tmp_path: Path):
    folder = Path(published(tmp_path, "synth"))
    lines = (folder / "qrels" / "train.tsv").read_text().splitlines()
    (folder / "qrels" / "train.tsv").write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    data = data_of(tmp_path, BINARY, 3, "positive_first")
    assert [query for query, _, _ in groups(make_store(tmp_path / "store", data), data)] == [
        f"query text {n}" for n in (11, 12, 13)
    ]


def test_too_few_passages_are_refused_unless_they_are_cycled(tmp_path: Path):
    data = data_of(tmp_path, BOTH, 7, "random")
    data = data.model_copy(update={"group": data.group.model_copy(update={"few": "refuse"})})
    with pytest.raises(RecipeError, match=r"qrels_?\w*.*query 13: has 6 of the 7 passages that a group needs"):
        make_store(tmp_path / "store", data)
