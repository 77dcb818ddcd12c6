"""The table across stages: report.md, the same in the terminal, and loss curves. Called by the launcher at the end."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from eval.results import MAIN, file_name
from eval.significance import Comparison, compare
from toolkit.files import replace_text

SEED = 0  # of the resampling: the same results give the same report
WIDTH = 108  # columns that the widest row needs
TITLES = ("nDCG@10", "Recall@100", "MRR@10")
HEADER = ("", *TITLES, "difference [95 %]", "p")
FOOTNOTE = (
    "difference: of nDCG@10, to the row above, paired over queries; 95 % percentile bootstrap interval and two-sided "
    "randomisation test, 9,999 resamples each."
)


class ReportRow(NamedTuple):
    label: str
    eval_folder: Path  # with the metrics.json and per_query.json of eval.run
    start: str | None  # label of the model before training that this one goes back to


class Section(NamedTuple):
    """One collection: its table and the comparisons below it."""

    title: str
    rows: list[tuple[str, ...]]
    comparisons: list[str]


class _Scores(NamedTuple):
    label: str
    start: str | None
    metrics: dict[str, Any]
    ndcg: dict[str, float]  # query id -> nDCG@10


def write_report(run: Path, rows: list[ReportRow], paths: dict[str, Path], expectation: str) -> None:
    """Write <run>/report.md and print it.

    Args:
        run: the run folder; its log.jsonl, if there is one, gives the curves.
        rows: from the baseline to the last stage; each is compared with the row above it and with its start, the last
            one with all.
        paths: what a reader may want to open next, by name.
        expectation: one sentence: what each stage can be expected to do at this size.

    Raises:
        ValueError: if two rows scored different versions of a collection.
    """
    by_collection: dict[str, list[_Scores]] = defaultdict(list)
    for row in rows:
        collections = json.loads((row.eval_folder / "metrics.json").read_text(encoding="utf-8"))
        per_query = json.loads((row.eval_folder / "per_query.json").read_text(encoding="utf-8"))
        for name, metrics in collections["collections"].items():
            by_collection[name].append(_Scores(row.label, row.start, metrics, per_query[name]["ndcg_at_10"]))
    sections = [_section(name, systems) for name, systems in by_collection.items()]
    curves = plot_curves(run)
    replace_text(run / "report.md", _markdown(run, sections, curves, paths, expectation))
    _print(sections, paths, expectation)


def plot_curves(run: Path) -> list[Path]:
    """One PNG per stage in <run>/curves: every number its lines of log.jsonl log, loss first, over the steps."""
    log = run / "log.jsonl"
    if not log.is_file():
        return []
    points: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))  # stage, key, step
    for line in log.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "stage" in row and "step" in row:
            for key, value in row.items():
                if isinstance(value, int | float) and key not in ("stage", "step"):
                    points[str(row["stage"])][key][row["step"]] = value
    paths = []
    for stage, keys in points.items():
        names = sorted(keys, key=lambda key: (key != "loss", key))
        columns = min(3, len(names))
        lines = -(-len(names) // columns)
        figure = Figure(figsize=(4.5 * columns, 3 * lines), layout="constrained")
        for place, name in enumerate(names, 1):
            axes = figure.add_subplot(lines, columns, place)
            steps = sorted(keys[name])
            axes.plot(steps, [keys[name][step] for step in steps], linewidth=1)
            axes.set(title=name, xlabel="step")
            axes.grid(alpha=0.3)
        figure.suptitle(stage)
        path = run / "curves" / f"{file_name(stage)}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(work := path.with_suffix(".writing"), format="png", dpi=100)
        work.replace(path)
        paths.append(path)
    return paths


# --------------------------------------------------------------------------- numbers


def _section(name: str, systems: list[_Scores]) -> Section:
    sizes = systems[-1].metrics
    rows = []
    for place, system in enumerate(systems):
        numbers = [f"{system.metrics[key]:.4f}" for key in MAIN]
        change = _compare(name, systems[place - 1], system) if place else None
        rows.append((system.label, *numbers, *([_interval(change), _p(change)] if change else ["", ""])))
    comparisons = []
    for place, system in enumerate(systems):
        for other in systems[:place]:
            unseen = other.label == system.start and other is not systems[place - 1]  # not yet in the table
            change = _compare(name, other, system) if unseen or system is systems[-1] else None
            if change:
                counts = f"{change.wins} queries better, {change.ties} equal, {change.losses} worse"
                comparisons.append(
                    f"{system.label} against {other.label}: {_interval(change)}, p {_p(change)}; {counts}"
                )
    title = f"{name}: {sizes['documents']:,} documents, {sizes['queries']:,} queries"
    return Section(title, rows, comparisons)


def _compare(name: str, before: _Scores, after: _Scores) -> Comparison | None:
    """None for a collection of fewer than two queries, which has no interval."""
    if before.metrics["revision"] != after.metrics["revision"] or before.ndcg.keys() != after.ndcg.keys():
        raise ValueError(f"{name}: {before.label} and {after.label} scored different data; evaluate one of them again")
    queries = list(before.ndcg)
    if len(queries) < 2:
        return None
    return compare(*(np.array([system.ndcg[query] for query in queries]) for system in (before, after)), seed=SEED)


def _interval(change: Comparison) -> str:
    return f"{change.difference:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"


def _p(change: Comparison) -> str:
    return "< 0.001" if change.p_value < 0.001 else f"{change.p_value:.3f}"


# --------------------------------------------------------------------------- text


def _markdown(run: Path, sections: list[Section], curves: list[Path], paths: dict[str, Path], expectation: str) -> str:
    lines = [f"# {run.resolve().name}", "", expectation, ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        widths = [max(map(len, column)) for column in zip(HEADER, *section.rows, strict=True)]
        for row in (HEADER, tuple("-" * width for width in widths), *section.rows):
            lines.append("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        lines += ["", *(f"- {comparison}" for comparison in section.comparisons), ""]
    lines += [FOOTNOTE, ""]
    if curves:
        lines += ["## Training", "", *(f"![{path.stem}]({path.relative_to(run).as_posix()})" for path in curves), ""]
    lines += ["## Paths", "", *(f"- {name}: `{path}`" for name, path in paths.items()), ""]
    return "\n".join(lines)


def _print(sections: list[Section], paths: dict[str, Path], expectation: str) -> None:
    console = Console()
    console.width = max(console.width, WIDTH)  # a cell cut short says nothing; a wrapped line still does
    if expectation:
        console.print(f"\n{expectation}\n", markup=False, highlight=False)
    for section in sections:
        table = Table(title=section.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for place, title in enumerate(HEADER):
            table.add_column(title, justify="right" if place else "left", no_wrap=True)
        for row in section.rows:
            table.add_row(*row)
        console.print(table, markup=False)
        for comparison in section.comparisons:
            console.print(comparison, markup=False, highlight=False)
        console.print()
    if sections:
        console.print(FOOTNOTE, markup=False, highlight=False)
    for name, path in paths.items():
        console.print(f"{name}: {path}", markup=False, highlight=False, soft_wrap=True)
