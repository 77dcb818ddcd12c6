"""Pairs are tokenised once, by content: what makes a new store, what does not, and who may share one."""

import json
import os
import shutil
from pathlib import Path

import pytest

from toolkit.data.pair_records import read_pairs
from toolkit.data.pairs import PairStore
from toolkit.data.text_store import text_key
from toolkit.data.tokens import tokenize
from toolkit.data.train_tokenizer import train_tokenizer
from toolkit.models.backbone import load_tokenizer
from toolkit.prepare import pairs as module
from toolkit.prepare.pairs import prepare_pairs
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.models import BuildTokenizer, EncoderSettings
from toolkit.recipe.pairs import PairsData

ROWS = [{"query": f"query {i}", "positive": f"good {i}", "negative": f"bad {i % 3}"} for i in range(10)]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    settings = BuildTokenizer(vocab_size=300, pieces="text")
    train_tokenizer(settings, iter(["query good bad"])).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300}))
    return folder


def write_rows(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_data(*sources: dict) -> PairsData:
    written = [{"format": "pairs"} | source for source in sources]
    return PairsData.model_validate({"sources": written, "mix": "rows" if len(sources) > 1 else None})


def make_encoder(**changes) -> EncoderSettings:
    settings = {"pooling": "eos", "normalize": True, "append_eos": True, "query_prefix": "q: ", "passage_prefix": "p: "}
    return EncoderSettings.model_validate(settings | {"max_tokens": 12, "eval_max_tokens": 12} | changes)


def prepare(data: PairsData, tokenizer: Path, run: Path, seed: int = 0, **encoder) -> PairStore:
    return prepare_pairs(data, make_encoder(**encoder), tokenizer, run, seed)


def stores(run: Path) -> set[str]:
    """Names in the cache; nothing half-written may be left there."""
    names = {path.name for path in (run.parent / "prepared").iterdir()}
    assert not [name for name in names if name.startswith(".")]
    return {name for name in names if name.startswith("pairs_")}


def test_ids_are_those_of_tokenize_with_each_source_s_prefixes(tmp_path: Path, tokenizer_folder: Path, capsys):
    first = write_rows(tmp_path / "a", [*ROWS, {"query": "", "positive": "x", "negative": None}])
    second = write_rows(
        tmp_path / "b", [{"query": "query 3", "positive": "good 3 and so much more text", "negative": None}]
    )
    own = {"query_prefix": "ask: ", "passage_prefix": ""}
    data = make_data({"folder": str(first)}, {"folder": str(second), **own})
    store = prepare(data, tokenizer_folder, tmp_path / "run")
    tokenizer = load_tokenizer(tokenizer_folder)

    def ids(prefix: str, texts: list[str]) -> list[list[int]]:
        return tokenize(tokenizer, texts, prefix, 12, append_eos=True)

    assert store.sizes == [10, 1]
    for row, record in enumerate([*ROWS, {"query": "query 3", "positive": "good 3 and so much more text"}]):
        prefixes = ("q: ", "p: ") if row < 10 else ("ask: ", "")
        assert [store.query[store.query_of_row[row]].tolist()] == ids(prefixes[0], [record["query"]])
        assert [store.document[n].tolist() for n in store.positives[row]] == ids(prefixes[1], [record["positive"]])
        assert len(store.document[store.positives[row][0]]) <= 12
    assert len(store.document) == 10 + 3 + 1  # "bad 0" to "bad 2" once each
    said = capsys.readouterr().out
    tokens = len(store.query.ids) + len(store.document.ids)
    assert said == (
        "data: 12 rows, 1 of them without text; 11 pairs, 11 queries, 14 documents, "
        "10 hard negatives (data.negatives of a row are used), "
        f"digest {store.digest}, {tokens} tokens\n"
    )
    prepare(data, tokenizer_folder, tmp_path / "run")
    assert capsys.readouterr().out == ""


def test_a_second_run_reads_no_data_and_another_run_beside_it_neither(tmp_path: Path, tokenizer_folder: Path):
    folder = write_rows(tmp_path / "in", ROWS)
    data, path = make_data({"folder": str(folder)}), folder / "rows.jsonl"
    first = prepare(data, tokenizer_folder, tmp_path / "run")
    times, size = path.stat(), path.stat().st_size
    path.write_bytes(b"\xff" * size)  # whoever reads this fails
    with pytest.raises(RecipeError, match="UTF-8"):
        prepare(data, tokenizer_folder, tmp_path / "run")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    for run in ("run", "other"):
        assert prepare(data, tokenizer_folder, tmp_path / run).digest == first.digest
    with pytest.raises(RecipeError, match="UTF-8"):  # elsewhere nothing is remembered
        prepare(data, tokenizer_folder, tmp_path / "elsewhere" / "run")


def test_equal_content_shares_a_store_whatever_its_time_and_place(tmp_path: Path, tokenizer_folder: Path, monkeypatch):
    folder = write_rows(tmp_path / "in", ROWS)
    prepare(make_data({"folder": str(folder)}), tokenizer_folder, tmp_path / "run")
    shutil.copytree(folder, tmp_path / "copy")
    os.utime(folder / "rows.jsonl", ns=(1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_pairs", None)  # writing again would fail
        for place in (folder, tmp_path / "copy"):
            data = make_data({"folder": str(place), "weight": 0.5})
            prepare(data.model_copy(update={"negatives": 3}), tokenizer_folder, tmp_path / "run", seed=8)
        with pytest.raises(TypeError):  # the control
            prepare(make_data({"folder": str(folder)}), tokenizer_folder, tmp_path / "run", max_tokens=11)
    assert len(stores(tmp_path / "run")) == 1


def test_changed_content_of_equal_size_is_noticed(tmp_path: Path, tokenizer_folder: Path):
    folder = write_rows(tmp_path / "in", ROWS)
    data, path = make_data({"folder": str(folder)}), folder / "rows.jsonl"
    first = prepare(data, tokenizer_folder, tmp_path / "run")
    size = path.stat().st_size
    path.write_text(path.read_text().replace("good 7", "fair 7"))
    assert path.stat().st_size == size
    second = prepare(data, tokenizer_folder, tmp_path / "run")
    assert second.digest != first.digest
    assert text_key("fair 7", b"document") in second.document_key and len(stores(tmp_path / "run")) == 2


def test_whatever_changes_the_ids_makes_another_store(tmp_path: Path, tokenizer_folder: Path):
    folder = write_rows(tmp_path / "in", ROWS)
    data, run = make_data({"folder": str(folder)}), tmp_path / "run"
    settings = BuildTokenizer(vocab_size=310, pieces="text")
    other = tmp_path / "tokenizer"
    train_tokenizer(settings, iter(["query query good good bad bad"] * 9)).save_pretrained(other)
    shutil.copy(tokenizer_folder / "config.json", other)
    first = prepare(data, tokenizer_folder, run)
    second = prepare(data, other, run)
    assert first.query.ids.tolist() != second.query.ids.tolist() and first.digest == second.digest
    prepare(data, tokenizer_folder, run, query_prefix="")
    prepare(data, tokenizer_folder, run, passage_prefix="")
    prepare(data, tokenizer_folder, run, append_eos=False)
    prepare(data, tokenizer_folder, run, max_tokens=5)
    prepare(make_data({"folder": str(folder), "query_prefix": "ask: "}), tokenizer_folder, run)
    prepare(make_data({"folder": str(folder), "fields": {"negatives": []}}), tokenizer_folder, run)
    assert len(stores(run)) == 8
    prepare(make_data({"folder": str(folder), "query_prefix": "q: "}), tokenizer_folder, run)  # the encoder's own
    shutil.copytree(tokenizer_folder, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("x")  # a model's folder holds more than its tokenizer
    prepare(data, tmp_path / "model", run)
    assert len(stores(run)) == 8


def test_a_limit_is_drawn_by_the_seed_and_a_larger_one_holds_a_smaller(tmp_path: Path, tokenizer_folder: Path):
    rows = [{"query": f"query {i}", "positive": "good", "negative": None} for i in range(200)]
    folder = write_rows(tmp_path / "in", [{"query": "", "positive": "", "negative": None}, *rows])
    number = {text_key(row["query"], b"query"): i for i, row in enumerate(rows)}

    def drawn(limit: int, seed: int, *before: dict) -> list[int]:
        data = make_data(*before, {"folder": str(folder), "limit": limit})
        store = prepare(data, tokenizer_folder, tmp_path / "run", seed=seed)
        assert store.sizes[-1] == limit
        return [number[key] for key in store.query_key[store.query_of_row[-limit:]].tolist()]

    few, some, most = drawn(8, 1), drawn(32, 1), drawn(128, 1)
    assert set(few) < set(some) < set(most) and few == sorted(few)
    assert few == drawn(8, 1) and not set(drawn(8, 2)) <= set(some)
    assert few != list(range(8)) and few != drawn(8, 1, {"folder": str(folder), "limit": 8})
    assert drawn(200, 1) == list(range(200))
    with pytest.raises(RecipeError, match=r"data\.sources\.0\.limit: 201 rows are more than the source's 200; lower"):
        drawn(201, 1)


def test_bad_data_is_one_line_and_leaves_nothing(tmp_path: Path, tokenizer_folder: Path):
    good = {"folder": str(write_rows(tmp_path / "good", ROWS))}
    empty = {"folder": str(write_rows(tmp_path / "empty", [{"query": " ", "positive": "x"}] * 2))}
    broken = {
        "folder": str(write_rows(tmp_path / "broken", [{"query": "a", "positive": "b"}, {"query": 3, "positive": ""}]))
    }
    run = tmp_path / "run"
    for sources, problem in (
        ([good, empty], r"^data\.sources\.1: no pair in 2 rows; name a source that holds some$"),
        ([empty | {"limit": 1}], r"^data\.sources\.0: no pair in 2 rows"),
        ([good, broken], r"rows\.jsonl: line 2: 'query' holds the number 3"),
        ([{"folder": str(tmp_path / "none")}], "does not exist"),
    ):
        with pytest.raises(RecipeError, match=problem):
            prepare(make_data(*sources), tokenizer_folder, run)
        assert stores(run) == set()
    assert len(prepare(make_data(good), tokenizer_folder, run)) == 10
    shutil.copy(tokenizer_folder / "config.json", tmp_path / "good")
    with pytest.raises(RecipeError, match=r"^start: .*tokenizer"):
        prepare(make_data(good), tmp_path / "good", run)


def test_of_two_runs_that_write_at_once_the_second_throws_its_own_away(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch
):
    data = make_data({"folder": str(write_rows(tmp_path / "in", ROWS))})
    real, inner = module.write_pairs, []

    def overtaken(*arguments):
        if not inner:  # the other run begins later and is done first
            inner.append(None)
            inner[0] = prepare(data, tokenizer_folder, tmp_path / "other")
        return real(*arguments)

    monkeypatch.setattr(module, "write_pairs", overtaken)
    store = prepare(data, tokenizer_folder, tmp_path / "run")
    assert len(stores(tmp_path / "run")) == 1
    assert store.digest == inner[0].digest and inner[0].query[9].tolist() == store.query[9].tolist()


def test_files_that_change_while_they_are_read_are_refused(tmp_path: Path, tokenizer_folder: Path, monkeypatch):
    folder = write_rows(tmp_path / "in", ROWS)
    data, run = make_data({"folder": str(folder)}), tmp_path / "run"

    def growing(*arguments):
        yield from read_pairs(*arguments)
        write_rows(folder, [*ROWS, *ROWS])

    with monkeypatch.context() as patch:
        patch.setattr(module, "read_pairs", growing)
        with pytest.raises(RecipeError, match=r"folder: .* changed while it was read; start again when it is done"):
            prepare(data, tokenizer_folder, run)
    assert stores(run) == set()
    assert len(prepare(data, tokenizer_folder, run)) == 20


def test_a_damaged_store_is_named(tmp_path: Path, tokenizer_folder: Path):
    data, run = make_data({"folder": str(write_rows(tmp_path / "in", ROWS))}), tmp_path / "run"
    prepare(data, tokenizer_folder, run)
    path = tmp_path / "prepared" / stores(run).pop() / "query.ids"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(RecipeError, match=r"query\.ids: \d+ bytes, not \d+; delete the folder"):
        prepare(data, tokenizer_folder, run)


NONE = {"query": "query x", "positive": "good x", "negative": None}


def asking(negatives: int, *sources: dict) -> PairsData:
    return make_data(*sources).model_copy(update={"negatives": negatives})


def test_negatives_that_no_row_has_are_an_error(tmp_path: Path, tokenizer_folder: Path):
    folder = write_rows(tmp_path / "in", [NONE | {"query": f"query {i}", "hard_negs": ["bad"]} for i in range(300)])
    for _ in range(2):  # the second time from the cache
        with pytest.raises(RecipeError, match=r"^data\.negatives: 2 are asked for, but no row of .* any; did you mean"):
            prepare(asking(2, {"folder": str(folder)}), tokenizer_folder, tmp_path / "run")
    named = asking(2, {"folder": str(folder), "fields": {"negatives": ["hard_negs"]}})
    assert prepare(named, tokenizer_folder, tmp_path / "run").meta["hard_negatives"] == 300
    assert len(prepare(make_data({"folder": str(folder)}), tokenizer_folder, tmp_path / "run")) == 300


def test_rows_with_too_few_negatives_are_a_warning_for_each_source(tmp_path: Path, tokenizer_folder: Path, capsys):
    some = write_rows(tmp_path / "some", [*ROWS[:6], *[NONE | {"query": f"query {i}"} for i in range(2)]])
    full, none = write_rows(tmp_path / "full", ROWS), write_rows(tmp_path / "none", [NONE])
    data = asking(1, *({"folder": str(folder)} for folder in (some, full, none)))
    for _ in range(2):
        prepare(data, tokenizer_folder, tmp_path / "run")
        assert capsys.readouterr().err.splitlines() == [
            "warning: data.sources.0: 2 of 8 rows (25.0%) have fewer than data.negatives = 1, 2 of them none (at most "
            "1); their slots stay empty",
            "warning: data.sources.2: 1 of 1 rows (100.0%) have fewer than data.negatives = 1, 1 of them none (at most "
            "0); their slots stay empty",
        ]
    prepare(data.model_copy(update={"positives": 2, "negatives": 0}), tokenizer_folder, tmp_path / "run")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all("have fewer than data.positives = 2 (at most 1)" in line for line in said)


def test_ids_without_an_embedding_are_in_no_pair(tmp_path: Path, tokenizer_folder: Path):
    """The padding token is text like any other where the model has no embedding for it; another model's store is."""
    folder = tmp_path / "model"
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.add_special_tokens({"pad_token": "<PADX>"})
    tokenizer.split_special_tokens = False
    beyond, rows = tokenizer.pad_token_id, len(tokenizer) - 1
    tokenizer.save_pretrained(folder)
    rows_in = write_rows(tmp_path / "in", [{"query": "query <PADX>", "positive": "good <PADX>", "negative": None}])
    found = []
    for count in (rows + 1, rows):
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": count}))
        store = prepare(make_data({"folder": str(rows_in)}), folder, tmp_path / "run", max_tokens=24)
        found.append([beyond in texts.ids for texts in (store.query, store.document)])
        assert max(store.query.ids) < count and max(store.document.ids) < count
    assert found == [[True, True], [False, False]] and len(stores(tmp_path / "run")) == 2
