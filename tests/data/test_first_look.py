"""What the first rows of a source show: which columns are used as what, and negatives that are not there."""

import json
from pathlib import Path
from typing import Any

import pytest
from beir import write_beir
from pairs import Row, write

from toolkit.data import first_look
from toolkit.data.first_look import Look, count_rows, look_at_pairs, look_at_texts, no_negatives, too_few
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.pairs import FolderPairs, PairsData
from toolkit.recipe.texts import FolderTexts, TextsData

PAIR = {"anchor": "q", "positive": "p"}


def looked(path: Path, negatives: int = 0, form: str = "pairs", **source: Any) -> Look:
    written = {"folder": str(path), "format": form} | source
    if form in ("pairs", "beir"):
        pairs = PairsData.model_validate({"sources": [written], "negatives": negatives})
        return look_at_pairs(pairs.sources[0], pairs)
    texts = TextsData.model_validate({"sources": [written]})
    return look_at_texts(texts.sources[0], texts)


USED = [
    (
        [PAIR | {"negative_2": "m", "negative_1": "n", "score": 1, "label": 0}],
        2,
        {},
        "query = anchor, positive = positive, negatives = negative_1, negative_2; not used: score, label",
    ),
    (
        [PAIR | {"negative": "n"}],
        0,
        {},
        "query = anchor, positive = positive; not used: negative (data.negatives is 0)",
    ),
    ([PAIR, PAIR | {"note": "late"}], 0, {}, "query = anchor, positive = positive; not used: note"),
    ([PAIR | {"hard_negs": ["n"]}], 0, {}, "query = anchor, positive = positive; not used: hard_negs"),
    (
        [PAIR | {"hard_negs": ["n"], "w": 2.0}],
        1,
        {"negatives": ["hard_negs"], "weight": "w"},
        "query = anchor, positive = positive, negatives = hard_negs, weight = w",
    ),
    ([{"a": "q", "b": "p"}], 0, {"query": "a", "positive": "b"}, "query = a, positive = b"),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(("rows", "negatives", "fields", "line"), USED)
def test_columns_are_named_with_their_use(
    tmp_path: Path, suffix: str, rows: list[Row], negatives: int, fields: Row, line: str
) -> None:
    if suffix == ".parquet":
        rows = [dict.fromkeys(key for row in rows for key in row) | row for row in rows]
    path = write(tmp_path / f"pairs{suffix}", *rows)
    assert looked(path, negatives, fields=fields).line == f"{path}: {line}"


@pytest.mark.parametrize(
    ("form", "row", "fields", "line"),
    [
        ("documents", {"text": "t", "title": "h", "id": 1}, {}, "text = text; not used: title, id"),
        ("documents", {"text": "t", "title": "h"}, {"title": "title"}, "text = text, title = title"),
        ("passages", {"text": "t", "d": "1"}, {"document": "d"}, "text = text, document = d"),
        ("groups", {"text": ["t", "u"], "n": 1}, {}, "text = text; not used: n"),
        ("groups", ["t", "u"], {}, "each row a list of texts"),
    ],
)
def test_columns_of_texts_are_named_too(tmp_path: Path, form: str, row: Any, fields: Row, line: str) -> None:
    path = write(tmp_path / "x.jsonl", row)
    seen = looked(path, form=form, fields=fields)
    assert seen.line == f"{path}: {line}" and len(seen.texts) == 1


def test_the_split_and_the_number_of_files_are_said(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", PAIR)
    write(tmp_path / "test.jsonl", PAIR)
    assert looked(tmp_path, split="train").line.startswith(
        f"{tmp_path}, split train (train.jsonl: 1 of 2 files): query = anchor"
    )


def test_a_later_file_with_other_columns_is_seen_in_its_first_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", *[PAIR] * 300)
    write(tmp_path / "b.jsonl", PAIR | {"negative": "n"})
    with pytest.raises(RecipeError, match=r"b\.jsonl: line 1: columns anchor, positive, negative, but anchor"):
        looked(tmp_path)
    write(tmp_path / "b.jsonl", {"query": "q"})
    with pytest.raises(RecipeError, match=r"b\.jsonl: line 1: no column positive"):
        looked(tmp_path)


@pytest.mark.parametrize(("fields", "key"), [({"weight": "w"}, "weight"), ({"negatives": ["n"]}, "negatives")])
def test_a_column_that_is_named_and_not_there(tmp_path: Path, fields: Row, key: str) -> None:
    with pytest.raises(RecipeError, match=f"no column .*; set fields.{key} to one of anchor, positive"):
        looked(write(tmp_path / "x.jsonl", PAIR), fields=fields)


# --------------------------------------------------------------------------- negatives


def test_whether_a_row_has_a_negative_is_found_far_behind_the_first(tmp_path: Path, monkeypatch) -> None:
    none, some = PAIR | {"negatives": []}, PAIR | {"negatives": ["n"]}
    path = write(tmp_path / "x.jsonl", *[none] * 500, some)
    assert looked(path, 2).negatives is True
    monkeypatch.setattr(first_look, "SEARCHED", 400)
    assert looked(path, 2).negatives is None  # not known
    assert looked(write(tmp_path / "x.jsonl", *[none] * 300), 2).negatives is False
    assert looked(write(tmp_path / "x.jsonl", PAIR), 2).negatives is False


def test_the_error_names_file_columns_and_the_likely_one(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", PAIR | {"hard_negs": ["n"], "score": 1})
    assert no_negatives(2, [looked(path, 2)]) == (
        f"data.negatives: 2 are asked for, but no row of {path} (columns anchor, positive, hard_negs, score) has any; "
        'did you mean fields.negatives ["hard_negs"]? Otherwise name the columns in fields.negatives, call them '
        "negatives, or negative_1, negative_2 and so on, mine some (data.mine), or set data.negatives to 0"
    )


def test_a_folder_in_beir_layout(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "small")
    seen = looked(folder, 1, "beir", split="dev")
    assert seen.line == f"{folder}: judged queries of dev.tsv, grades of 0 as negatives, passages = title and text"
    assert seen.negatives is True and seen.pairs[0].positives
    lines = (folder / "qrels" / "dev.tsv").read_text().splitlines()
    kept = [line for line in lines if not line.endswith("\t0")]
    (folder / "qrels" / "train.tsv").write_text("\n".join(kept) + "\n")
    assert looked(folder, 1, "beir").negatives is False  # split null is train


@pytest.mark.parametrize(
    ("wanted", "have", "line"),
    [
        (2, [2, 3], ""),
        (2, [2, 1, 0, 0], "3 of 4 rows (75.0%) have fewer than data.negatives = 2, 2 of them none (at most 2)"),
        (3, [1, 1], "2 of 2 rows (100.0%) have fewer than data.negatives = 3 (at most 1)"),
        (0, [0, 0], ""),
    ],
)
def test_the_share_of_rows_with_too_few(wanted: int, have: list[int], line: str) -> None:
    assert too_few("negatives", wanted, have, "rows") == (f"{line}; their slots stay empty" if line else "")


# --------------------------------------------------------------------------- how many rows


def test_rows_are_counted(tmp_path: Path, monkeypatch) -> None:
    def count(path: Path, form: str = "pairs") -> tuple[int | None, str]:
        kind = FolderPairs if form in ("pairs", "beir") else FolderTexts
        return count_rows(kind.model_validate({"folder": str(path), "format": form}))

    folder = tmp_path / "both"
    folder.mkdir()
    assert count(write(folder / "a.parquet", *[PAIR] * 7)) == (7, "by the metadata of parquet files")
    path = write(folder / "b.jsonl", *[PAIR] * 5)
    path.write_text(path.read_text() + "\n" + json.dumps(PAIR))  # a blank line is none, the last needs no end
    assert count(path) == (6, "by counting lines")
    assert count(folder) == (13, "by the metadata of parquet files and by counting lines")
    monkeypatch.setitem(first_look._COUNTED, ".jsonl", 10)
    assert count(path) == (None, "not counted: b.jsonl has 0.0 GB")
