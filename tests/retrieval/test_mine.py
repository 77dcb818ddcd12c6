"""The command toolkit.mine: from a folder in BEIR layout and from rows, on one rank and on two, and what it refuses."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from beir import write_beir
from distributed import pooled
from languages import write_language
from retrievers import tiny_retriever
from sources import folder_source
from tiny_retriever import CASES, make

from toolkit import mine as module
from toolkit.data.negatives import plain
from toolkit.data.pair_records import PairRecord, read_pairs
from toolkit.export.write import load_export
from toolkit.mine import main
from toolkit.retrieval.embed import checkpoint_digest
from toolkit.retrieval.retrievers import Loaded

WINDOW = ["--ranks", "1", "30", "--negatives", "3", "--seed", "1"]
BM25 = ["bm25", "--text", "prose"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_beir(tmp_path / "small")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(CASES["bert_full"], tmp_path_factory.mktemp("base")).write(tmp_path_factory.mktemp("out") / "export")


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs_of(output: Path) -> list[PairRecord]:
    return list(read_pairs(folder_source(folder=str(output), format="pairs"), Counter()))


def test_a_beir_folder_is_mined_over_its_corpus(folder: Path, tmp_path: Path, capsys):
    output = tmp_path / "mined"
    assert main([*BM25, "--pairs", str(folder), "--split", "dev", "--output", str(output), *WINDOW]) == 0
    rows = pairs_of(output)
    judged = folder_source(folder=str(folder), format="beir", split="dev")
    given = list(read_pairs(judged, Counter()))
    assert [row[:2] for row in rows] == [row[:2] for row in given]
    corpus = {f"{row['title']} {row['text']}".strip() for row in map(json.loads, (folder / "corpus.jsonl").open())}
    beyond = 0
    for row, judged_row in zip(rows, given, strict=True):
        assert len(row.negatives) == 3 and row.negatives[:1] == judged_row.negatives
        assert set(row.negatives) <= corpus and not {plain(t) for t in row.negatives} & {
            plain(t) for t in row.positives
        }
        beyond += len(set(row.negatives) - {text for other in given for text in (*other.positives, *other.negatives)})
    assert beyond > 0  # passages that no row names
    record = json.loads((output / "mined.json").read_text())
    assert record["by"]["bm25"] == "prose" and record["settings"]["ranks"] == [1, 30] and record["seed"] == 1
    assert np.load(output / "scores.npy", allow_pickle=False).shape == (5, 4)
    assert sorted(path.name for path in output.iterdir()) == ["mined.json", "pairs.jsonl", "scores.npy"]
    assert "mined: 10 hard negatives for 5 rows from " in capsys.readouterr().out


def test_rows_are_mined_over_a_corpus_beside_them(tmp_path: Path):
    pairs = write_rows(
        tmp_path / "pairs.jsonl",
        {"query": "a red fish", "pos": ["The red fish swims"]},
        {"query": "a red fish", "pos": ["Fish of red colour"]},
        {"query": "green stones", "pos": ["stones that are green"]},
    )
    more = ["the RED fish  swims", "fish of red colour", "red cars", "fish and chips", "a red fish", "blue stones"]
    corpus = write_rows(tmp_path / "corpus.jsonl", *({"text": text} for text in more))
    arguments = ["--pairs", str(pairs), "--output", str(tmp_path / "a"), *WINDOW]
    assert main([*BM25, *arguments, "--corpus", str(corpus)]) == 0
    expected = [{"red cars", "fish and chips"}, {"red cars", "fish and chips"}, {"blue stones"}]
    assert [set(row.negatives) for row in pairs_of(tmp_path / "a")] == expected  # no copy of a positive, or the query
    main([*BM25, *arguments[:2], "--output", str(tmp_path / "b"), *WINDOW])
    assert not (tmp_path / "b").exists()  # without the corpus no row has a negative


def test_language_and_positive_are_flags_and_written_down(tmp_path: Path, capsys):
    folder = str(write_language(tmp_path / "thai", "thai"))
    arguments = ["--pairs", folder, "--split", "test", "--ranks", "1", "3", "--negatives", "1", "--seed", "1"]

    def mined(name: str, *more: str) -> dict[str, object]:
        assert main([*BM25, *arguments, *more, "--output", str(tmp_path / name)]) == 0
        return json.loads((tmp_path / name / "mined.json").read_text())

    record = mined("detected")
    assert (record["by"]["language"], record["settings"]["language"]) == ("ngrams", None)
    assert "BM25 reads the pairs as ngrams, by its script and function words; --language sets " in (
        capsys.readouterr().out
    )
    arguments[1:4] = [str(write_beir(tmp_path / "small")), "--split", "dev"]
    record = mined("named", "--language", "none", "--max-share", "0.9", "--positive", "mean")
    said = capsys.readouterr()
    assert "BM25 reads" not in said.out
    assert (record["by"]["language"], record["settings"]["language"]) == ("none", "none")
    assert record["settings"]["positive"] == "mean"


def test_one_and_two_ranks_write_the_same_file(folder: Path, export: Path, tmp_path: Path):
    """Six rows over two ranks; another seed draws others (control)."""

    def mined(name: str, *arguments: str, ranks: int = 1) -> bytes:
        given = [*arguments, "--pairs", str(folder), "--split", "test", "--output", str(tmp_path / name), *WINDOW[:-1]]
        seed = "2" if name.startswith("other") else "1"
        if ranks == 1:
            assert main([*given, seed]) == 0
        else:
            done = pooled("--module", ranks, "toolkit.mine", *given, seed, timeout=500)
            assert done.returncode == 0, done.stdout + done.stderr
        return (tmp_path / name / "pairs.jsonl").read_bytes()

    by_retriever = mined("dense", str(export))
    assert mined("dense_of_two", str(export), ranks=2) == by_retriever
    assert mined("other", str(export)) != by_retriever
    scores = [np.load(tmp_path / name / "scores.npy") for name in ("dense", "dense_of_two")]
    np.testing.assert_allclose(*scores, atol=1e-5)
    record = json.loads((tmp_path / "dense_of_two" / "mined.json").read_text())
    assert record["by"]["checkpoint"] == checkpoint_digest(load_export(export, "cpu"))


def test_a_base_model_is_told_how_it_embeds(folder: Path, tmp_path: Path, capsys):
    """The flags that the error asks for, with an adapter and without; those of another prefix change the scores."""
    made = make(CASES["llama_lora"], tmp_path / "base")
    adapter = made.write(tmp_path / "export", merged=False)
    common = ["--pairs", str(folder), "--split", "dev", *WINDOW]
    what = str(made.base.folder)
    assert main([what, *common, "--output", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.endswith("; add --pooling, --normalize, --max-tokens\n")
    how = ["--pooling", "eos", "--normalize", "true", "--max-tokens", "24"]
    scores = {}
    for name, more in (
        ("plain", []),
        ("again", []),
        ("adapter", ["--adapter", str(adapter)]),
        ("query", ["--query-prefix", "find: "]),
        ("passage", ["--passage-prefix", "text: "]),
    ):
        assert main([what, *common, *how, *more, "--output", str(tmp_path / name)]) == 0
        scores[name] = np.load(tmp_path / name / "scores.npy", allow_pickle=False)[:, 0]
    np.testing.assert_array_equal(scores.pop("again"), scores["plain"])
    assert len({tuple(row) for row in scores.values()}) == 4
    by = json.loads((tmp_path / "query" / "mined.json").read_text())["by"]
    assert (by["adapter"], by["settings"]["query_prefix"], by["settings"]["eval_max_tokens"]) == (None, "find: ", 24)
    assert main([str(adapter), *common, "--max-tokens", "9", "--output", str(tmp_path / "own")]) == 0
    assert json.loads((tmp_path / "own" / "mined.json").read_text())["by"]["settings"]["eval_max_tokens"] == 9


def test_what_is_refused_is_one_line(folder: Path, tmp_path: Path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    arguments = {"--pairs": str(folder), "--split": "dev", "--output": str(tmp_path / "out")}
    window = {"--ranks": "1 30", "--negatives": "3", "--seed": "1"}
    cases = [
        (["bm25"], {}, "--text says what bm25 reads, prose or code; give it with bm25 and with nothing else"),
        ([str(tmp_path), "--text", "code"], {}, "--text says what bm25 reads"),
        (
            [*BM25, "--pooling", "eos"],
            {},
            "bm25 has no adapter, prefixes, length, pooling, normalisation or vectors; drop",
        ),
        (
            [*BM25, "--adapter", "x"],
            {},
            "bm25 has no adapter, prefixes, length, pooling, normalisation or vectors; drop",
        ),
        (["x", "--pooling", "max"], {}, "--pooling: Input should be 'eos', 'mean' or 'cls'"),
        (BM25, {"--ranks": "0 5"}, "--ranks: input should be greater than 0"),
        (
            BM25,
            {"--ranks": "4 5"},
            "--ranks: 4 to 5 hold 2 passages, but negatives asks for 3; set ranks to 4 and 6 or more, or ",
        ),
        (
            [str(tmp_path), "--language", "german"],
            {},
            "--language says in which language bm25 reads; give it with bm25",
        ),
        (["bm25", "--text", "code", "--language", "german"], {}, "--language: code is read without a language; leave"),
        ([*BM25, "--language", "klingon"], {}, "--language: input should be 'none', 'ngrams', 'arabic', "),
        (BM25, {"--positive": "lowest"}, "--positive: only max_share and margin count from it; set one of them, or"),
        (BM25, {"--positive": "median"}, "--positive: input should be 'lowest', 'mean' or 'highest'"),
        (BM25, {"--max-share": "1.5"}, "--max-share: input should be less than or equal to 1"),
        (BM25, {"--margin": "-1"}, "--margin: input should be greater than or equal to 0"),
        (
            BM25,
            {"--margin": "99"},
            'no row got a negative: margin 99 (positive "highest") leaves 5 rows none, since all',
        ),
        (BM25, {"--split": "train"}, f"--pairs: {folder} has no qrels/train.tsv; set split to dev or test"),
        (BM25, {"--pairs": str(tmp_path / "none")}, f"--pairs: {tmp_path}/none does not exist; name a folder"),
        (BM25, {"--corpus": str(tmp_path / "none")}, f"--corpus: {tmp_path}/none does not exist; name a folder"),
        (BM25, {"--output": str(taken)}, f"{taken}: is there already; choose another --output, or delete it"),
        (BM25, {"--max-score": "-1"}, "no row got a negative: max_score -1 leaves 5 rows none, since all "),
        ([str(tmp_path)], {}, f"{tmp_path}: is no export (export.json), no sentence-transformers model"),
    ]
    for what, changes, problem in cases:
        given = [word for key, value in (arguments | window | changes).items() for word in (key, *value.split(" "))]
        assert main([*what, *given]) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and error[0].startswith(f"error: {problem}"), error
        assert not (tmp_path / "out").exists() and [path.name for path in taken.iterdir()] == ["file"]


def test_vectors_that_are_not_finite_are_refused(folder: Path, tmp_path: Path, monkeypatch, capsys):
    broken = tiny_retriever()
    broken.encoder.backbone.norm.weight.data[0] = float("nan")
    monkeypatch.setattr(module, "load_any", lambda *_: Loaded(broken, {}))
    given = ["--pairs", str(folder), "--split", "dev", "--output", str(tmp_path / "out"), *WINDOW]
    assert main(["export", *given]) == 2 and "are not finite" in capsys.readouterr().err
    monkeypatch.setattr(module, "load_any", lambda *_: Loaded(tiny_retriever(), {}))
    assert main(["export", *given]) == 0
    shutil.rmtree(tmp_path / "out")
