"""Hard negatives of a stage: mined once for what decides them, read in place of its sources."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from beir import write_beir
from distributed import run_on_ranks
from languages import SENTENCES
from tiny_retriever import CASES, make

from toolkit.data.negatives import plain
from toolkit.data.pair_records import read_pairs
from toolkit.prepare import negatives as module
from toolkit.prepare.negatives import with_negatives
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.pairs import FolderPairs, PairsData

WINDOW = {"ranks": [1, 40], "negatives": 2}
BM25: dict[str, Any] = {"by": "bm25", "text": "prose", **WINDOW}
PREVIOUS: dict[str, Any] = {"by": "previous", **WINDOW}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two retrievers."""
    cases = [CASES["bert_full"], CASES["qwen2_full"]]
    return [
        make(case, tmp_path_factory.mktemp("base")).write(tmp_path_factory.mktemp("o") / "export") for case in cases
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_beir(tmp_path / "small")


def data_of(*sources: dict[str, Any], mine: dict[str, Any] | None = BM25) -> PairsData:
    mix = {"mix": "rows"} if len(sources) > 1 else {}
    return PairsData.model_validate_json(json.dumps({"sources": sources, "negatives": 1, "mine": mine, **mix}))


def beir(folder: Path, split: str = "dev", **more: Any) -> dict[str, Any]:
    return {"folder": str(folder), "format": "beir", "split": split, **more}


def rows_of(data: PairsData) -> list[list[Any]]:
    return [list(read_pairs(source, Counter())) for source in data.sources]


def test_without_the_key_the_data_are_as_they_were(folder: Path, tmp_path: Path):
    data = data_of(beir(folder), mine=None)
    assert with_negatives(data, None, tmp_path / "run", 0, "cpu") is data and not (tmp_path / "run").exists()


@pytest.mark.parametrize("mine", [BM25, PREVIOUS], ids=["bm25", "previous"])
def test_every_source_is_mined_over_its_own_passages(mine, folder: Path, exports: list[Path], tmp_path: Path):
    """What another source knows to be a positive of a query is none of its negatives either."""
    query = json.loads((folder / "queries.jsonl").read_text().splitlines()[0])["text"]  # ends in w7
    known = json.loads((folder / "corpus.jsonl").read_text().splitlines()[0])["text"]  # its positive in the folder
    rows = [(query, "w3 w7"), ("w1 w7", "w1 w2 w7"), ("w9 w7", query), ("w4 w7", f"{known.upper()} "), ("w4", "w7  W3")]
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps({"query": q, "positive": p, "worth": 2.0}) + "\n" for q, p in rows))
    second = {
        "folder": str(more), "format": "pairs", "fields": {"weight": "worth"}, "weight": 2.0, "query_prefix": "q: ",
    }  # fmt: skip
    data = data_of(beir(folder, weight=1.0), second, mine=mine)
    found = with_negatives(data, exports[0], tmp_path / "run", 3, "cpu")
    assert found == data.model_copy(update={"sources": found.sources, "mine": None})
    assert [(source.weight, source.query_prefix, source.passage_prefix) for source in found.sources] == [
        (1.0, None, None), (2.0, "q: ", None),
    ]  # fmt: skip
    first, other = rows_of(found)
    plainly = [row[:2] + row[3:] for part in rows_of(data) for row in part]
    assert [row[:2] + row[3:] for row in (*first, *other)] == plainly and other[0].weight == 2.0
    corpus = {plain(f"{r['title']} {r['text']}") for r in map(json.loads, (folder / "corpus.jsonl").open())}
    assert all(len(row.negatives) == 2 and set(map(plain, row.negatives)) <= corpus for row in first)
    assert all({plain(text) for text in row.negatives} <= {plain(text) for _, text in rows} for row in other)
    assert {plain(text) for text in other[0].negatives} == {"w1 w2 w7", "w7 w3"}
    alone = data_of(second, mine=mine | {"negatives": 3})
    ((first_row, *_),) = rows_of(with_negatives(alone, exports[0], tmp_path / "run", 3, "cpu"))
    assert f"{known.upper()} " in first_row.negatives  # control: without the folder nobody knows


