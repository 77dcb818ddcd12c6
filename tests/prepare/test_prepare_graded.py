"""Graded rows are tokenised once, by content: what makes a new store, what does not, and what every run says."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from graded import BM25, make_data, published, row, write_rows

from toolkit.data.graded import GradedStore
from toolkit.data.graded_records import read_graded
from toolkit.data.tokens import tokenize
from toolkit.data.train_tokenizer import train_tokenizer
from toolkit.models.backbone import load_tokenizer
from toolkit.prepare import graded as module
from toolkit.prepare.graded import prepare_graded
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.graded import GradedData
from toolkit.recipe.models import BuildTokenizer, EncoderSettings

ROWS = [row(f"query {i}", (f"good {i}", 3), (f"fair {i}", 1), ("bad", 0)) for i in range(6)]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    settings = BuildTokenizer(vocab_size=300, pieces="text")
    train_tokenizer(settings, iter(["query good fair bad"])).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300}))
    return folder


def rows_in(folder: Path, rows: list[dict] = ROWS) -> dict[str, str]:
    write_rows(folder / "rows.jsonl", rows)
    return {"folder": str(folder)}


def prepare(data: GradedData, tokenizer: Path, run: Path, **changes: Any) -> GradedStore:
    settings = {"pooling": "eos", "normalize": True, "append_eos": True, "query_prefix": "q: ", "passage_prefix": "p: "}
    settings |= {"max_tokens": 12, "eval_max_tokens": 12} | changes
    return prepare_graded(data, EncoderSettings.model_validate(settings), tokenizer, run)


def stores(run: Path) -> set[str]:
    """Names in the cache; nothing half-written may be left there."""
    names = {path.name for path in (run.parent / "prepared").iterdir()}
    assert not [name for name in names if name.startswith(".")]
    return {name for name in names if name.startswith("graded_")}


def test_ids_are_those_of_tokenize_with_the_prefixes(tmp_path: Path, tokenizer_folder: Path, capsys):
    long = row("query 0", ("good 0 and so much more text", 2))
    data = make_data([rows_in(tmp_path / "in", [*ROWS, long, row("", ("x", 1))])], size=3)
    store = prepare(data, tokenizer_folder, tmp_path / "run")
    tokenizer = load_tokenizer(tokenizer_folder)

    def ids(prefix: str, text: str) -> list[int]:
        return tokenize(tokenizer, [text], prefix, 12, append_eos=True)[0]

    assert len(store) == 7 and len(store.passage) == 14
    for number, each in enumerate([*ROWS, long]):
        assert store.query[int(store.query_of_row[number])].tolist() == ids("q: ", each["query"])
        texts, _ = store.passages(number)
        found = [store.passage[text].tolist() for text in texts.tolist()]
        assert found == [ids("p: ", passage["text"]) for passage in each["passages"]]
    said, warned = capsys.readouterr()
    assert said.splitlines() == [
        f"data.sources.0: folder: {tmp_path / 'in'}: 8 rows; not used: 1 rows without a query or a passage",
        "data: 7 queries, 14 passages, 19 graded passages of queries (grades 3: 6, 2: 1, 1: 6, 0: 6), "
        f"digest {store.digest}, {store.meta['tokens']} tokens",
    ]
    assert warned == (
        "warning: data.group: 1 of 7 queries have fewer than 3 passages for a group in some epoch; they are repeated\n"
    )
    prepare(data, tokenizer_folder, tmp_path / "run")
    assert capsys.readouterr() == ("", warned)


def test_a_second_run_reads_no_data_and_equal_content_shares_a_store(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch
):
    source = rows_in(tmp_path / "in")
    first = prepare(make_data([source]), tokenizer_folder, tmp_path / "run")
    path = tmp_path / "in" / "rows.jsonl"
    shutil.copytree(tmp_path / "in", tmp_path / "copy")
    times, size = path.stat(), path.stat().st_size
    path.write_bytes(b"\xff" * size)  # whoever reads this fails
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_graded", None)  # writing again would fail
        for place, run in (("in", "run"), ("in", "other"), ("copy", "run")):
            data = make_data([{"folder": str(tmp_path / place)}])
            assert prepare(data, tokenizer_folder, tmp_path / run).digest == first.digest
        with pytest.raises(TypeError):  # the control
            prepare(make_data([{"folder": str(tmp_path / "copy")}]), tokenizer_folder, tmp_path / "run", max_tokens=11)
    os.utime(path)
    with pytest.raises(RecipeError, match="UTF-8"):
        prepare(make_data([source]), tokenizer_folder, tmp_path / "run")
    assert len(stores(tmp_path / "run")) == 1


def test_whatever_changes_the_rows_makes_another_store(tmp_path: Path, tokenizer_folder: Path):
    source, run = rows_in(tmp_path / "in", [ROWS[0] | {"query_id": "1"}, ROWS[1] | {"query_id": "2"}]), tmp_path / "run"
    sources = [[source | keys] for keys in ({}, {"grade": 1}, {"at_least": 1}, {"below": 3}, {"pick": {"first": 1}})]
    for number, each in enumerate([*sources, [source, source]], start=1):
        prepare(make_data(each, "query_id"), tokenizer_folder, run)
        assert len(stores(run)) == number
    prepare(make_data([source]), tokenizer_folder, run)  # not joined
    prepare(make_data([source], "query_id", size=2), tokenizer_folder, run)
    prepare(make_data([source], "query_id", faulty="skip"), tokenizer_folder, run)
    prepare(make_data([source], "query_id"), tokenizer_folder, run, query_prefix="")
    shutil.copytree(tmp_path / "in", tmp_path / "copy")  # its ids are its own
    prepare(make_data([source, {"folder": str(tmp_path / "copy")}], "query_id"), tokenizer_folder, run)
    assert len(stores(run)) == 11
    path = tmp_path / "in" / "rows.jsonl"
    path.write_text(path.read_text().replace("good 1", "nice 1"))
    prepare(make_data([source], "query_id"), tokenizer_folder, run)
    assert len(stores(run)) == 12


def test_another_file_of_judgements_makes_another_store(tmp_path: Path, tokenizer_folder: Path, capsys):
    run, judgements = tmp_path / "run", tmp_path / "bm25.jsonl"
    shutil.copy(BM25, judgements)
    real = {"folder": published(tmp_path, "real"), "format": "beir"}
    sources = [
        real | {"at_least": 1, "grade": 3},
        real | {"judgements": str(judgements), "pick": {"random": 2}, "grade": 1},
    ]
    data = make_data(sources, "query_id", size=3)
    store = prepare(data, tokenizer_folder, run)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"data.sources.0: folder: {real['folder']}: 3 rows, for 3 of the queries; not used: 7 passages that no query "
        "names, 1 passages of other grades",
        f"data.sources.1: folder: {real['folder']}: 3 rows, for 3 of the queries; not used: 6 passages that no query "
        "names",
        "data: 3 queries (3 of them in all 2 sources), 10 passages, 11 graded passages of queries (grades 3: 4, 1: 7), "
        f"digest {store.digest}, {store.meta['tokens']} tokens",
    ]
    lines = BM25.read_text().splitlines()
    judgements.write_text("\n".join([*lines[:2], '{"qid": "13", "docid": ["r10", "none", "r11"], "score": [1, 2, 3]}']))
    other = prepare(data, tokenizer_folder, run)
    assert other.digest != store.digest and len(stores(run)) == 2
    assert "1 judged texts that are missing" in capsys.readouterr().out


def test_bad_data_is_one_line_and_leaves_nothing(tmp_path: Path, tokenizer_folder: Path):
    good = rows_in(tmp_path / "good")
    empty = rows_in(tmp_path / "empty", [row(" ", ("x", 1)), row("q")])
    broken = rows_in(tmp_path / "broken", [ROWS[0], {"query": "q", "passages": 3}])
    few = rows_in(tmp_path / "few", [row("q", ("x", 1))])
    run = tmp_path / "run"
    for data, problem in (
        (
            make_data([good, empty], "query_text"),
            r"^data\.sources\.1: no graded row in 2 rows; name a source that holds",
        ),
        (make_data([good, broken], "query_text"), r"rows\.jsonl: line 2: 'passages' holds the number 3; write a list"),
        (make_data([{"folder": str(tmp_path / "none")}]), "does not exist"),
        (make_data([few], few="refuse"), r"line 1: has 1 of the 4 passages that a group needs"),
        (
            make_data([few], few="refuse", faulty="skip"),
            r"^data\.sources: no query has the passages of a group, the last: ",
        ),
        (
            make_data([good], by="positive_first", few="refuse"),
            r"line 1: has 1 of the 3 passages below grade 1 that a group needs",
        ),
    ):
        with pytest.raises(RecipeError, match=problem):
            prepare(data, tokenizer_folder, run)
        assert stores(run) == set()
    assert len(prepare(make_data([good]), tokenizer_folder, run)) == 6


def test_skipped_rows_are_said_by_every_run(tmp_path: Path, tokenizer_folder: Path, capsys):
    source = rows_in(tmp_path / "in", [*ROWS, row("few", ("x", 1)), {"query": "q"}])
    data = make_data([source], size=3, few="refuse", faulty="skip")
    for _ in range(2):
        assert len(prepare(data, tokenizer_folder, tmp_path / "run")) == 6
        said = capsys.readouterr().out
        assert "faulty rows skipped: 2 (1 without a column, 1 of too few passages); the first of each kind:" in said
        assert "line 7: has 1 of the 3 passages that a group needs" in said


def test_files_that_change_while_they_are_read_are_refused(tmp_path: Path, tokenizer_folder: Path, monkeypatch):
    data, run = make_data([rows_in(tmp_path / "in")]), tmp_path / "run"

    def growing(*arguments):
        yield from read_graded(*arguments)
        rows_in(tmp_path / "in", [*ROWS, *ROWS])

    with monkeypatch.context() as patch:
        patch.setattr(module, "read_graded", growing)
        with pytest.raises(RecipeError, match=r"folder: .* changed while it was read; start again when it is done"):
            prepare(data, tokenizer_folder, run)
    assert stores(run) == set()
    assert len(prepare(data, tokenizer_folder, run)) == 12


def test_a_damaged_store_is_named(tmp_path: Path, tokenizer_folder: Path):
    data, run = make_data([rows_in(tmp_path / "in")]), tmp_path / "run"
    prepare(data, tokenizer_folder, run)
    path = tmp_path / "prepared" / stores(run).pop() / "held.ids"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(RecipeError, match=r"held\.ids: \d+ bytes, not \d+; delete the folder"):
        prepare(data, tokenizer_folder, run)


def test_sources_without_a_common_query_are_a_warning(tmp_path: Path, tokenizer_folder: Path, capsys):
    one, two = (rows_in(tmp_path / name, [row(name, ("a", 1))]) for name in ("one", "two"))
    assert len(prepare(make_data([one, two], "query_text", size=1), tokenizer_folder, tmp_path / "run")) == 2
    said, warned = capsys.readouterr()
    assert "data: 2 queries (0 of them in all 2 sources), " in said
    assert warned == "warning: data.join: no query has passages in all 2 sources; do their queries' texts agree?\n"


def test_sources_whose_common_queries_lose_their_passages_to_a_filter_are_told_so(
    tmp_path: Path, tokenizer_folder: Path, capsys
):
    one, two = (rows_in(tmp_path / name, [row("q", (name, 1)), row("r", (name, 1))]) for name in ("one", "two"))
    prepare(make_data([one, two | {"at_least": 2.0}], "query_text", size=1), tokenizer_folder, tmp_path / "run")
    assert capsys.readouterr().err == (
        "warning: data.join: no query has passages in all 2 sources; 2 queries are in all, but at_least and below "
        "leave some source without passages\n"
    )


def test_a_passage_with_two_grades_is_a_warning(tmp_path: Path, tokenizer_folder: Path, capsys):
    found, judged = (rows_in(tmp_path / name, [row("q", ("a", grade))]) for name, grade in (("one", 0), ("two", 1)))
    prepare(make_data([found, judged], "query_text", size=1), tokenizer_folder, tmp_path / "run")
    assert capsys.readouterr().err == (
        "warning: data.sources: 1 grades are not used, since the passage has another one further on for the same "
        "query; the last one counts\n"
    )


def test_what_the_rows_do_not_use_is_a_warning(tmp_path: Path, tokenizer_folder: Path, capsys):
    twice = {"query": "q", "passages": [{"text": "t", "grade": n, "id": str(n)} for n in range(3)]}
    data = make_data([rows_in(tmp_path / "in", [twice])], size=2, by="most_relevant")
    prepare(data, tokenizer_folder, tmp_path / "run")
    assert capsys.readouterr().err.splitlines() == [
        "warning: data.group: 1 passages are in no group: those after 2 of a query",
        "warning: data.sources: 1 of 1 queries have a text twice, under two ids; ids mean the same within a folder or "
        "dataset only",
    ]
