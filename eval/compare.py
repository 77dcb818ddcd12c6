"""Two systems on the same collections: differences, tests, corrections. Called by eval.run, eval.report, launcher.stop.

A result is a folder with the metrics.json and per_query.json that eval.run writes.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eval.results import title
from eval.significance import Comparison, compare, holm
from eval.tables import console, print_table
from toolkit.recipe.errors import RecipeError

SEED = 0  # of the resampling: the same results give the same figures
HEADER = ("difference [95 %]", "p", "p Holm", "+/=/-", "detectable")
FOOTNOTE = (
    "difference: of the collection's main score, paired over its queries, with a 95 % percentile bootstrap interval; "
    "p: two-sided paired randomisation test; both with 9,999 resamples. p Holm: corrected over the collections of one "
    "pair of systems, which are one family. +/=/-: queries better, equal, worse. detectable: the smallest true "
    "difference that so many queries with this spread would show at 5 % (two-sided) with 80 % power."
)


class System(NamedTuple):
    """A result as read from its folder."""

    label: str
    folder: Path
    metrics: dict[str, dict[str, Any]]  # collection -> its row of metrics.json
    per_query: dict[str, dict[str, dict[str, float]]]  # collection -> metric -> query id -> score
    groups: dict[str, dict[str, float]]  # group of collections -> score -> mean over its members
    finished: bool = True  # False: of an evaluation that goes on, or was killed; further collections are missing

    def main_scores(self, collection: str) -> dict[str, float]:
        """Query id -> the collection's main score; empty where there is none by query."""
        return self.per_query.get(collection, {}).get(self.metrics[collection]["main_score"], {})


class Compared(NamedTuple):
    """One collection of a pair of systems."""

    collection: str
    score: str  # name of the main score
    before: float
    after: float
    change: Comparison
    p_holm: float  # over the collections of this pair


def read_system(folder: Path, label: str) -> System:
    """Raises RecipeError if the folder holds no result."""
    try:
        metrics, per_query = (
            json.loads((folder / name).read_text(encoding="utf-8")) for name in ("metrics.json", "per_query.json")
        )
        groups, finished = metrics.get("groups", {}), metrics.get("finished", True)
        return System(label, folder, metrics["collections"], per_query, groups, finished)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(
            f"{folder}: holds no result ({reason}); name a folder that eval.run or a run wrote, with metrics.json "
            "and per_query.json"
        ) from None


def compare_systems(before: System, after: System) -> list[Compared]:
    """Every collection that both scored query by query, with at least two queries; p-values corrected over them.

    Raises:
        ValueError: if the two scored different data under one name.
    """
    found: list[tuple[str, Comparison]] = []
    for name in (name for name in after.metrics if name in before.metrics):
        scores = before.main_scores(name), after.main_scores(name)
        if not scores[0] and not scores[1]:  # no score by query: a task without queries, or of another kind
            continue
        if _data(before, name) != _data(after, name) or scores[0].keys() != scores[1].keys():
            raise ValueError(
                f"{name}: {before.label} and {after.label} scored different data; evaluate one of them again"
            )
        if len(scores[0]) > 1:
            earlier, later = (np.array([of_system[query] for query in scores[0]]) for of_system in scores)
            found.append((name, compare(earlier, later, seed=SEED)))
    rows = []
    for (name, change), p_holm in zip(found, holm([change.p_value for _, change in found]), strict=True):
        old, new = before.metrics[name], after.metrics[name]
        score = new["main_score"]
        rows.append(Compared(name, score, old[score], new[score], change, p_holm))
    return rows


def _data(system: System, collection: str) -> list[Any]:
    """What decides which score means what."""
    row = system.metrics[collection]
    return [row[key] for key in ("revision", "documents", "queries", "main_score", "ignore_identical_ids")]


def print_comparisons(result: Path, others: list[Path]) -> None:
    """Print a result against each of the others.

    Raises:
        RecipeError: if a folder holds no result. ValueError: if two scored different data, or nothing in common.
    """
    after = read_system(result, str(result))
    found = [(other, compare_systems(other, after)) for other in (read_system(o, str(o)) for o in others)]
    for other, rows in found:
        if not rows:
            raise ValueError(
                f"{other.label} and {after.label} have no collection in common with scores of at least two queries; "
                "evaluate both on the same suite"
            )
    for other, rows in found:
        header = ("collection", "score", "before", "after", *HEADER)
        cells = [
            (row.collection, title(row.score), f"{row.before:.4f}", f"{row.after:.4f}", *change_cells(row))
            for row in rows
        ]
        print_table(f"{after.label} (after) against {other.label} (before)", header, cells, text_columns=2)
        console().print()
        compared = {row.collection for row in rows}
        left_out = [name for name in dict.fromkeys([*after.metrics, *other.metrics]) if name not in compared]
        if left_out:
            console().print(
                f"not compared (scored by one of the two, or a single query): {', '.join(left_out)}", markup=False
            )
    for system in (after, *(other for other, _ in found)):
        if not system.finished:
            console().print(f"{system.label}: unfinished, collections are missing", markup=False)
    console().print(FOOTNOTE, markup=False, highlight=False)


def change_cells(row: Compared) -> tuple[str, ...]:
    """The cells below HEADER."""
    change = row.change
    smallest = "" if change.smallest is None else f"{change.smallest:.4f}"
    counts = f"{change.wins}/{change.ties}/{change.losses}"
    return interval(change), p_text(change.p_value), p_text(row.p_holm), counts, smallest


def interval(change: Comparison) -> str:
    return f"{change.difference:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"


def p_text(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
