"""Mining against a plain search in fp64: who is found, who never is, and by which draw."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from retrievers import ragged_texts, tiny_retriever
from sources import folder_source

from toolkit.data.negatives import MiningRows, known_positives, mining_rows
from toolkit.data.pair_records import PairRecord, read_pairs
from toolkit.determinism import generator
from toolkit.recipe.search import MineSettings
from toolkit.retrieval.bm25 import bm25_top_k
from toolkit.retrieval.embed import embed_texts
from toolkit.retrieval.mining import Mined, Search, bm25_search, check_mined, mine, retriever_search, write_mined

TEXTS = ragged_texts(90, longest=12)


def settings(first: int = 1, last: int = 20, count: int = 3, **limits: float | str) -> MineSettings:
    return MineSettings.model_validate({"ranks": [first, last], "negatives": count, **limits})


def rows_of(count: int = 20, known: bool = True) -> MiningRows:
    """Queries that ask with the first words of their positive; every second one has a copy of it in the corpus.

    The even ones know a second positive, from a row of their own.
    """
    queries = [" ".join(text.split()[:3]) for text in TEXTS[:count]]
    records = [PairRecord(query, [TEXTS[i]], [], 1.0) for i, query in enumerate(queries)]
    records += [PairRecord(queries[i], [TEXTS[count + i]], [TEXTS[60 + i]], 1.0) for i in range(0, count, 2)]
    copies = [f" {text.upper()}" for text in TEXTS[1:count:2]]
    return mining_rows(
        records, [*TEXTS, *copies], known_positives(records) if known else {r.query: set() for r in records}
    )


def dense_scores(rows: MiningRows) -> np.ndarray:
    """fp64 [rows, passages] from the retriever's vectors."""
    queries = embed_texts(tiny_retriever(), [record.query for record in rows.records], "query")
    return queries.astype(np.float64) @ embed_texts(tiny_retriever(), rows.passages, "passage").astype(np.float64).T


def bm25_of_all(rows: MiningRows) -> np.ndarray:
    queries, found = [record.query for record in rows.records], np.zeros((len(rows.records), len(rows.passages)))
    scores, indices = bm25_top_k(rows.passages, queries, len(rows.passages), reading="code")
    for row in range(len(found)):
        found[row, indices[row, indices[row] >= 0]] = scores[row, indices[row] >= 0]
    return found


def by_hand(rows: MiningRows, scores: np.ndarray, wanted: MineSettings, seed: int, source: int) -> list[list[int]]:
    """Rank all passages of each row, leave out one after another, draw."""
    chosen = []
    for row, record in enumerate(rows.records):
        positive = {"lowest": min, "mean": np.mean, "highest": max}[wanted.positive](scores[row, rows.positives[row]])
        limit = min(
            np.inf if wanted.max_share is None else wanted.max_share * positive,
            np.inf if wanted.margin is None else positive - wanted.margin,
            np.inf if wanted.max_score is None else wanted.max_score,
        )
        ranked = [i for i in np.argsort(-scores[row], kind="stable").tolist() if i not in rows.excluded[row].tolist()]
        window = [i for i in ranked[wanted.ranks[0] - 1 : wanted.ranks[1]] if scores[row, i] <= limit]
        window = [i for i in window if scores[row, i] != 0]  # for BM25: no word in common
        lacking = wanted.negatives - len(rows.own[row])
        if len(window) > lacking:
            drawn = generator("mine", seed, source, row).permutation(len(window))[:lacking]
            window = [window[i] for i in sorted(drawn.tolist())]
        chosen.append(window)
        assert record.positives
    return chosen


def lists(mined: Mined) -> list[list[int]]:
    return [[number for number in row if number >= 0] for row in mined.negatives.tolist()]


def searches(rows: MiningRows) -> list[tuple[Search, np.ndarray]]:
    return [
        (retriever_search(tiny_retriever(), rows), dense_scores(rows)),
        (bm25_search(rows, reading="code"), bm25_of_all(rows)),
    ]


