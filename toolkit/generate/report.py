"""What a generation of passages came to: generated.json for programs and report.md for people.

Called by the command that writes passages, when every query is finished.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from toolkit.files import replace_text
from toolkit.generate import gate
from toolkit.generate.graded_files import RECORD, REPORT, SPLIT, Counts, Sampled
from toolkit.generate.order import Order
from toolkit.generate.prompt import GRADES

BATCH_FILE = "batch file"  # what that engine calls itself
SHOWN = 10  # queries with their passages
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~$&])")
_SHARES = (0.1, 0.5, 0.9)


class Grade(NamedTuple):
    """What the passages of one grade are like, of the queries that were drawn."""

    grade: int
    words: float  # mean of a passage
    quantiles: list[float]  # of the words: 10 %, half, 90 %
    overlap: float | None  # mean share of a query's different words that its passage has


class Report(NamedTuple):
    """Everything that is told."""

    source: dict[str, Any]  # what, split, total, repeated, empty
    begun_with: dict[str, Any]
    model: str
    engines: list[dict[str, Any]]  # what the engines said of themselves, each once
    counts: Counts
    sampled: list[Sampled]
    orders: list[Order]


def by_grade(sampled: list[Sampled]) -> list[Grade]:
    """Lengths, and words shared with the query, of each grade."""
    found = []
    for place, grade in enumerate(GRADES):
        words = np.array([gate.num_words(one.texts()[place]) for one in sampled])
        shares = [gate.share_found(one.query.text, one.texts()[place]) for one in sampled]
        there = [share for share in shares if share is not None]
        quantiles = [float(np.quantile(words, share)) for share in _SHARES]
        found.append(Grade(grade, float(words.mean()), quantiles, float(np.mean(there)) if there else None))
    return found


def write_report(output: Path, report: Report) -> None:
    """Write report.md, and after it generated.json, by which a folder is known as finished."""
    grades = by_grade(report.sampled) if report.sampled else []
    replace_text(output / REPORT, _markdown(output, report, grades))
    replace_text(output / RECORD, json.dumps(_record(report, grades), indent=1, ensure_ascii=False) + "\n")


def _record(report: Report, grades: list[Grade]) -> dict[str, Any]:
    counts = report.counts._asdict()
    dropped, reasons, causes = counts.pop("dropped"), counts.pop("reasons"), counts.pop("causes")
    return {
        "source": report.source,
        "begun_with": report.begun_with,
        "model": report.model,
        "engines": report.engines,
        "counts": counts | {"dropped": report.counts.queries - report.counts.kept},
        "tokens_per_second": _rate(report),
        "rejections": dict(causes),
        "engine_said": dict(reasons),
        "first_dropped": dropped,
        "sampled": len(report.sampled),
        "by_grade": [one._asdict() for one in grades],
        "order": [one._asdict() for one in report.orders],
        "shown": [one.query.id for one in report.sampled[:SHOWN]],
    }


def _rate(report: Report) -> float | None:
    """Tokens written a second; None where answers came from batch files, whose time nobody here knows."""
    counts = report.counts
    by_files = any(engine["engine"] == BATCH_FILE for engine in report.engines)
    return None if by_files or not counts.seconds else round(counts.tokens / counts.seconds, 1)


# --------------------------------------------------------------------------- text


def _markdown(output: Path, report: Report, grades: list[Grade]) -> str:
    counts = report.counts
    lines = [f"# Passages of graded relevance: {escaped(output.resolve().name)}", "", _summary(report), ""]
    lines += ["## How they were made", "", *_origin(report), ""]
    lines += ["## What was refused", "", *_refused(counts), ""]
    if grades:
        lines += ["## The grades", "", *_grades(report, grades), ""]
        lines += ["## Do searches find this order?", "", *_orders(report.orders), ""]
        lines += [f"## {len(report.sampled[:SHOWN])} queries, drawn by the seed", ""]
        for one in report.sampled[:SHOWN]:
            lines += _shown(one)
    return "\n".join(lines).rstrip() + "\n"


def _summary(report: Report) -> str:
    counts = report.counts
    share = counts.kept / counts.queries
    return (
        f"{escaped(report.model)} was asked to write passages of the grades 3, 2, 1 and 0 for {counts.queries:,} "
        f"queries. {counts.kept:,} of them ({share:.1%}) have a passage of every grade, {counts.at_second:,} of these "
        f"after an answer was refused and asked for again. {counts.queries - counts.kept:,} queries are dropped. The "
        f"folder is a source of format graded, and at the same time a folder in BEIR layout (qrels/{SPLIT}.tsv)."
    )


def _origin(report: Report) -> list[str]:
    counts, source = report.counts, report.source
    split = f", split {source['split']}" if source["split"] else ""
    rate = _rate(report)
    rows = [
        ("queries", f"{source['what']}{split}: {source['total']:,} different ones, {counts.queries:,} asked"),
        ("rows of queries left out", f"{source['repeated']:,} repeat an earlier one, {source['empty']:,} are empty"),
        *((f"engine: {key}", _value(value)) for engine in report.engines for key, value in engine.items()),
        *((key, _value(value)) for key, value in report.begun_with.items()),
        ("calls", f"{counts.calls:,}"),
        ("tokens read", f"{counts.prompt_tokens:,}"),
        ("tokens written", f"{counts.tokens:,}"),
        ("time", f"{counts.seconds / 3600:,.2f} hours ({counts.seconds:,.0f} s)"),
        ("tokens written a second", "not known" if rate is None else f"{rate:,.1f}"),
    ]
    return table(("what", "value"), [(escaped(key), escaped(value)) for key, value in rows], 2)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _refused(counts: Counts) -> list[str]:
    if not counts.causes:
        return ["No answer was refused."]
    total = counts.causes.total()
    lines = [
        f"{total:,} of {counts.calls:,} answers were refused ({total / counts.calls:.1%}), each for its first cause.",
        "",
    ]
    rows = [(cause, gate.CAUSES[cause], f"{number:,}") for cause, number in counts.causes.most_common()]
    lines += table(("cause", "which means", "answers"), rows, 2)
    if counts.reasons:
        lines += ["", "The engine said:", "", *(f"- {escaped(reason)} ({n:,})" for reason, n in counts.reasons.items())]
    return lines


def _grades(report: Report, grades: list[Grade]) -> list[str]:
    lines = [
        f"Of {len(report.sampled):,} queries drawn by the seed. Lengths are in words. Words of the query: the share of "
        "its different words that a passage has. Passages that differ in length by grade, or in grade by shared words "
        "alone, teach a retriever just that.",
        "",
    ]
    rows = [
        (
            str(one.grade),
            f"{one.words:,.1f}",
            *(f"{value:,.0f}" for value in one.quantiles),
            "" if one.overlap is None else f"{one.overlap:.2f}",
        )
        for one in grades
    ]
    return lines + table(("grade", "mean length", "10 %", "half", "90 %", "words of the query"), rows, 1)


def _orders(orders: list[Order]) -> list[str]:
    lines = [
        "A search scores the four passages of each of these queries. Kendall's tau-b is 1 where the scores have the "
        "order of the grades, 0 where they know nothing of it, and -1 where they turn it round. A query whose four "
        "scores are all equal counts as 0. Pairs are the six pairs of passages of a query. Neither a search nor a "
        "model is the truth: read the queries below.",
        "",
    ]
    rows = [
        (
            escaped(one.by),
            f"{one.queries:,}",
            f"{one.tau:+.3f}",
            "" if one.low is None else f"{one.low:+.3f} to {one.high:+.3f}",
            f"{one.agree:.1%}",
            f"{one.tied:.1%}",
            f"{one.undecided:,}",
        )
        for one in orders
    ]
    header = ("search", "queries", "tau-b", "95 % interval", "pairs in order", "pairs tied", "queries all tied")
    return lines + table(header, rows, 1)


def _shown(one: Sampled) -> list[str]:
    drawn = ", ".join(f"{name} {choice}" for name, choice in one.record["attributes"].items())
    lines = [
        f"### {escaped(_on_one_line(one.query.text, 200))}",
        "",
        f"Id {escaped(one.query.id)}; {escaped(drawn)}.",
        "",
    ]
    for passage in one.record["passages"]:
        lines += [f"**Grade {passage['grade']}**", ""]
        lines += [f"> {escaped(line)}".rstrip() for line in passage["text"].splitlines()] + [""]
    return lines


def _on_one_line(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def escaped(text: str) -> str:
    """A text of which nothing is markup."""
    return _MARKUP.sub(r"\\\1", text)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]], text_columns: int) -> list[str]:
    """Lines of a table; the first columns are text, the rest numbers. Cells hold no line ends."""
    rule = tuple("---" if place < text_columns else "--:" for place in range(len(header)))
    return ["| " + " | ".join(row) + " |" for row in (header, rule, *(tuple(map(_cell, row)) for row in rows))]


def _cell(text: str) -> str:
    return " ".join(text.split())
