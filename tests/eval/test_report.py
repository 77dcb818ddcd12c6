"""The report: the table, its differences, the curves, and results that must not be compared."""

import json
from pathlib import Path

import numpy as np
import pytest
from beir import write_beir
from retrievers import tiny_retriever

from eval.evaluate import evaluate, evaluate_bm25
from eval.report import ReportRow, plot_curves, write_report
from eval.significance import compare

EXPECTATION = "At this size stage 0 learns to spell and stage 1 gains little."
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Results of BM25 and of five retrievers on one collection, and a log."""
    run, suite = tmp_path / "tiny", str(write_beir(tmp_path / "small"))
    evaluate_bm25([suite], run / "bm25")
    for place, prefix in enumerate(("w1 ", "w2 ", "w3 ", "w4 ", "w5 ")):
        evaluate(tiny_retriever(passage_prefix=prefix), [suite], run / f"s{place}", label=prefix, step=place)
    log = [
        {"stage": stage, "step": step, "loss": 5 - step / 10, "lr": 1e-3, "note": "text"}
        | ({"gain": 0.1} if stage == "b" else {})
        for stage in ("a", "b")
        for step in range(1, 9)
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return run


def rows(run: Path) -> list[ReportRow]:
    folders = {"BM25": "bm25", "untrained": "s0", "after stage 0": "s1", "after stage 1": "s2"}
    return [
        ReportRow(label, run / name, "untrained" if label.startswith("after") else None)
        for label, name in folders.items()
    ]


def ndcg(folder: Path) -> np.ndarray:
    return np.array(list(json.loads((folder / "per_query.json").read_text())["small:test"]["ndcg_at_10"].values()))


def test_report(run: Path, capsys):
    write_report(run, rows(run), {"adapter": run / "stage_1_b" / "export"}, EXPECTATION)
    text = (run / "report.md").read_text()
    lines = text.splitlines()
    assert lines[:5] == ["# tiny", "", EXPECTATION, "", "## small:test: 60 documents, 6 queries"]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert table[0][:4] == ["", "nDCG@10", "Recall@100", "MRR@10"]
    assert [row[0] for row in table[2:]] == ["BM25", "untrained", "after stage 0", "after stage 1"]
    folders = [row.eval_folder for row in rows(run)]
    for row, folder, before in zip(table[2:], folders, [None, *folders], strict=False):
        metrics = json.loads((folder / "metrics.json").read_text())["collections"]["small:test"]
        assert row[1:4] == [f"{metrics[key]:.4f}" for key in ("ndcg_at_10", "recall_at_100", "mrr_at_10")]
        if before is None:
            assert row[4:] == ["", ""]
        else:
            change = compare(ndcg(before), ndcg(folder), seed=0)
            assert row[4] == f"{change.difference:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"
            assert row[5] == f"{change.p_value:.3f}"
    against = [line for line in lines if " against " in line and line.startswith("- ")]
    assert [line.split(":")[0] for line in against] == [
        "- after stage 1 against BM25", "- after stage 1 against untrained", "- after stage 1 against after stage 0"
    ]  # fmt: skip
    change = compare(ndcg(run / "s0"), ndcg(run / "s2"), seed=0)
    assert f"{change.difference:+.4f} [{change.low:+.4f}, {change.high:+.4f}]" in against[1]
    assert "![a](curves/a.png)" in text
    assert f"- adapter: `{run / 'stage_1_b' / 'export'}`" in text
    printed = capsys.readouterr().out
    assert EXPECTATION in printed
    assert "after stage 1 against untrained" in printed
    assert table[5][1] in printed


def comparisons(run: Path) -> list[str]:
    lines = (run / "report.md").read_text().splitlines()
    return [line.removeprefix("- ") for line in lines if " against " in line]


def test_every_trained_row_is_compared_with_its_start(run: Path):
    """In the table if the start is the row above, else below it; the last row is compared with all, nothing twice."""
    second = [ReportRow("untrained (stage 2)", run / "s3", None)]
    second.append(ReportRow("after stage 2", run / "s4", "untrained (stage 2)"))
    write_report(run, rows(run) + second, {}, EXPECTATION)
    assert [line.split(":")[0] for line in comparisons(run)] == [
        "after stage 1 against untrained",
        *(f"after stage 2 against {row.label}" for row in [*rows(run), second[0]]),
    ]
    change = compare(ndcg(run / "s0"), ndcg(run / "s2"), seed=0)
    interval = f"{change.difference:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"
    assert comparisons(run)[0].split(": ")[1].startswith(f"{interval}, p {change.p_value:.3f}; {change.wins} queries")


def test_one_query_gives_no_difference(run: Path, tmp_path: Path):
    suite = write_beir(tmp_path / "one")
    judgements = (suite / "qrels" / "test.tsv").read_text().splitlines(keepends=True)
    (suite / "qrels" / "test.tsv").write_text("".join(judgements[:2]))
    for place in range(2):
        evaluate(tiny_retriever(), [str(suite)], run / f"s{place}", label="", step=None)
    write_report(run, [ReportRow("untrained", run / "s0", None), ReportRow("after", run / "s1", "untrained")], {}, "")
    table = [line.split("|")[1:-1] for line in (run / "report.md").read_text().splitlines() if line.startswith("|")]
    assert [[bool(cell.strip()) for cell in row] for row in table[2:]] == [[True] * 4 + [False] * 2] * 2
    assert "1 queries" in (run / "report.md").read_text() and comparisons(run) == []


def test_report_is_a_function_of_the_results(run: Path):
    write_report(run, rows(run), {}, EXPECTATION)
    first = (run / "report.md").read_text()
    write_report(run, rows(run), {}, EXPECTATION)
    assert (run / "report.md").read_text() == first


def test_curves(run: Path):
    paths = plot_curves(run)
    assert [path.relative_to(run).as_posix() for path in paths] == ["curves/a.png", "curves/b.png"]
    assert all(path.read_bytes().startswith(PNG) for path in paths)
    assert len(list((run / "curves").iterdir())) == 2
    (run / "log.jsonl").unlink()
    assert plot_curves(run) == []


def test_results_on_different_data_are_not_compared(run: Path):
    path = run / "s1" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["collections"]["small:test"]["revision"] = "other"
    path.write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match="small:test: untrained and after stage 0 scored different data"):
        write_report(run, rows(run), {}, EXPECTATION)
