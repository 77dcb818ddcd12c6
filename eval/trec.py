"""Rankings kept on disk: TREC run files, and the texts of what stands at their top.

Called by eval.evaluate on rank 0; eval.queries reads the texts.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from eval.scores import Qrels, Run
from toolkit.data.records import Collection
from toolkit.files import replace_text

DEPTH = 100  # documents a query in a run file
SHOWN = 5  # documents a query whose first words are kept
LONGEST_QUERY, LONGEST_DOCUMENT = 200, 100  # characters


class Top(NamedTuple):
    """What a reader sees of a collection's rankings."""

    queries: dict[str, str]  # id -> first words
    documents: dict[str, str]  # id -> first words, of the documents below
    ranked: dict[str, list[tuple[str, int]]]  # query id -> (document id, grade) of the first SHOWN; 0 also if unjudged


class Rankings(NamedTuple):
    """What is kept of a collection's rankings, without the collection."""

    run: Run  # the first DEPTH documents of each query, best first
    top: Top


def keep_rankings(collection: Collection, run: Run) -> Rankings:
    """The first 100 documents of each query, in trec_eval's order: by score, then by descending id."""
    run = {
        query: dict(sorted(ranking.items(), key=lambda item: (item[1], item[0]), reverse=True)[:DEPTH])
        for query, ranking in run.items()
    }
    return Rankings(run, _top(collection, run))


def write_rankings(folder: Path, stem: str, rankings: Rankings, tag: str) -> None:
    """Write <folder>/<stem>.trec (`qid Q0 docid rank score tag` a line) and <stem>.json, see `read_top`.

    White space in ids, which would end a column, is percent-encoded ("a b" -> "a%20b"); all else stays as it is.
    Scores have nine digits, which is every bit of an fp32 number.

    Args:
        stem: the collection's, as a file name.
        tag: the system's name.

    Raises:
        ValueError: if two ids are the same once encoded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = rankings.run
    queries = _columns(list(run))
    documents = _columns(list({document for ranking in run.values() for document in ranking}))
    tag = re.sub(r"\s+", "_", tag) or "unnamed"
    lines = [
        f"{queries[query]} Q0 {documents[document]} {place} {score:.9g} {tag}\n"
        for query, ranking in run.items()
        for place, (document, score) in enumerate(ranking.items(), 1)
    ]
    replace_text(folder / f"{stem}.trec", "".join(lines))
    replace_text(folder / f"{stem}.json", json.dumps(rankings.top._asdict(), ensure_ascii=False) + "\n")


def _columns(ids: list[str]) -> dict[str, str]:
    """Id -> the id as a column."""
    columns = {i: re.sub(r"\s", lambda space: "".join(f"%{b:02X}" for b in space[0].encode()), i) for i in ids}
    if len(set(columns.values())) < len(columns):
        raise ValueError("two ids differ in white space against %20 alone; rename one of them")
    return columns


def _top(collection: Collection, run: Run) -> Top:
    _, texts, queries, qrels = collection
    ranked = {query: _graded(list(ranking)[:SHOWN], query, qrels) for query, ranking in run.items()}
    shown = {document for ranking in ranked.values() for document, _ in ranking}
    return Top(
        {query: first_words(queries[query], LONGEST_QUERY) for query in run},
        {document: first_words(texts[document], LONGEST_DOCUMENT) for document in sorted(shown)},
        ranked,
    )


def _graded(documents: list[str], query: str, qrels: Qrels) -> list[tuple[str, int]]:
    return [(document, qrels.get(query, {}).get(document, 0)) for document in documents]


def first_words(text: str, longest: int) -> str:
    """The beginning of a text on one line, at most `longest` characters; cut at a word where that leaves half."""
    line = " ".join(text[: 4 * longest].split())
    if len(line) <= longest:
        return line
    cut = line[: longest - 1]
    return (cut.rsplit(" ", 1)[0] if " " in cut[longest // 2 :] else cut).rstrip() + "…"


def read_top(folder: Path, stem: str) -> Top | None:
    """What `write_rankings` kept for readers; None if the collection has no rankings there."""
    path = folder / f"{stem}.json"
    if not path.is_file():
        return None
    raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    ranked = {query: [(document, grade) for document, grade in ranking] for query, ranking in raw["ranked"].items()}
    return Top(raw["queries"], raw["documents"], ranked)
