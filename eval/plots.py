"""The report's plots as PNG: scores of the stages beside BM25, loss and throughput. Called by eval.report."""

import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.training_log import Steps

# Okabe and Ito's colours, which the colour-blind can tell apart; markers say the same.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "D", "^", "v", "P")
GREY = "#595959"
COLUMNS = 3  # panels side by side
PANEL = 4.2, 3.1  # inches
DPI = 110
SMOOTHED = 40  # steps from which a curve gets a running mean, over a twentieth of them
# What a scalar of every step is called on its axis.
UNITS = {
    "loss": "loss (nats)",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "plain_nll": "nats a token",
    "in_batch_nll": "nats a token",
    "gain": "nats a token",
    "row_entropy": "nats",
    "pair_nll": "nats a pair",
    "tokens_per_s": "tokens / s",
    "rows_per_s": "rows / s",
    "peak_memory_gib": "GiB",
    "data_wait": "share of the step",
    "padding": "share of the tokens",
    "keys_values_mib_sent": "MiB",
    "keys_values_mib_least": "MiB",
    "kept_sources": "passages a row",
}
COUNTED = ("tokens", "device_s", "flops")  # summed in the report's table; no curves


class Point(NamedTuple):
    label: str
    line: str  # points of one line are joined: a model before training and the stages that go on from it
    score: float
    low: float
    high: float


class Panel(NamedTuple):
    """One collection."""

    title: str
    score: str  # name of the score
    baseline: Point | None
    points: list[Point]


def plot_scores(panels: list[Panel], path: Path) -> None:
    """Score of every stage with its 95 % interval; the baseline as a line across, its interval as a band."""
    lines = list(dict.fromkeys(point.line for panel in panels for point in panel.points))
    labels = [len(point.label) for panel in panels for point in panel.points]
    figure, axes = _grid(len(panels), extra_height=0.065 * max(labels, default=0))
    for panel, place in zip(panels, axes, strict=True):
        if (base := panel.baseline) is not None:
            place.axhspan(base.low, base.high, color=GREY, alpha=0.18, linewidth=0)
            place.axhline(base.score, color=GREY, linestyle="--", linewidth=1.2, label=f"{base.label} (95 % band)")
        for number, line in enumerate(lines):
            at = [i for i, point in enumerate(panel.points) if point.line == line]
            own = [panel.points[i] for i in at]
            if own:
                errors = [[p.score - p.low for p in own], [p.high - p.score for p in own]]
                style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "capsize": 3, "linewidth": 1.2}
                style |= {"marker": MARKERS[number % len(MARKERS)], "markersize": 5}
                place.errorbar(at, [p.score for p in own], yerr=errors, **style)
        place.set_xticks(range(len(panel.points)), [p.label for p in panel.points], rotation=35, ha="right")
        place.set_xlim(-0.5, len(panel.points) - 0.5)
        place.set_ylim(bottom=0)
        place.set_title(panel.title, fontsize="medium")
        place.set(ylabel=f"{panel.score}, 95 % interval")
        if base is not None:
            place.legend(loc="best", fontsize="x-small", framealpha=0.8)
    _save(figure, path)


def plot_loss(log: dict[str, Steps], path: Path) -> None:
    """Loss over the steps, a panel a stage."""
    figure, axes = _grid(len(log))
    for (stage, steps), place in zip(log.items(), axes, strict=True):
        _curve(place, steps, "loss", stage)
    _save(figure, path)


def plot_throughput(log: dict[str, Steps], path: Path) -> None:
    """Tokens a second over the steps, with their median, a panel a stage."""
    figure, axes = _grid(len(log))
    for (stage, steps), place in zip(log.items(), axes, strict=True):
        _curve(place, steps, "tokens_per_s", stage)
        values = [row["tokens_per_s"] for row in steps.values() if "tokens_per_s" in row]
        if values:
            median = statistics.median(values)
            place.axhline(median, color=COLOURS[1], linestyle="--", linewidth=1.2, label=f"median {median:,.0f}")
            place.legend(loc="best", fontsize="x-small", framealpha=0.8)
        place.set_ylim(bottom=0)
        place.yaxis.set_major_formatter("{x:,.0f}")
    _save(figure, path)


def plot_scalars(stage: str, steps: Steps, path: Path) -> None:
    """Everything else that the steps of a stage log, a panel a scalar."""
    names = sorted(
        {
            key
            for row in steps.values()
            for key, value in row.items()
            if isinstance(value, int | float) and key not in ("step", *COUNTED)
        }
    )
    names = [name for name in names if name == "tokens_per_s" or not name.startswith("tokens_")]
    figure, axes = _grid(len(names))
    for name, place in zip(names, axes, strict=True):
        _curve(place, steps, name, name, smooth=False)
    figure.suptitle(stage)
    _save(figure, path)


def _curve(place: Any, steps: Steps, key: str, title: str, smooth: bool = True) -> None:
    points = [(step, row[key]) for step, row in steps.items() if key in row]
    place.set(title=title, xlabel="optimizer step", ylabel=UNITS.get(key, key.replace("_", " ")))
    place.grid(alpha=0.3)
    place.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    if not points:
        return
    x, y = zip(*points, strict=True)
    if not smooth or len(points) < SMOOTHED:
        place.plot(x, y, color=COLOURS[0], linewidth=1.2, marker="o" if len(points) < 10 else None, markersize=3)
        return
    width = len(points) // 20
    means = [statistics.fmean(y[max(0, i - width + 1) : i + 1]) for i in range(len(y))]
    place.plot(x, y, color=COLOURS[0], alpha=0.35, linewidth=0.8)
    place.plot(x, means, color=COLOURS[0], linewidth=1.5, label=f"mean of {width} steps")
    place.legend(loc="best", fontsize="x-small", framealpha=0.8)


def _grid(panels: int, extra_height: float = 0.0) -> tuple[Figure, list[Any]]:
    columns = min(COLUMNS, panels)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(PANEL[0] * columns, (PANEL[1] + extra_height) * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, place) for place in range(1, panels + 1)]


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    figure.savefig(work := path.with_suffix(".writing"), format="png", dpi=DPI)
    work.replace(path)
