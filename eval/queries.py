"""The queries that gained and lost most between two systems, with what each ranked first. Called by eval.report."""

from typing import NamedTuple

from eval.compare import System
from eval.results import file_name, title
from eval.tables import markdown_table
from eval.trec import SHOWN, Top, read_top

MOST = 3  # queries of each kind


class Changed(NamedTuple):
    query: str  # its id
    before: float
    after: float


def most_changed(before: System, after: System, collection: str) -> tuple[list[Changed], list[Changed]]:
    """Up to three queries whose main score rose most, and as many whose fell most; ties in the order of the queries."""
    earlier, later = before.main_scores(collection), after.main_scores(collection)
    rows = [Changed(query, earlier[query], later[query]) for query in later if query in earlier]
    rows.sort(key=lambda row: row.before - row.after)
    gained = [row for row in rows[:MOST] if row.after > row.before]
    lost = [row for row in rows[::-1][:MOST] if row.after < row.before]
    return gained, lost


def changed_text(before: System, after: System, collection: str) -> list[str]:
    """Markdown: a block that unfolds, each query above the two rankings side by side; empty if there is nothing to say.

    A relevant document has a check mark, with its grade if that is above 1.
    """
    tops = [read_top(system.folder / "rankings", file_name(collection)) for system in (before, after)]
    gained, lost = most_changed(before, after, collection)
    if None in tops or not gained + lost:
        return []
    first, second = (top for top in tops if top is not None)
    score = title(after.metrics[collection]["main_score"])
    summary = f"{collection}: {len(gained)} gained most, {len(lost)} lost most, {after.label} against {before.label}"
    lines = ["<details>", f"<summary>{_escaped(summary)}</summary>", ""]
    for kind, rows in (("gained", gained), ("lost", lost)):
        for row in rows:
            query = code(second.queries[row.query])
            lines += [f"**{kind}** {query}: {score} {row.before:.4f} → {row.after:.4f}", ""]
            places = zip(_ranked(first, row.query), _ranked(second, row.query), strict=True)
            cells = [(str(place), *titles) for place, titles in enumerate(places, 1) if any(titles)]
            lines += [*markdown_table(("", before.label, after.label), cells, text_columns=3), ""]
    return [*lines, "</details>", ""]


def _ranked(top: Top, query: str) -> list[str]:
    """SHOWN cells, empty behind the last document."""
    marks = {0: "", 1: "✓ "}
    cells = [
        marks.get(max(grade, 0), f"✓{grade} ") + code(top.documents[document]) for document, grade in top.ranked[query]
    ]
    return cells + [""] * (SHOWN - len(cells))


def code(text: str) -> str:
    """A text as it stands, between backticks: nothing in it is markup, a mention or a link."""
    return f"`{text.replace('`', chr(39)) or ' '}`"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
