"""Graded rows on disk: sources joined by query, a group of each row by (seed, epoch, row), batches of any rank."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graded import (
    decoded,
    encode,
    groups,
    make_data,
    make_store,
    published,
    query_of,
    row,
    texts_of,
    write_rows,
)

from toolkit.data.faults import Skipped
from toolkit.data.graded import GradedBatch, GradedStore, collate_graded
from toolkit.data.groups import Passages, joined, lacks, surely
from toolkit.data.pairs import PairPlan
from toolkit.prepare.graded import picks_of
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.graded import GradedData, Group

# --------------------------------------------------------------------------- rows of several sources


def sources_of(folder: Path, *rows_of: list[dict], **keys: Any) -> list[dict]:
    """A folder for each source."""
    for number, rows in enumerate(rows_of):
        write_rows(folder / str(number) / "rows.jsonl", rows)
    return [{"folder": str(folder / str(number))} | keys for number in range(len(rows_of))]


FIRST = [row("b", ("b1", 3), ("b2", 0), query_id="2"), row("a", ("a1", 2), query_id="10")]
SECOND = [row("a", ("a2", 1), ("a1", 0), query_id="10"), row("c", ("c1", 1), query_id="1")]


def test_rows_of_the_same_query_are_put_together_whatever_source_knows_it(tmp_path: Path):
    made = sources_of(tmp_path, FIRST, SECOND)
    by_id = make_data(made, "query_id", size=3)
    a = (
        "a",
        ["a1", "a2", "a1"],
        [0.0, 1.0, 0.0],
    )  # a1 again, without an id: its text is the same, the last grade counts
    b, c = ("b", ["b1", "b2", "b1"], [3.0, 0.0, 3.0]), ("c", ["c1"] * 3, [1.0] * 3)
    store = make_store(tmp_path / "id", by_id)
    assert groups(store, by_id) == [c, a, b]  # sorted by id, as text
    by_text = make_data(made, "query_text", size=3)
    assert groups(make_store(tmp_path / "text", by_text), by_text) == [b, a, c]  # as they came
    assert store.meta["told"] == {"shared": 1, "repeated": 3, "twice": 0, "unread": 0, "regraded": 1, "known": 1}
    assert store.meta["known_to"] == [2, 2] and store.meta["rows"] == 3
    alone = make_data(made[:1])
    assert groups(make_store(tmp_path / "alone", alone), alone) == [
        ("b", ["b1", "b2", "b1", "b2"], [3.0, 0.0, 3.0, 0.0]),
        ("a", ["a1"] * 4, [2.0] * 4),
    ]


def test_rows_of_one_source_are_joined_where_the_recipe_says_so(tmp_path: Path):
    (source,) = sources_of(tmp_path, [row("q", ("x", 1)), row("r", ("z", 1)), row("q", ("y", 0), ("x", 3))])
    joint = make_data([source], "query_text", size=2)
    assert groups(make_store(tmp_path / "joint", joint), joint)[0] == ("q", ["x", "y"], [3.0, 0.0])
    apart = make_data([source], size=1)
    found = groups(make_store(tmp_path / "apart", apart), apart)
    assert found == [("q", ["x"], [1.0]), ("r", ["z"], [1.0]), ("q", ["y"], [0.0])]


def test_ids_mean_the_same_within_a_folder_alone(tmp_path: Path):
    def passage(text: str, grade: float) -> dict:
        return {"text": text, "grade": grade, "id": "p"}

    one = [{"query": "q", "passages": [passage("old", 1)]}]
    two = [{"query": "q", "passages": [passage("new", 2)]}]
    apart = make_data(sources_of(tmp_path, one, two), "query_text", size=2)
    assert groups(make_store(tmp_path / "apart", apart), apart) == [("q", ["old", "new"], [1.0, 2.0])]
    write_rows(tmp_path / "one" / "a.jsonl", [*one, *two])
    same = make_data([{"folder": str(tmp_path / "one" / name)} for name in (".", "../one")], "query_text", size=2)
    assert groups(make_store(tmp_path / "same", same), same) == [("q", ["new", "new"], [2.0, 2.0])]


@pytest.mark.parametrize(
    ("rows", "regraded"),
    [
        ([row("q", ("x", 3), ("x", 0), ("y", 1))], 1),
        ([row("q", ("x", 3), ("x", 3))], 0),  # the control: no other grade
        ([row("q", ("x", 3)), row("q", ("x", 0), ("x", 1))], 2),
    ],
)
def test_grades_that_do_not_count_are_counted(tmp_path: Path, rows: list[dict], regraded: int):
    alone = make_data(sources_of(tmp_path, rows), "query_text", size=2)
    assert make_store(tmp_path / "alone", alone).meta["told"]["regraded"] == regraded
    several = make_data(sources_of(tmp_path, *([each] for each in rows)), "query_text", size=2)
    assert make_store(tmp_path / "several", several).meta["told"]["regraded"] == regraded


def test_a_text_under_two_ids_is_counted(tmp_path: Path):
    one = [{"query": "q", "passages": [{"text": "t", "grade": 1, "id": "a"}, {"text": "t", "grade": 2, "id": "b"}]}]
    data = make_data(sources_of(tmp_path, one), size=2)
    store = make_store(tmp_path / "store", data)
    assert store.meta["told"]["twice"] == 1 and len(store.passage) == 1
    assert groups(store, data) == [("q", ["t", "t"], [1.0, 2.0])]


@pytest.mark.parametrize(
    ("second", "problem", "kind"),
    [
        (row("a", ("x", 1)), r"1/rows\.jsonl: line 1: no query_id; give every row one, or set data\.join", "id"),
        (
            row("other", ("x", 1), query_id="2"),
            r"line 1: query '2' has another text in .*0/rows\.jsonl: line 1; ids must mean the same in all sources",
            "another text",
        ),
    ],
)
def test_rows_that_cannot_be_joined_are_faulty(tmp_path: Path, second: dict, problem: str, kind: str):
    data = make_data(sources_of(tmp_path, FIRST, [second, *SECOND]), "query_id")
    with pytest.raises(RecipeError, match=problem):
        make_store(tmp_path / "refused", data)
    skipped = Skipped()
    assert len(make_store(tmp_path / "skipped", data, skipped)) == 3
    assert skipped.kinds.total() == 1 and kind in next(iter(skipped.kinds))


def test_every_distinct_text_is_tokenised_once_with_its_prefix(tmp_path: Path):
    encoded: list[str] = []

    def record(texts: list[str]) -> list[list[int]]:
        encoded.extend(texts)
        return encode(texts)

    data = make_data(sources_of(tmp_path, FIRST, SECOND), "query_id")
    store = make_store(tmp_path / "store", data, prefixes=("q: ", "p: "), encode=record)
    assert sorted(encoded) == ["p: a1", "p: a2", "p: b1", "p: b2", "p: c1", "q: a", "q: b", "q: c"]
    assert store.examples == ["b1", "b2", "a1", "a2", "c1"]
    assert store.meta["queries"] == 3 and store.meta["passages"] == 5
    assert store.meta["tokens"] == sum(len(text) + 1 for text in encoded)


def test_the_digest_tells_of_every_change_of_the_data_and_of_no_other(tmp_path: Path):
    plain = {"query": "q", "passages": [{"text": "s", "grade": 1, "id": "a"}, {"text": "t", "grade": 2, "id": "b"}]}

    def digest(name: str, one: dict, **keys: Any) -> str:
        write_rows(tmp_path / name / "in" / "rows.jsonl", [one])
        data = make_data([{"folder": str(tmp_path / name / "in")}])
        return make_store(tmp_path / name / "store", data, **keys).digest

    first, second = plain["passages"]
    changed = [
        plain,
        plain | {"query": "r"},
        plain | {"passages": [second, first]},
        plain | {"passages": [first | {"grade": 1.5}, second]},
        plain | {"passages": [first | {"text": "u"}, second]},
        plain | {"passages": [first | {"id": "c"}, second]},  # sorts otherwise
        plain | {"passages": [first]},
    ]
    digests = [digest(str(number), one) for number, one in enumerate(changed)]
    assert len(set(digests)) == len(changed)
    shouted = digest("shouted", plain, encode=lambda texts: encode([text.upper() for text in texts]))
    assert shouted == digests[0] == digest("again", plain)


def test_a_damaged_store_is_refused(tmp_path: Path):
    data = make_data(sources_of(tmp_path, FIRST))
    make_store(tmp_path / "store", data)
    np.save(tmp_path / "store" / "query_of_row.npy", np.zeros(1, dtype=np.int64))
    with pytest.raises(ValueError, match="2 lists of passages for 1 rows; delete the folder"):
        GradedStore(tmp_path / "store")
    (tmp_path / "store" / "meta.json").unlink()
    with pytest.raises(FileNotFoundError):
        GradedStore(tmp_path / "store")


# --------------------------------------------------------------------------- groups

GRADES = [("p0", 0), ("p1", 3), ("p2", 1), ("p3", 3), ("p4", 2), ("p5", 0.5)]


def group_of(
    folder: Path, by: str, size: int, epoch: int = 0, seed: int = 0, passages=GRADES, **keys: Any
) -> list[str]:
    write_rows(folder / "in" / "rows.jsonl", [row("q", *passages)])
    data = make_data([{"folder": str(folder / "in")} | keys], size=size, by=by)
    name = f"{by} {size} {epoch} {seed} {len(list(folder.iterdir()))}"
    ((_, texts, _),) = groups(make_store(folder / name, data), data, epoch, seed)
    return texts


def test_groups_by_grade_then_by_id(tmp_path: Path):
    assert group_of(tmp_path, "first", 3) == ["p0", "p1", "p2"]
    assert group_of(tmp_path, "most_relevant", 4) == ["p3", "p1", "p4", "p2"]
    assert group_of(tmp_path, "least_relevant", 4) == ["p0", "p5", "p2", "p4"]
    assert group_of(tmp_path, "most_relevant", 8)[6:] == ["p3", "p1"]  # cycled
    ids = [("10", 1), ("9", 1), ("1", 1)]
    assert group_of(tmp_path, "most_relevant", 3, passages=ids) == ["9", "10", "1"]  # ids are text


def test_positive_first_takes_the_highest_grade_and_negatives_below_1(tmp_path: Path):
    firsts, rests = set(), set()
    for epoch in range(8):
        first, *rest = group_of(tmp_path, "positive_first", 2, epoch)
        firsts.add(first)
        rests.update(rest)
    assert firsts == {"p1", "p3"} and rests == {"p0", "p5"}
    assert len(group_of(tmp_path, "positive_first", 1)) == 1
    many = group_of(tmp_path, "positive_first", 9)  # too few negatives: drawn with replacement
    assert many[0] in firsts and set(many[1:]) <= rests


def test_negatives_go_on_where_the_epoch_before_ended(tmp_path: Path):
    negatives = [(f"n{k}", 0) for k in range(6)]
    taken = [group_of(tmp_path, "positive_first", 3, epoch, passages=[("p", 1), *negatives])[1:] for epoch in range(6)]
    assert sorted(itertools.chain(*taken[:3])) == [name for name, _ in negatives] and taken[:3] == taken[3:]


GROUP = Group(size=3, by="random", few="refuse")


def passages(*ids_and_grades: tuple[int, float]) -> Passages:
    ids, grades = zip(*ids_and_grades, strict=True) if ids_and_grades else ((), ())
    return Passages(np.array(ids, dtype=np.int64), np.array(grades, dtype=np.float32))


def test_of_a_passage_that_comes_again_the_last_counts_at_the_place_of_the_first():
    sources = [passages((5, 3), (2, 3)), passages((7, 1), (5, 1)), passages((9, 0))]
    places = joined(sources, [None] * 3, (0, 0, 0))
    assert places.tolist() == [3, 1, 2, 4]  # 5, 2, 7, 9


def test_what_is_lacking_holds_for_every_draw():
    """Against all subsets that may be picked."""
    random = np.random.default_rng(0)
    for _ in range(300):
        sources = [
            passages(*((int(n), float(random.integers(3))) for n in random.permutation(6)[: random.integers(4)]))
            for _ in range(random.integers(1, 4))
        ]
        picks = [None if random.integers(2) else int(random.integers(1, 3)) for _ in sources]
        fewest, positives, negatives = 99, 99, 99
        for chosen in itertools.product(
            *(
                itertools.combinations(range(len(source.order)), min(len(source.order), pick or 9))
                for source, pick in zip(sources, picks, strict=True)
            )
        ):
            last: dict[int, float] = {}
            for source, places in zip(sources, chosen, strict=True):
                last |= {int(source.order[place]): float(source.grade[place]) for place in places}
            fewest = min(fewest, len(last))
            positives = min(positives, sum(grade >= 1 for grade in last.values()))
            negatives = min(negatives, sum(grade < 1 for grade in last.values()))
        exact = [fewest, positives, negatives]
        sure = [surely(sources, picks), surely(sources, picks, at_least=1), surely(sources, picks, below=1)]
        assert all(found <= there for found, there in zip(sure, exact, strict=True)), (sources, picks)
        if all(pick is None for pick in picks) or len(picks) == 1:
            assert sure == exact, (sources, picks)


def test_a_later_source_s_grade_decides_what_is_lacking():
    """What was found comes first, what was judged after it; and a pick that leaves a positive whatever it draws."""
    first = GROUP.model_copy(update={"by": "positive_first", "size": 2})
    found, judged = passages((1, 0), (2, 0), (3, 0)), passages((2, 1))
    assert lacks([found, judged], [None, None], first) == ""
    assert "has no passage of grade 1" in lacks([judged, found], [None, None], first)  # the other way round
    assert lacks([found, judged], [2, None], first) == ""
    written = passages((1, 3), (2, 2), (3, 1), (4, 0))
    assert surely([written], [3], at_least=1) == 2 and surely([written], [3], below=1) == 0


def test_what_is_said_of_rows_with_too_few_passages():
    few = [passages((1, 0), (2, 3))]
    cycle = GROUP.model_copy(update={"few": "cycle"})
    less = 'set data.group.few to "cycle", lower data.group.size, or set data.faulty_rows to "skip"'
    more = 'give it more, or set data.faulty_rows to "skip"'
    assert lacks(few, [None], GROUP) == f"has 2 of the 3 passages that a group needs; {less}"
    assert lacks(few, [None], cycle) == ""
    assert lacks([passages()], [None], cycle) == f"has 0 of the 1 passages that a group needs; {more}"
    first = GROUP.model_copy(update={"by": "positive_first"})
    assert lacks(few, [None], first) == f"has 1 of the 2 passages below grade 1 that a group needs; {less}"
    assert lacks(few, [None], first.model_copy(update={"size": 2})) == ""
    none = "has no passage of grade 1 or more for a group to begin with; give it one, or set data.faulty_rows"
    assert lacks([passages((1, 0), (2, 0.5))], [None], first).startswith(none)
    assert lacks([passages((2, 1))], [None], first.model_copy(update={"size": 1})) == ""


def test_rows_with_too_few_passages_are_refused_or_skipped(tmp_path: Path):
    rows = [row("q", ("a", 1), ("b", 0)), row("r", ("c", 1))]
    data = make_data(sources_of(tmp_path, rows), few="refuse", size=2)
    with pytest.raises(RecipeError, match=r"rows\.jsonl: line 2: has 1 of the 2 passages that a group needs"):
        make_store(tmp_path / "refused", data)
    skipped = Skipped()
    store = make_store(tmp_path / "skipped", data, skipped)
    assert [query_of(store, number) for number in range(len(store))] == ["q"]
    assert skipped.kinds == {"of too few passages": 1}


def test_passages_that_no_group_holds_are_counted(tmp_path: Path):
    made = sources_of(tmp_path, [row("q", *GRADES)])

    def unread(by: str, **keys: Any) -> int:
        data = make_data([made[0] | keys], by=by, size=4)
        return make_store(tmp_path / f"{by} {len(keys)}", data).meta["told"]["unread"]

    assert unread("first") == unread("most_relevant") == 2 and unread("random") == 0
    assert unread("positive_first") == 2  # grades 2 and 1
    assert unread("first", pick={"random": 5}) == 0


# --------------------------------------------------------------------------- batches


def many(folder: Path, rows: int = 48, **group: Any) -> tuple[GradedStore, GradedData]:
    """Rows of 1 to 7 passages of uneven lengths, and two of ten others at random."""
    one = [row(f"q{i}", *((f"p{i} {'x' * k}", k + 1) for k in range(1 + i % 7)), query_id=str(i)) for i in range(rows)]
    two = [row(f"q{i}", *((f"o{i} {k}", 0) for k in range(10)), query_id=str(i)) for i in range(rows)]
    made = sources_of(folder, one, two)
    data = make_data([made[0], made[1] | {"pick": {"random": 2}}], "query_id", **({"by": "random", "size": 5} | group))
    return make_store(folder / "store", data), data


def batch_of(store: GradedStore, data: GradedData, rows: Any, epoch: int = 0, seed: int = 0) -> GradedBatch:
    settings = {"picks": picks_of(data), "group": data.group, "seed": seed, "pad_id": 0}
    return collate_graded(store, np.asarray(rows), epoch, **settings)


def shown(side: Any) -> list[str]:
    """The texts of padded rows."""
    assert side.input_ids.dtype == side.attention_mask.dtype == torch.int64
    assert side.input_ids.shape[1] == int(side.attention_mask.sum(1).max())
    lengths = side.attention_mask.sum(1).tolist()
    return [decoded(ids[:length]) for ids, length in zip(side.input_ids.tolist(), lengths, strict=True)]


def test_a_batch_holds_the_groups_of_its_rows(tmp_path: Path):
    store, data = many(tmp_path)
    expected = groups(store, data, epoch=2, seed=5)
    rows = [31, 0, 47, 6]
    batch = batch_of(store, data, rows, epoch=2, seed=5)
    assert shown(batch.query) == [expected[number][0] for number in rows]
    assert shown(batch.passage) == [text for number in rows for text in expected[number][1]]
    assert batch.grade.dtype == torch.float32 and batch.grade.tolist() == [expected[number][2] for number in rows]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("by", ["random", "positive_first"])
def test_ranks_together_hold_the_batch_of_one(tmp_path: Path, ranks: int, by: str):
    store, data = many(tmp_path, by=by)
    plan = PairPlan([len(store)], None, 16, None, seed=9)
    for t in (0, 2, 3):
        rows = plan.pool(t)
        whole = batch_of(store, data, rows, t // 3)
        parts = [batch_of(store, data, part, t // 3) for part in np.split(rows, ranks)]
        for side in ("query", "passage"):
            assert [text for part in parts for text in shown(getattr(part, side))] == shown(getattr(whole, side))
        assert torch.equal(torch.cat([part.grade for part in parts]), whole.grade)


def test_a_group_is_a_function_of_seed_epoch_and_row(tmp_path: Path):
    store, data = many(tmp_path)

    def drawn(number: int, epoch: int, seed: int) -> tuple[str, ...]:
        text, _ = store.group(number, epoch, picks_of(data), data.group, seed)
        return tuple(texts_of(store, text))

    assert drawn(6, 1, 2) == drawn(6, 1, 2)
    again, _ = many(tmp_path / "again")
    assert texts_of(again, again.group(6, 1, picks_of(data), data.group, 2)[0]) == list(drawn(6, 1, 2))
    assert len({drawn(6, epoch, 0) for epoch in range(20)}) > 15
    assert len({drawn(6, 0, seed) for seed in range(20)}) > 15
    np.random.seed(0)
    state = np.random.get_state(legacy=False)["state"]["key"].tolist()  # numpy's global stream is left alone
    drawn(6, 0, 0)
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == state
    picked = [{text for text in drawn(6, epoch, 0) if text.startswith("o")} for epoch in range(200)]
    assert max(map(len, picked)) == 2 and len(set().union(*picked)) == 10


def test_published_folders_share_their_texts(tmp_path: Path):
    """Positives and what BM25 found are read from one corpus, whose passages are stored once."""
    real = {"folder": published(tmp_path, "real"), "format": "beir"}
    data = make_data([real | {"at_least": 1, "grade": 3}, real | {"below": 1, "grade": 1}], "query_id", size=2)
    store = make_store(tmp_path / "store", data)
    assert len(store.passage) == 5 and store.meta["known_to"] == [3, 3]
