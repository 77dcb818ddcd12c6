"""Passages written by several ranks: each query once, the same files as by one, another number of ranks goes on."""

import json
from pathlib import Path

import pytest
from distributed import pooled, run_python
from tiny_retriever import CASES, make

from toolkit.generate.written import finished

WORKER = "tests/workers/generating_ranks.py"
FILES = ("corpus.jsonl", "queries.jsonl", "passages.jsonl", "qrels/train.tsv")


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"_id": f"q{i}", "text": f"how is number {i}"}) + "\n" for i in range(11)))
    return path


def given(queries: Path, output: Path, *more: str) -> list[str]:
    return ["passages", "--queries", str(queries), "--output", str(output), "--seed", "1", "--model", "m", *more]


def asked(output: Path) -> dict[int, list[str]]:
    return {rank: path.read_text().split() for rank in range(2) if (path := Path(f"{output}.asked_{rank}")).is_file()}


def test_ranks_share_the_queries_and_write_the_same(queries: Path, tmp_path: Path):
    """A rank that fails says so; what the ranks have finished is not asked again, by one rank or by two."""
    one, two = tmp_path / "one", tmp_path / "two"
    alone = run_python(WORKER, *given(queries, one))
    assert alone.returncode == 0, alone.stderr
    failed = pooled(WORKER, 2, *given(queries, two, "--fail"))
    assert failed.returncode == 2
    assert "rank 1: error: the device of this rank is gone; look after it" in failed.stderr
    done = set(finished(two))
    assert 0 < len(done) < 11
    before = asked(two)
    export = make(CASES["bert_full"], tmp_path / "base").write(tmp_path / "export")
    gone_on = pooled(WORKER, 2, *given(queries, two, "--check-by", str(export), "--check-by", "bm25"))
    assert gone_on.returncode == 0, gone_on.stdout + gone_on.stderr
    later = [name for rank, names in asked(two).items() for name in names[len(before.get(rank, [])) :]]
    assert sorted(later) == sorted({f"q{i}" for i in range(11)} - done)
    assert all(len(names) > 1 for names in asked(two).values())
    assert gone_on.stdout.count("written to ") == 1
    for name in FILES:
        assert (two / name).read_bytes() == (one / name).read_bytes()
    found = json.loads((two / "generated.json").read_text())
    assert [order["by"] for order in found["order"]] == [str(export), "BM25 (english)"]
    assert len({json.dumps(order) for order in found["order"]}) == 2 and found["counts"]["queries"] == 11
    last = run_python(WORKER, *given(queries, two))
    assert last.returncode == 0 and "all 11 queries are finished; nothing is asked" in last.stdout
