"""Two results: the family of the correction, what is compared, what is refused, and what the command prints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.compare import compare_systems, print_comparisons, read_system
from eval.significance import compare, holm
from toolkit.recipe.errors import RecipeError

NAMES = ("first", "second", "third")


def write_result(folder: Path, scores: dict[str, np.ndarray], **changes: Any) -> Path:
    """A result as eval.run writes it; `changes` are for the rows of metrics.json."""
    folder.mkdir(parents=True)
    rows, per_query = {}, {}
    for name, values in scores.items():
        row = {"ndcg_at_10": float(np.mean(values)), "main_score": "ndcg_at_10", "documents": 9, "queries": len(values)}
        rows[name] = row | {"revision": "r", "ignore_identical_ids": False} | changes
        per_query[name] = {"ndcg_at_10": {f"q{i}": float(v) for i, v in enumerate(values)}}
    (folder / "metrics.json").write_text(json.dumps({"label": "x", "collections": rows}))
    (folder / "per_query.json").write_text(json.dumps(per_query))
    return folder


@pytest.fixture
def scores() -> list[dict[str, np.ndarray]]:
    """Two systems on three collections; the gain on the first is the clearest."""
    rng = np.random.default_rng(0)
    before = {name: rng.random(40) for name in NAMES}
    gains = zip((0.10, 0.06, 0.03), NAMES, strict=True)
    return [before, {name: before[name] + rng.normal(gain, 0.12, 40) for gain, name in gains}]


def test_one_family_is_the_collections_of_one_pair(scores, tmp_path: Path):
    before, after = (write_result(tmp_path / str(i), system) for i, system in enumerate(scores))
    rows = compare_systems(read_system(before, "b"), read_system(after, "a"))
    plain = [compare(scores[0][name], scores[1][name], seed=0) for name in NAMES]
    assert [row.change for row in rows] == plain
    assert [row.p_holm for row in rows] == holm([change.p_value for change in plain])
    assert [row.p_holm for row in rows] != [change.p_value for change in plain]
    alone = write_result(tmp_path / "alone", {"first": scores[1]["first"]})
    (row,) = compare_systems(read_system(before, "b"), read_system(alone, "a"))
    assert row.p_holm == row.change.p_value  # a family of one


def test_the_collections_own_main_score_is_compared(scores, tmp_path: Path):
    before, after = (write_result(tmp_path / str(i), system) for i, system in enumerate(scores))
    for folder in (before, after):
        metrics, per_query = (json.loads((folder / f"{n}.json").read_text()) for n in ("metrics", "per_query"))
        metrics["collections"]["first"] |= {"main_score": "recall_at_1", "recall_at_1": 0.5}
        per_query["first"]["recall_at_1"] = dict.fromkeys(per_query["first"]["ndcg_at_10"], 0.5)
        (folder / "metrics.json").write_text(json.dumps(metrics))
        (folder / "per_query.json").write_text(json.dumps(per_query))
    first, second, _ = compare_systems(read_system(before, "b"), read_system(after, "a"))
    assert (first.score, first.before, first.change.difference) == ("recall_at_1", 0.5, 0.0)
    assert (second.score, second.change.difference > 0) == ("ndcg_at_10", True)


@pytest.mark.parametrize(
    "change",
    [{"revision": "s"}, {"documents": 8}, {"queries": 7}, {"ignore_identical_ids": True}],
    ids=lambda change: next(iter(change)),
)
def test_other_data_is_refused(change: dict[str, Any], scores, tmp_path: Path):
    systems = [
        read_system(write_result(tmp_path / "b", scores[0]), "before"),
        read_system(write_result(tmp_path / "a", scores[1], **change), "after"),
    ]
    with pytest.raises(ValueError) as caught:
        compare_systems(*systems)
    assert str(caught.value) == "first: before and after scored different data; evaluate one of them again"


def test_other_queries_are_refused(scores, tmp_path: Path):
    before, after = (write_result(tmp_path / str(i), system) for i, system in enumerate(scores))
    path = after / "per_query.json"
    path.write_text(path.read_text().replace('"q3"', '"q3b"'))
    with pytest.raises(ValueError, match="first: b and a scored different data"):
        compare_systems(read_system(before, "b"), read_system(after, "a"))


def test_what_is_printed(scores, tmp_path: Path, capsys):
    after = write_result(tmp_path / "after", scores[1] | {"new": np.ones(3), "single": np.ones(1)})
    others = [
        write_result(tmp_path / "before", scores[0] | {"single": np.ones(1)}),
        write_result(tmp_path / "same", scores[1]),
    ]
    print_comparisons(after, others)
    printed = capsys.readouterr().out
    for other in others:
        assert f"{after} (after) against {other} (before)" in printed
    change = compare(scores[0]["first"], scores[1]["first"], seed=0)
    line = next(line for line in printed.splitlines() if line.startswith("first"))
    cells = [f"{scores[0]['first'].mean():.4f}", f"{scores[1]['first'].mean():.4f}", f"{change.difference:+.4f}"]
    cells += [f"[{change.low:+.4f}, {change.high:+.4f}]", f"{change.wins}/{change.ties}/{change.losses}"]
    assert change.smallest is not None
    assert all(cell in line for cell in ["nDCG@10", *cells, f"{change.smallest:.4f}"])
    assert "not compared (scored by one of the two, or a single query): new, single" in " ".join(printed.split())


def test_mistakes_are_one_line(scores, tmp_path: Path):
    result = write_result(tmp_path / "a", scores[0])
    other = write_result(tmp_path / "b", {"elsewhere": np.arange(4.0)})
    with pytest.raises(ValueError, match=f"^{other} and {result} have no collection in common"):
        print_comparisons(result, [other])
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "metrics.json").write_text('{"collections"')
    for name in ("empty", "torn", "nowhere"):
        with pytest.raises(RecipeError) as caught:
            print_comparisons(result, [result, tmp_path / name])
        assert str(caught.value).startswith(f"{tmp_path / name}: holds no result (")
        assert "\n" not in str(caught.value)