def test_negatives_are_mined_once_for_what_decides_them(
    folder: Path, exports: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    run = tmp_path / "run"
    data = {name: data_of(beir(folder), mine=mine) for name, mine in (("bm25", BM25), ("previous", PREVIOUS))}
    sources = [with_negatives(one, exports[0], run, 0, "cpu").sources for one in data.values()]
    assert capsys.readouterr().out.count("data.sources.0: mined: ") == 2
    names = sorted(path.name for path in (run / "prepared").iterdir())
    assert len(names) == 2 and all(name.startswith("mined_") for name in names)
    monkeypatch.setattr(module, "write_mined", None)  # mining them again would fail
    again = [with_negatives(one, exports[0], run, 0, "cpu").sources for one in data.values()]
    weighted = data_of(beir(folder, weight=2.0))
    assert again == sources and isinstance(sources[0][0], FolderPairs)
    assert with_negatives(weighted, exports[1], run, 0, "cpu").sources[0].folder == sources[0][0].folder  # reads none
    moved = write_beir(tmp_path / "moved")
    with_negatives(data_of(beir(moved)), None, run, 0, "cpu")  # the same content elsewhere
    (moved / "corpus.jsonl").write_text((moved / "corpus.jsonl").read_text().replace("w9", "w8"))
    for changed, export, seed in (
        (data["bm25"], exports[0], 1),
        (data["previous"], exports[1], 0),
        (data_of(beir(folder, "test")), None, 0),
        (data_of(beir(folder, limit=2)), None, 0),
        (data_of(beir(moved)), None, 0),
        (data_of(beir(folder), mine=BM25 | {"text": "code"}), None, 0),
        (data_of(beir(folder), mine=BM25 | {"max_share": 0.5}), None, 0),
        (data_of(beir(folder), mine=BM25 | {"language": "none"}), None, 0),
        (data_of(beir(folder, passage_prefix="p: "), mine=PREVIOUS), exports[0], 0),
    ):
        with pytest.raises(TypeError):
            with_negatives(changed, export, run, seed, "cpu")


def test_each_source_is_read_in_its_language(tmp_path: Path, capsys):
    """Rows in Chinese and in German; in one language for both (control) the Chinese queries find nothing."""
    sources = []
    for name, word, asked in (("chinese", "中国", "中国"), ("german", "Das Haus. ", "Häuser")):
        sources.append({"folder": str(tmp_path / f"{name}.jsonl"), "format": "pairs"})
        rows = [{"query": f"{asked} {i}{i}", "positive": word + text} for i, text in enumerate(SENTENCES[name][1])]
        Path(sources[-1]["folder"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = {"by": "bm25", "text": "prose", "ranks": [1, 3], "negatives": 1}

    def by_of(mine: dict[str, Any]) -> list[dict[str, Any]]:
        found = with_negatives(data_of(*sources, mine=mine), None, tmp_path / "run", 0, "cpu").sources
        return [json.loads((Path(source.folder) / "mined.json").read_text())["by"] for source in found]

    assert [by["language"] for by in by_of(wanted)] == ["ngrams", "german"]
    said = capsys.readouterr()
    assert "BM25 reads data.sources.0 as ngrams, " in said.out and "BM25 reads data.sources.1 as german, " in said.out
    assert "finds nothing" not in said.err
    with pytest.raises(RecipeError, match=r"^data\.mine: source 0: no row got a negative: 4 rows have no passage at "):
        by_of(wanted | {"language": "english"})
    said = capsys.readouterr()
    assert "BM25 reads" not in said.out
    expected = (
        "warning: BM25 finds nothing for 4 of 4 queries of data.sources.0: read as english they share no word with "
    )
    assert said.err.startswith(expected) and "data.mine.text and data.mine.language" in said.err


def test_a_limited_source_gives_its_rows_alone(folder: Path, tmp_path: Path):
    found = with_negatives(data_of(beir(folder, limit=2)), None, tmp_path / "run", 0, "cpu")
    (rows,) = rows_of(found)
    assert len(rows) == 2 and found.sources[0].limit is None


def test_a_prefix_of_the_source_is_the_retriever_s(folder: Path, exports: list[Path], tmp_path: Path):
    scores = []
    for number, prefix in enumerate([None, "find: ", "other "]):  # the export's own is "find: "
        data = data_of(beir(folder, query_prefix=prefix), mine=PREVIOUS)
        (source,) = with_negatives(data, exports[0], tmp_path / str(number), 0, "cpu").sources
        assert isinstance(source, FolderPairs) and source.query_prefix == prefix
        scores.append(np.load(Path(source.folder) / "scores.npy", allow_pickle=False))
    np.testing.assert_array_equal(scores[0], scores[1])
    assert not np.array_equal(scores[0], scores[2])


def test_what_cannot_be_mined_is_one_line(folder: Path, exports: list[Path], tmp_path: Path):
    data, run = data_of(beir(folder), mine=BM25 | {"max_score": -1.0}), tmp_path / "run"
    with pytest.raises(RecipeError, match=r"^data\.mine: source 0: no row got a negative: max_score -1 leaves 5 rows"):
        with_negatives(data, None, run, 0, "cpu")
    assert not list((run / "prepared").glob("mined_*"))
    with pytest.raises(RecipeError, match=r"none: is no export \(no export.json\); give"):
        with_negatives(data_of(beir(folder), mine=PREVIOUS), tmp_path / "none", run, 0, "cpu")
    (source,) = with_negatives(data_of(beir(folder)), None, run, 0, "cpu").sources
    assert isinstance(source, FolderPairs)
    path = Path(source.folder) / "pairs.jsonl"
    path.write_text(path.read_text().replace("w1", "w2"))
    with pytest.raises(RecipeError, match=rf"^{path.parent.parent}: is damaged .* delete it, and it is made again$"):
        with_negatives(data_of(beir(folder)), None, run, 0, "cpu")


def test_every_rank_gets_the_same_rows_or_the_same_error(folder: Path, exports: list[Path], tmp_path: Path):
    """Of five and of six rows; the third data give no row a negative."""
    asked = [
        data_of(beir(folder), beir(folder, "test"), mine=PREVIOUS),
        data_of(beir(folder), mine=BM25),
        data_of(beir(folder), mine=BM25 | {"max_score": -1.0}),
    ]
    request = {
        "run": str(tmp_path / "ranks"),
        "export": str(exports[0]),
        "data": [data.model_dump(mode="json") for data in asked],
    }
    one, other = run_on_ranks("negatives_ranks.py", 2, request, tmp_path, timeout=500)
    assert one == other and one[2].startswith("data.mine: source 0: no row got a negative: max_score -1 leaves ")
    for data, answer in zip(asked[:2], one[:2], strict=True):
        here = with_negatives(data, exports[0], tmp_path / "run", 0, "cpu")
        for source, raw in zip(here.sources, json.loads(answer), strict=True):
            assert isinstance(source, FolderPairs) and raw["folder"] != source.folder
            rows = [(Path(place) / "pairs.jsonl").read_bytes() for place in (source.folder, raw["folder"])]
            assert rows[0] == rows[1] and len(rows[0].splitlines()) in (5, 6)
