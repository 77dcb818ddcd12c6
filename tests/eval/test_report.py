"""The report: its tables, what is compared with what, queries, costs, plots, and results that must not be compared."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from beir import write_beir
from retrievers import tiny_retriever

from eval.compare import FOOTNOTE
from eval.evaluate import evaluate, evaluate_bm25
from eval.queries import code, most_changed
from eval.report import Origin, ReportRow, TrainingRow, write_report
from eval.significance import compare, holm
from eval.tables import markdown_table
from eval.training_log import cost, read_log

EXPECTATION = "At this size stage 0 learns to spell and stage 1 gains little."
ENVIRONMENT = {
    "command": "deepspeed launcher/run.py r.json", "python": "3.11", "platform": "Linux", "world_size": 2,
    "device": "cpu", "versions": {"torch": "2.0"},
}  # fmt: skip
PNG = b"\x89PNG\r\n\x1a\n"
LABELS = {"BM25": "bm25", "untrained": "s0", "0 a": "s1", "1 b": "s2"}


def log_line(stage: str, step: int, **more: Any) -> dict[str, Any]:
    numbers = {"loss": 5 - step / 10, "tokens": 100, "tokens_per_s": 50.0, "device_s": 4.0, "flops": 1e9}
    return {"stage": stage, "step": step, "note": "text", "peak_memory_gib": step / 10} | numbers | more


class Written(NamedTuple):
    """A report, not to be changed."""

    run: Path
    text: str
    printed: str


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Results of BM25 and of three retrievers on two collections, a log, and their report."""
    folder = tmp_path_factory.mktemp("whole")
    run, suite = folder / "tiny", str(write_beir(folder / "small"))
    suites = [suite, f"{suite}:dev"]
    evaluate_bm25(suites, run / "bm25")
    for place, prefix in enumerate(("w1 ", "w2 ", "w3 ")):
        evaluate(tiny_retriever(passage_prefix=prefix), suites, run / f"s{place}", label=prefix, step=place)
    path = run / "s2" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"groups": {}}))  # as of a single collection
    log = [log_line(stage, step) for stage in ("a", "b") for step in range(1, 51)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        text = write(run, rows(run), stopped="stage 1 is worse")
    return Written(run, text, printed.getvalue())


@pytest.fixture
def run(whole: Written, tmp_path: Path) -> Path:
    """The same to change, without a report."""
    shutil.copytree(whole.run.parent, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "tiny" / "plots")
    return tmp_path / "tiny"


def rows(run: Path) -> list[ReportRow]:
    against = {"BM25": [], "untrained": [], "0 a": ["BM25", "untrained"], "1 b": ["BM25", "untrained", "0 a"]}
    return [
        ReportRow(label, run / name, "" if label == "BM25" else "untrained", against[label])
        for label, name in LABELS.items()
    ]


def training(**changes: Any) -> list[TrainingRow]:
    done = {"rows": 1_000, "steps": 50, "ranks": 2, "device": "GPU", "flops_rule": "retriever 6N"} | changes
    return [TrainingRow("0 a", "a", 8, done), TrainingRow("1 b", "b", 16, done)]


def write(run: Path, given: list[ReportRow], stages: list[TrainingRow] | None = None, stopped: str = "") -> str:
    paths = {"adapter": run / "stage_1_b" / "export", "elsewhere": Path("/elsewhere")}
    origin = Origin(paths, ENVIRONMENT, "6ND rule")
    write_report(run, given, training() if stages is None else stages, origin, EXPECTATION, stopped)
    return (run / "report.md").read_text()


def tables(text: str) -> dict[str, list[list[str]]]:
    """Heading above -> cells, header first."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("| "):
            found.setdefault(heading, []).append([cell.strip() for cell in line.split("|")[1:-1]])
    return {heading: [cells[0], *cells[2:]] for heading, cells in found.items()}


def ndcg(run: Path, label: str, collection: str) -> np.ndarray:
    per_query = json.loads((run / LABELS[label] / "per_query.json").read_text())
    return np.array(list(per_query[collection]["ndcg_at_10"].values()))


def test_scores_of_every_system(whole: Written) -> None:
    run = whole.run
    found = tables(whole.text)
    metrics = [json.loads((run / name / "metrics.json").read_text())["collections"] for name in LABELS.values()]
    for title, key in (("nDCG@10", "ndcg_at_10"), ("Recall@100", "recall_at_100"), ("MRR@10", "mrr_at_10")):
        header, *body, mean = found[title]
        means = [np.mean([system[name][key] for name in ("small:test", "small:dev")]) for system in metrics]
        assert mean == ["mean: local", "", "", *(f"{value:.4f}" for value in means[:3]), ""]
        assert header == ["collection", "documents", "queries", *LABELS]
        assert body == [
            [name, "60", str(count), *(f"{system[name][key]:.4f}" for system in metrics)]
            for name, count in (("small:test", 6), ("small:dev", 5))
        ]
    printed = whole.printed
    for cell in (EXPECTATION, found["nDCG@10"][1][3], "0 a against", "Training", "/elsewhere"):
        assert cell in printed


def test_every_stage_is_compared_with_its_others(whole: Written) -> None:
    """A family is the two collections of a pair; the figures are those of the plain functions."""
    run = whole.run
    text = whole.text
    found = tables(text)
    assert found.keys() >= {"0 a against", "1 b against"} and FOOTNOTE in text
    for row in rows(run)[2:]:
        _, *body = found[f"{row.label} against"]
        names = ("small:test", "small:dev")
        assert [cells[:2] for cells in body] == [[other, name] for other in row.against for name in names]
        for other in row.against:
            changes = [compare(ndcg(run, other, name), ndcg(run, row.label, name), seed=0) for name in names]
            corrected = holm([change.p_value for change in changes])
            for change, p_holm, cells in zip(changes, corrected, (c for c in body if c[0] == other), strict=True):
                smallest = "" if change.smallest is None else f"{change.smallest:.4f}"
                assert cells[2:] == [
                    f"{change.difference:+.4f} [{change.low:+.4f}, {change.high:+.4f}]", f"{change.p_value:.3f}",
                    f"{p_holm:.3f}", f"{change.wins}/{change.ties}/{change.losses}", smallest,
                ]  # fmt: skip


def test_queries_that_changed_most(whole: Written) -> None:
    """Of the last system against the one named last, with both rankings; documents with a judgement are marked."""
    run = whole.run
    text = whole.text
    before, after = ndcg(run, "0 a", "small:test"), ndcg(run, "1 b", "small:test")
    best, worst = int((after - before).argmax()), int((after - before).argmin())
    assert after[best] > before[best] and after[worst] < before[worst]
    queries = [json.loads(line)["text"] for line in (run.parent / "small" / "queries.jsonl").read_text().splitlines()]
    for kind, place in (("gained", best), ("lost", worst)):
        head = f"**{kind}** `{queries[5 + place]}`: nDCG@10 {before[place]:.4f} → {after[place]:.4f}"
        assert head in text
        block = text[text.index(head) :].split("\n\n")[1].splitlines()
        assert len(block) == 2 + 5 and [cell.strip() for cell in block[0].split("|")[2:4]] == ["0 a", "1 b"]
        for column, label in ((2, "0 a"), (3, "1 b")):
            trec = (run / LABELS[label] / "rankings" / "small_test.trec").read_text().splitlines()
            ids = [line.split()[2] for line in trec if line.startswith(f"q{5 + place} ")][:5]
            marks = {f"d{5 + place}": "✓2 ", f"d{25 + place}": "✓ "}
            corpus = [json.loads(line) for line in (run.parent / "small" / "corpus.jsonl").read_text().splitlines()]
            texts = {row["_id"]: f"{row['title']} {row['text']}".strip() for row in corpus}
            cells = [line.split("|")[column].strip() for line in block[2:]]
            assert cells == [marks.get(d, "") + f"`{texts[d]}`" for d in ids]
    assert text.count("<details>") == text.count("</details>") == 2 + 2  # two collections, the scalars of two stages


def test_most_changed_has_no_query_twice_and_none_that_stayed(whole: Written) -> None:
    run = whole.run
    from eval.compare import read_system

    before, after = (read_system(run / LABELS[label], label) for label in ("0 a", "1 b"))
    gained, lost = most_changed(before, after, "small:test")
    assert all(row.after > row.before for row in gained) and all(row.after < row.before for row in lost)
    assert not {row.query for row in gained} & {row.query for row in lost}
    assert most_changed(after, after, "small:test") == ([], [])


def test_texts_cannot_break_the_markdown() -> None:
    assert code("a `b` | c") == "`a 'b' | c`"
    line = markdown_table(("x", "y"), [(code("a | b"), "1")])[2]
    assert line == "| `a \\| b` |   1 |"


def test_costs_are_sums_over_steps(whole: Written) -> None:
    """Per stage and in all: tokens, operations, device-hours; speeds follow from them."""
    run = whole.run
    header, first, second, total = tables(whole.text)["Training"]
    assert header[:7] == ["stage", "rows in the data", "rows seen", "tokens", "FLOPs", "device-hours", "devices"]
    assert first == [
        "0 a", "1,000", "400", "5,000", "5.00e+10", f"{200 / 3600:.3g}", "2 x GPU", "50", "2.50e+08", "5.0"
    ]  # fmt: skip
    assert second[2:4] == ["800", "5,000"]
    assert total[:6] == ["all stages", "", "1,200", "10,000", "1.00e+11", f"{400 / 3600:.3g}"]
    assert "- 0 a: retriever 6N" in (run / "report.md").read_text()


def test_a_number_that_a_step_lacks_is_not_summed(run: Path) -> None:
    lines = (run / "log.jsonl").read_text().splitlines()
    short = json.loads(lines[3])
    del short["flops"]
    (run / "log.jsonl").write_text("\n".join([*lines[:3], json.dumps(short), *lines[4:]]) + "\n")
    log = read_log(run)
    assert cost(log["a"]) == (5_000, None, 200.0, 5.0) and cost(log["b"]).flops == 50e9
    _, first, second, total = tables(write(run, rows(run)))["Training"]
    assert (first[4], second[4], total[4]) == ("", "5.00e+10", "") and total[3] == "10,000"


def test_plots_and_their_links(whole: Written) -> None:
    run = whole.run
    text = whole.text
    names = ["loss", "scalars_0_a", "scalars_1_b", "scores", "throughput"]
    assert sorted(path.stem for path in (run / "plots").iterdir()) == names
    for name in names:
        assert (run / "plots" / f"{name}.png").read_bytes().startswith(PNG)
        assert text.count(f"](plots/{name}.png)") == 1


def test_the_page_for_a_browser(run: Path) -> None:
    """The same tables, images and folded blocks; texts of the collection are no markup there either."""
    path = run.parent / "small" / "queries.jsonl"
    queries = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"text": "<b>x</b> | " + row["text"]}) + "\n" for row in queries))
    for name, prefix in (("s1", "w2 "), ("s2", "w3 ")):
        evaluate(tiny_retriever(passage_prefix=prefix), [str(path.parent)], run / name, label="", step=None)
    text = write(run, [ReportRow("a", run / "s1", "a", []), ReportRow("b", run / "s2", "a", ["a"])])
    page = (run / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "<title>tiny</title>" in page
    assert page.count("<table>") == sum(line.startswith("| --") for line in text.splitlines())
    assert page.count("<img ") == text.count("](plots/") and "<details>" in page and "</details>" in page
    assert '<td style="text-align:right">' in page and "td[style*=right]{white-space:nowrap}" in page  # numbers
    assert "<b>" not in page and "<code>&lt;b&gt;x&lt;/b&gt; |" in page


def test_what_a_reader_needs_to_repeat_it(whole: Written) -> None:
    text = whole.text
    assert text.startswith(f"# tiny\n\n> **Stopped.** stage 1 is worse\n\n{EXPECTATION}\n")
    assert "```\ndeepspeed launcher/run.py r.json\n```" in text
    for line in ("machine: 2 x cpu, Linux, Python 3.11", "versions: torch 2.0"):
        assert f"- {line}" in text
    assert "- adapter: `stage_1_b/export`" in text and "- elsewhere: `/elsewhere`" in text


def test_one_query_gives_no_difference(run: Path, tmp_path: Path) -> None:
    suite = write_beir(tmp_path / "one")
    judgements = (suite / "qrels" / "test.tsv").read_text().splitlines(keepends=True)
    (suite / "qrels" / "test.tsv").write_text("".join(judgements[:2]))
    for place in range(2):
        evaluate(tiny_retriever(), [str(suite)], run / f"s{place}", label="", step=None)
    given = [ReportRow("u", run / "s0", "u", []), ReportRow("0 a", run / "s1", "u", ["u"])]
    text = write(run, given)
    assert [cells[:3] for cells in tables(text)["nDCG@10"]] == [
        ["collection", "documents", "queries"],
        ["one:test", "60", "1"],
    ]
    assert "Comparisons" not in text and not (run / "plots" / "scores.png").exists()


def test_a_run_without_collections_or_log(run: Path) -> None:
    (run / "log.jsonl").unlink()
    text = write(run, [], [])
    assert [line for line in text.splitlines() if line.startswith("#")] == ["# tiny", "## How"]


def test_report_is_a_function_of_the_results(whole: Written, run: Path) -> None:
    assert write(run, rows(run), stopped="stage 1 is worse") == whole.text


def test_results_on_different_data_are_not_compared(run: Path) -> None:
    path = run / "s1" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["collections"]["small:test"]["revision"] = "other"
    path.write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match="small:test: BM25 and 0 a scored different data"):
        write(run, rows(run))
