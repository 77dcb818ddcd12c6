"""What a run came to: report.md and report.html with plots, and its tables in the terminal. Called by the launcher."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eval import plots
from eval.compare import FOOTNOTE, HEADER, SEED, Compared, System, change_cells, compare_systems, read_system
from eval.queries import changed_text, code
from eval.results import MAIN, title
from eval.significance import mean_interval
from eval.tables import console, html_page, markdown_table, print_table
from eval.training_log import Cost, Steps, cost, read_log
from toolkit.files import replace_text

COSTS = ("stage", "rows in the data", "rows seen", "tokens", "FLOPs", "device-hours", "devices")
SPEEDS = ("tokens / s", "FLOP/s a device", "peak GiB")
COST_NOTE = (
    "Sums over a stage's steps, each counted once, however often the run was interrupted; start-up, saving, export and "
    "evaluation are left out. rows: passages, pairs or texts, which papers count as their training data; tokens: real "
    "ones, of every text once for each model that reads it; device-hours: of all devices; FLOPs: by the "
)


class ReportRow(NamedTuple):
    """A system."""

    label: str
    folder: Path  # a result, see eval.compare
    line: str  # the model before training that it goes back to (its label), for the plot; "" for a baseline
    against: list[str]  # labels of earlier rows that it is compared with; the last one also query by query


class TrainingRow(NamedTuple):
    """A finished stage."""

    label: str
    stage: str  # its name in log.jsonl
    rows_per_step: int
    done: dict[str, Any]  # of toolkit.training.loop.StageResult


class Origin(NamedTuple):
    """Where the figures come from."""

    paths: dict[str, Path]  # what a reader may want to open next, by name
    environment: dict[str, Any]  # command, machine and versions
    flops_source: str


class Table(NamedTuple):
    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    text_columns: int


class Report(NamedTuple):
    """All that is written, in its order; `scores` to `costs` are also printed."""

    expectation: str
    stopped: str  # why the run stopped before its last stage; empty if it did not
    scores: list[Table]
    comparisons: list[Table]
    queries: list[str]
    costs: Table | None
    rules: list[str]
    images: dict[str, list[str]]  # section -> lines


def write_report(
    run: Path, rows: list[ReportRow], training: list[TrainingRow], origin: Origin, expectation: str, stopped: str
) -> None:
    """Write <run>/report.md, the same as report.html, and <run>/plots, and print the tables.

    Args:
        run: the run folder; its log.jsonl gives curves and costs.
        rows: from the baseline to the last stage.
        training: the finished stages in order.
        expectation: one sentence: what each stage can be expected to do at this size.
        stopped: why the run stopped before its last stage; empty if it did not.

    Raises:
        ValueError: if two rows that are compared scored different versions of a collection.
    """
    systems = {row.label: read_system(row.folder, row.label) for row in rows}
    logged = read_log(run)
    log = {row.label: logged[row.stage] for row in training if row.stage in logged}
    costs = {row.label: cost(log.get(row.label, {})) for row in training}
    compared = {row.label: _compared(row, systems) for row in rows}
    report = Report(
        expectation,
        stopped,
        _score_tables(list(systems.values())),
        [_comparison_table(label, found) for label, found in compared.items() if found],
        _changed_queries(rows, systems),
        _cost_table(training, costs) if training else None,
        [f"- {row.label}: {row.done['flops_rule']}" for row in training],
        {"scores": _plot_scores(run, rows, systems), "training": _plot_training(run, log)},
    )
    text = _markdown(run, report, origin)
    replace_text(run / "report.md", text)
    replace_text(run / "report.html", html_page(run.resolve().name, text))
    _print(report, origin)


# --------------------------------------------------------------------------- scores


def _score_tables(systems: list[System]) -> list[Table]:
    """A table for each score: collections and the means of their groups down, systems across."""
    groups = dict.fromkeys(group for system in systems for group in system.groups)
    sizes = {name: row for system in systems for name, row in system.metrics.items()}
    tables = []
    for score in dict.fromkeys([*MAIN, *(row["main_score"] for row in sizes.values())]):
        found = {name: [s.metrics.get(name, {}).get(score) for s in systems] for name in sizes if score in sizes[name]}
        cells = [
            (name, *(_number(sizes[name].get(key), ",") for key in ("documents", "queries")), *map(_score, values))
            for name, values in found.items()
        ]
        for group in groups:
            means = [system.groups.get(group, {}).get(score) for system in systems]
            if means != [None] * len(systems):
                cells.append((f"mean: {group}", "", "", *map(_score, means)))
        if cells:
            header = ("collection", "documents", "queries", *(system.label for system in systems))
            tables.append(Table(title(score), header, cells, 1))
    return tables


def _score(value: float | None) -> str:
    return _number(value, ".4f")


def _compared(row: ReportRow, systems: dict[str, System]) -> list[tuple[str, Compared]]:
    return [(other, one) for other in row.against for one in compare_systems(systems[other], systems[row.label])]


def _comparison_table(label: str, found: list[tuple[str, Compared]]) -> Table:
    cells = [(other, one.collection, *change_cells(one)) for other, one in found]
    return Table(f"{label} against", ("against", "collection", *HEADER), cells, 2)


def _changed_queries(rows: list[ReportRow], systems: dict[str, System]) -> list[str]:
    """Of the last system that is compared with another."""
    row = next((row for row in reversed(rows) if row.against), None)
    if row is None:
        return []
    before, after = systems[row.against[-1]], systems[row.label]
    shared = [name for name in after.metrics if name in before.metrics]
    return [line for name in shared for line in changed_text(before, after, name)]


def _plot_scores(run: Path, rows: list[ReportRow], systems: dict[str, System]) -> list[str]:
    names = dict.fromkeys(name for system in systems.values() for name in system.metrics)
    panels = [panel for name in names if (panel := _panel(name, rows, systems)) is not None]
    if not panels:
        return []
    plots.plot_scores(panels, run / "plots" / "scores.png")
    return ["![score of every stage](plots/scores.png)", ""]


def _panel(name: str, rows: list[ReportRow], systems: dict[str, System]) -> plots.Panel | None:
    """None for a collection without scores by query, or of a single query."""
    points = []
    for row in rows:
        system = systems[row.label]
        scores = np.array(list(system.main_scores(name).values()) if name in system.metrics else [])
        if len(scores) > 1:
            points.append(plots.Point(row.label, row.line, float(scores.mean()), *mean_interval(scores, SEED)))
    if not points:
        return None
    metrics = next(s.metrics[name] for s in systems.values() if name in s.metrics)
    heading = f"{name}\n{metrics['queries']:,} queries"
    baseline = next((point for point in points if not point.line), None)
    return plots.Panel(heading, title(metrics["main_score"]), baseline, [point for point in points if point.line])


# --------------------------------------------------------------------------- training


def _cost_table(training: list[TrainingRow], costs: dict[str, Cost]) -> Table:
    cells = []
    for row in training:
        done, own = row.done, costs[row.label]
        seconds, ranks = own.device_seconds, done["ranks"]
        cells.append(
            (
                row.label,
                f"{done['rows']:,}",
                f"{done['steps'] * row.rows_per_step:,}",
                *_cost_cells(own),
                f"{ranks} x {done['device']}",
                _number(own.tokens and seconds and own.tokens * ranks / seconds, ",.0f"),
                _number(own.flops and seconds and own.flops / seconds, ".2e"),
                _number(own.peak_memory_gib, ".1f"),
            )
        )
    if len(training) > 1:
        sums = [None if None in column else sum(column) for column in zip(*costs.values(), strict=True)]
        seen = sum(row.done["steps"] * row.rows_per_step for row in training)
        cells.append(("all stages", "", f"{seen:,}", *_cost_cells(Cost(*sums)), "", "", "", ""))
    return Table("Training", (*COSTS, *SPEEDS), cells, 1)


def _cost_cells(total: Cost) -> tuple[str, str, str]:
    hours = None if total.device_seconds is None else total.device_seconds / 3600
    return _number(total.tokens, ",.0f"), _number(total.flops, ".2e"), _number(hours, ".3g")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _plot_training(run: Path, log: dict[str, Steps]) -> list[str]:
    if not log:
        return []
    plots.plot_loss(log, run / "plots" / "loss.png")
    plots.plot_throughput(log, run / "plots" / "throughput.png")
    lines = ["![loss of every stage](plots/loss.png)", "", "![tokens a second](plots/throughput.png)", ""]
    for label, steps in log.items():
        path = run / "plots" / f"scalars_{label.replace(' ', '_')}.png"
        plots.plot_scalars(label, steps, path)
        image = f"![{label}]({path.relative_to(run).as_posix()})"
        lines += ["<details>", f"<summary>every scalar of {label}</summary>", "", image, "", "</details>", ""]
    return lines


# --------------------------------------------------------------------------- text


def _markdown(run: Path, report: Report, origin: Origin) -> str:
    lines = [f"# {run.resolve().name}", ""]
    if report.stopped:
        lines += [f"> **Stopped.** {report.stopped}", ""]
    if report.expectation:
        lines += [report.expectation, ""]
    if report.scores:
        lines += ["## Scores", "", *report.images["scores"], *_sections(report.scores)]
    if report.comparisons:
        lines += ["## Comparisons", "", *_sections(report.comparisons), FOOTNOTE, ""]
    if report.queries:
        lines += ["## Queries", "", "First documents of each ranking; ✓ is a relevant one.", "", *report.queries]
    if report.costs is not None:
        lines += ["## Training", "", *markdown_table(*report.costs[1:]), ""]
        lines += [f"{COST_NOTE}{origin.flops_source}:", "", *report.rules, "", *report.images["training"]]
    return "\n".join([*lines, *_origin_lines(run, origin)])


def _sections(tables: list[Table]) -> list[str]:
    return [line for table in tables for line in (f"### {table.title}", "", *markdown_table(*table[1:]), "")]


def _origin_lines(run: Path, origin: Origin) -> list[str]:
    """The command, versions and places; those in the run folder relative to it."""
    made, run = origin.environment, run.resolve()
    machine = f"{made['world_size']} x {made['device']}, {made['platform']}, Python {made['python']}"
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    places = {
        name: path.resolve().relative_to(run) if path.resolve().is_relative_to(run) else path
        for name, path in origin.paths.items()
    }
    return [
        *("## How", "", "```", made["command"], "```", ""),
        *(f"- machine: {machine}", f"- versions: {versions}"),
        *(f"- {name}: {code(path.as_posix())}" for name, path in places.items()),
        "",
    ]


def _print(report: Report, origin: Origin) -> None:
    terminal = console()
    if report.expectation:
        terminal.print(f"\n{report.expectation}\n", markup=False, highlight=False)
    for tables, note in ((report.scores, ""), (report.comparisons, FOOTNOTE)):
        for table in tables:
            print_table(*table)
            terminal.print()
        if tables and note:
            terminal.print(f"{note}\n", markup=False, highlight=False)
    if report.costs is not None:
        print_table(*report.costs)
        terminal.print(f"\n{COST_NOTE}{origin.flops_source}\n", markup=False, highlight=False)
    for name, path in origin.paths.items():
        terminal.print(f"{name}: {path}", markup=False, highlight=False, soft_wrap=True)