@pytest.mark.parametrize(
    "wanted",
    [
        settings(),
        settings(4, 9, 5),
        settings(1, 30, 3, max_share=0.9),
        settings(1, 30, 3, max_score=0.5),
        settings(1, 30, 3, margin=0.1),
        settings(1, 30, 3, margin=0.1, max_share=0.95),
    ],
    ids=["first", "later", "share", "score", "margin", "margin and share"],
)
def test_negatives_are_those_of_a_search_by_hand(wanted: MineSettings):
    rows = rows_of()
    for search, scores in searches(rows):
        if wanted.max_score is not None:
            wanted = settings(1, 30, 3, max_score=float(np.quantile(scores[scores > 0], 0.8)))
        mined = mine(rows, search, wanted, seed=5, source=2)
        expected = by_hand(rows, scores, wanted, 5, 2)
        assert lists(mined) == expected and sum(map(len, expected)) > 10
        if wanted.margin is not None:  # control: without it other passages are mined
            assert lists(mine(rows, search, wanted.model_copy(update={"margin": None}), 5, 2)) != expected
        for row, own in enumerate(expected):
            assert not set(own) & set(rows.excluded[row].tolist()) and len(own) <= wanted.negatives
            assert mined.scores[row, 0] == pytest.approx(min(scores[row, rows.positives[row]]), abs=1e-5)
            np.testing.assert_allclose(mined.scores[row, 1 : 1 + len(own)], scores[row, own], atol=1e-5)
            assert np.isnan(mined.scores[row, 1 + len(own) :]).all()
        assert lists(mine(rows, search, wanted, seed=6, source=2)) != expected  # another draw
        assert lists(mine(rows, search, wanted, seed=5, source=1)) != expected


def test_known_positives_and_their_copies_are_never_mined():
    rows, naive = rows_of(), rows_of(known=False)
    wanted = settings(1, 5, 5)

    def positives_mined(rows: MiningRows) -> int:
        """Mined texts that some row of the query has as a positive, but for case and space."""
        known = known_positives(rows.records)
        found = 0
        for record, own in zip(rows.records, lists(mine(rows, searches(rows)[1][0], wanted, 0, 0)), strict=True):
            found += sum(rows.passages[i].casefold().strip() in known[record.query] for i in own)
        return found

    assert positives_mined(rows) == 0
    assert positives_mined(naive) > 10  # control: without what is known they come first
    assert len({text.casefold().strip() for text in rows.passages}) == len(rows.passages)


def test_own_negatives_count_and_are_not_mined_again():
    rows, wanted = rows_of(), settings(1, 30, 2)
    mined = lists(mine(rows, searches(rows)[0][0], wanted, 0, 0))
    for own, record, row in zip(mined, rows.records, rows.own, strict=True):
        assert len(own) == 2 - len(record.negatives) and not {rows.passages[i] for i in own} & set(row)


def test_the_draw_is_even_over_the_ranks_and_a_function_of_the_row():
    rows = rows_of()
    search, scores = searches(rows)[0]
    counts: Counter[int] = Counter()
    for seed in range(100):
        for row, own in enumerate(lists(mine(rows, search, settings(3, 12, 2), seed, 0))):
            ranked = [i for i in np.argsort(-scores[row], kind="stable").tolist() if i not in rows.excluded[row]]
            counts.update(ranked.index(i) + 1 for i in own)
    assert sorted(counts) == list(range(3, 13))
    expected = sum(counts.values()) / 10
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 27.9  # chi-square of 9, p 0.001
    fewer = rows._replace(**{name: getattr(rows, name)[:7] for name in ("records", "positives", "own", "excluded")})
    assert lists(mine(fewer, search, settings(), 1, 0)) == lists(mine(rows, search, settings(), 1, 0))[:7]


