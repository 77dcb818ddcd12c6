"""The finished folder: passages of graded relevance as rows of format graded and in BEIR layout, and what they count.

Called by the command that writes passages, once every query is finished.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.determinism import generator
from toolkit.files import replacing_folder, sync
from toolkit.generate.queries import Query
from toolkit.generate.written import JOURNAL, Place, records

SPLIT = "train"
RECORD, REPORT = "generated.json", "report.md"
_FILES = ("corpus.jsonl", "queries.jsonl", f"qrels/{SPLIT}.tsv", "passages.jsonl")
_HEADER = "query-id\tcorpus-id\tscore\n"
_MOST_DROPPED, _MOST_REASONS = 100, 5  # that are named


class Counts(NamedTuple):
    """What came back for the queries."""

    queries: int
    kept: int
    at_second: int  # of the kept ones: some answer was refused, and the second one was right
    calls: int
    prompt_tokens: int
    tokens: int
    seconds: float  # of all sessions, in which something was asked
    causes: Counter[str]  # of refused answers
    dropped: dict[str, list[str]]  # query id -> causes, of the first few
    reasons: Counter[str]  # why an engine gave no answer, of the first few


def write_files(output: Path, queries: list[Query], places: dict[str, Place], about: dict[str, str]) -> Counts:
    """Write the data files anew, in the order of the queries; each is replaced as a whole.

    generated.json goes first, since it says that the folder is finished; the caller writes it last.

    Args:
        about: what each passage says of its origin.
    """
    found = _Counting()
    with replacing_folder(output / JOURNAL / "finished") as work:
        (work / "qrels").mkdir()
        with ExitStack() as stack:
            files = [stack.enter_context((work / name).open("w", encoding="utf-8", newline="\n")) for name in _FILES]
            corpus, asked, qrels, passages = files
            qrels.write(_HEADER)
            for query, record in zip(queries, records(places[query.id] for query in queries), strict=True):
                found.add(record)
                if not record["kept"]:
                    continue
                row = graded_row(query, record, about)
                asked.write(_line({"_id": query.id, "text": query.text}))
                passages.write(_line(row))
                for one in row["passages"]:
                    corpus.write(_line({"_id": one["id"], "title": "", "text": one["text"]}))
                    qrels.write(f"{query.id}\t{one['id']}\t{one['grade']}\n")
    (output / RECORD).unlink(missing_ok=True)
    (output / "qrels").mkdir(exist_ok=True)
    for name in _FILES:
        (output / JOURNAL / "finished" / name).replace(output / name)
    shutil.rmtree(output / JOURNAL / "finished")
    sync(output / "qrels")
    sync(output)
    return found.counts()


def graded_row(query: Query, record: dict[str, Any], about: dict[str, str]) -> dict[str, Any]:
    """A row of format graded."""
    passages = [
        {"id": f"{query.id}_l_{one['grade']}_d_0", "text": one["text"], "grade": one["grade"], "seed": one["seed"]}
        | about
        for one in record["passages"]
    ]
    return {"query_id": query.id, "query": query.text, "attributes": record["attributes"], "passages": passages}


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


class _Counting:
    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()
        self._causes: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._dropped: dict[str, list[str]] = {}
        self._sessions: dict[str, float] = {}

    def add(self, record: dict[str, Any]) -> None:
        self._sums["queries"] += 1
        self._sums["kept"] += record["kept"]
        self._sums["at_second"] += record["kept"] and bool(record["causes"])
        for key in ("calls", "prompt_tokens", "tokens"):
            self._sums[key] += record[key]
        self._causes.update(record["causes"])
        for reason in record["reasons"]:
            if reason in self._reasons or len(self._reasons) < _MOST_REASONS:
                self._reasons[reason] += 1
        if not record["kept"] and len(self._dropped) < _MOST_DROPPED:
            self._dropped[record["id"]] = record["causes"]
        self._sessions[record["session"]] = max(record["seconds"], self._sessions.get(record["session"], 0.0))

    def counts(self) -> Counts:
        names = ("queries", "kept", "at_second", "calls", "prompt_tokens", "tokens")
        return Counts(
            **{name: self._sums[name] for name in names},
            seconds=sum(self._sessions.values()),
            causes=self._causes,
            dropped=self._dropped,
            reasons=self._reasons,
        )


class Sampled(NamedTuple):
    """A query that was drawn to be looked at."""

    query: Query
    record: dict[str, Any]

    def texts(self) -> list[str]:
        """The passages, best grade first."""
        return [one["text"] for one in self.record["passages"]]


def sample(queries: list[Query], places: dict[str, Place], most: int, seed: int) -> list[Sampled]:
    """At most so many of the queries with passages, drawn by the seed, in the order in which they were drawn."""
    kept = [query for query in queries if places[query.id].kept]
    order = generator("sample", seed).permutation(len(kept))[:most].tolist()
    drawn = [kept[place] for place in order]
    found: Iterator[dict[str, Any]] = records(places[query.id] for query in drawn)
    return [Sampled(query, record) for query, record in zip(drawn, found, strict=True)]