def test_what_is_written_is_read_as_pairs(tmp_path: Path):
    rows, wanted = rows_of(), settings(1, 30, 4, max_share=0.9)
    mined = mine(rows, searches(rows)[0][0], wanted, 0, 0)
    line = write_mined(rows, mined, wanted, tmp_path, {"seed": 0})
    read = list(read_pairs(folder_source(folder=str(tmp_path), format="pairs"), Counter()))
    for record, back, own in zip(rows.records, read, lists(mined), strict=True):
        assert (back.query, back.positives, back.weight) == (record.query, record.positives, 1.0)
        assert back.negatives == record.negatives + [rows.passages[i] for i in own]
    found = json.loads((tmp_path / "mined.json").read_text())
    have = [len(record.negatives) for record in read]
    assert found["counts"] == {
        "rows": 30, "passages": len(rows.passages), "mined": sum(map(len, lists(mined))),
        "rows_with_fewer": sum(n < 4 for n in have), "rows_with_none": have.count(0),
        "scored_too_high": int(mined.too_high.sum()),
    }  # fmt: skip
    assert found["counts"]["rows_with_fewer"] > 0 and found["counts"]["scored_too_high"] > 0
    assert f"{found['counts']['rows_with_fewer']} rows have fewer than 4" in line
    scores = np.load(tmp_path / "scores.npy", allow_pickle=False)
    np.testing.assert_array_equal(scores, mined.scores)
    check_mined(tmp_path)
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"pairs\.jsonl is not as it was written"):
        check_mined(tmp_path)


def test_no_negative_at_all_is_an_error(tmp_path: Path):
    rows = rows_of()
    mined = mine(rows, searches(rows)[0][0], settings(1, 30, 4, max_score=-2.0), 0, 0)
    told = r"^no row got a negative: max_score -2 leaves 30 rows none, since all 900 candidates at ranks 1 to 30 "
    with pytest.raises(
        ValueError,
        match=told
        + r"score above it; \d+ rows would get one with max_score \S+; 30 rows would get one with max_score null$",
    ):
        write_mined(rows, mined, settings(1, 30, 4, max_score=-2.0), tmp_path, {})
    full = rows._replace(own=[["a", "b", "c"] for _ in rows.own])  # nothing is lacking
    assert "mined: 0 hard negatives for 30 rows" in write_mined(full, mined, settings(), tmp_path, {})


# --------------------------------------------------------------------------- several positives, one of which is low


def medline() -> MiningRows:
    """40 queries of two words: one positive has both, the other one neither; ten passages have one of them each."""
    records, corpus = [], []
    for i in range(40):
        high, low = f"cure{i} fever{i} of men", f"other words of case {i}"
        records.append(PairRecord(f"cure{i} fever{i}", [high, low], [], 1.0))
        corpus += [f"fever{i} and {' '.join(f'x{j}' for j in range(n))}" for n in range(1, 11)]
    return mining_rows(records, corpus, known_positives(records))


@pytest.mark.parametrize(("positive", "starved"), [("lowest", 40), ("mean", 0), ("highest", 0), (None, 0)])
def test_a_positive_that_scores_low_takes_no_negatives_from_its_row(positive, starved: int, tmp_path: Path, capsys):
    rows = medline()
    wanted = settings(1, 10, 2, max_share=0.95, **({} if positive is None else {"positive": positive}))
    mined = mine(rows, bm25_search(rows, reading="english"), wanted, 0, 0)
    assert sum(not row for row in lists(mined)) == starved
    np.testing.assert_array_equal(mined.positives[:, 0], 0)  # the low one shares no word
    np.testing.assert_allclose(mined.positives[:, 1] * 2, mined.positives[:, 2])
    which = ("lowest", "mean", "highest").index(positive or "highest")
    np.testing.assert_allclose(mined.scores[:, 0], mined.positives[:, which], rtol=1e-6)
    if not starved:
        write_mined(rows, mined, wanted, tmp_path, {})
        record = json.loads((tmp_path / "mined.json").read_text())
        assert record["settings"]["positive"] == (positive or "highest") and capsys.readouterr().err == ""
        return
    told = (
        'no row got a negative: max_share 0.95 (positive "lowest") leaves 40 rows none, since all 400 candidates at '
        'ranks 1 to 10 score above it; 40 rows would get one with positive "highest"; 40 rows would get one with '
        "max_share null"
    )
    with pytest.raises(ValueError) as error:
        write_mined(rows, mined, wanted, tmp_path, {})
    assert str(error.value) == told


@pytest.mark.parametrize("limit", [{"max_share": 0.9}, {"margin": 0.1}], ids=["share", "margin"])
@pytest.mark.parametrize("positive", ["lowest", "mean", "highest"])
def test_limits_count_from_the_positive_that_is_chosen(limit, positive: str):
    queries = [" ".join(text.split()[:3]) for text in TEXTS[:20]]
    records = [PairRecord(query, [TEXTS[i], TEXTS[30 + i]], [], 1.0) for i, query in enumerate(queries)]
    rows = mining_rows(records, TEXTS, known_positives(records))
    for search, scores in searches(rows):
        wanted = settings(1, 30, 3, **limit, positive=positive)
        assert lists(mine(rows, search, wanted, 5, 2)) == by_hand(rows, scores, wanted, 5, 2)
        for other in {"lowest", "mean", "highest"} - {positive}:  # control
            assert by_hand(rows, scores, settings(1, 30, 3, **limit, positive=other), 5, 2) != by_hand(
                rows, scores, wanted, 5, 2
            )


def test_many_rows_without_a_negative_are_said(tmp_path: Path, capsys):
    """A value that the warning names gives as many rows a negative as it says."""
    rows = rows_of()
    search = bm25_search(rows, reading="code")
    scores = mine(rows, search, settings(1, 30, 2), 0, 0)
    share = float(np.quantile((scores.least / scores.positives[:, 2])[~np.isnan(scores.least)], 0.4))
    wanted = settings(1, 30, 2, max_share=share)
    mined = mine(rows, search, wanted, 0, 0)
    write_mined(rows, mined, wanted, tmp_path, {})
    none = json.loads((tmp_path / "mined.json").read_text())["counts"]["rows_with_none"]
    said = capsys.readouterr().err
    assert none > 3 and said.startswith(f"warning: {none} of 30 rows have no negative: max_share {share:g} (positive ")
    found = re.search(r"(\d+) rows would get one with max_share (0\.\d+|1)", said)
    assert found is not None
    again = mine(rows, search, settings(1, 30, 2, max_share=float(found[2])), 0, 0)
    without = sum(not own and not kept for own, kept in zip(lists(again), rows.own, strict=True))
    assert none - without == int(found[1]) > 0
    write_mined(rows, scores, settings(1, 30, 2), tmp_path, {})
    assert capsys.readouterr().err == ""


def test_ranks_that_begin_too_deep_are_named(tmp_path: Path):
    rows = medline()
    wanted = settings(20, 30, 2)
    mined = mine(rows, bm25_search(rows, reading="english"), wanted, 0, 0)
    told = (
        "no row got a negative: 40 rows have no passage at ranks 20 to 30: the search finds at most 10; 40 would "
        "have one with ranks [10, 30]"
    )
    with pytest.raises(ValueError) as error:
        write_mined(rows, mined, wanted, tmp_path, {})
    assert str(error.value) == told
    lowered = mine(rows, bm25_search(rows, reading="english"), settings(10, 30, 2), 0, 0)
    assert all(len(own) == 1 for own in lists(lowered))


def test_queries_that_share_no_word_are_counted():
    rows = medline()
    rows.records[0] = rows.records[0]._replace(query="unheard of")
    rows.records[1] = rows.records[1]._replace(query="unheard")
    mined = mine(rows, bm25_search(rows, reading="english"), settings(), 0, 0)
    assert np.flatnonzero(mined.found == 0).tolist() == [0, 1]
    assert (mined.ranked[2:] == 10).all() and (mined.found[2:] == 11).all()
