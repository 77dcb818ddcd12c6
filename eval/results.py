"""What an evaluation leaves: metrics.json, per_query.json, results in mteb's format, rankings a collection, means.

Called by eval.evaluate; what writes, on rank 0.
"""

import json
import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eval.mteb_files import Scored, write_task
from eval.tasks import Task
from eval.trec import Rankings, write_rankings
from toolkit.files import replace_text

MAIN = ("ndcg_at_10", "recall_at_100", "mrr_at_10")
PACKAGES = ("torch", "transformers", "numpy", "faiss-cpu", "faiss-gpu", "bm25s", "pytrec-eval-terrier", "mteb")

TITLES = {"ndcg_at_10": "nDCG@10", "recall_at_100": "Recall@100", "mrr_at_10": "MRR@10"}

Groups = dict[str, dict[str, dict[str, str]]]  # group -> member -> its collections -> their main scores in it


class Written(NamedTuple):
    """What the files hold of a collection that was searched, without its shown scores."""

    about: dict[str, Any]  # of metrics.json
    row: dict[str, Any]  # of mteb's format: all means


class Result(NamedTuple):
    """Scores of a collection that was searched; once they are written, without its texts and rankings."""

    task: Task
    query_ids: list[str]
    per_query: dict[str, np.ndarray]  # metric -> [q]
    rankings: Rankings | None  # rank 0 alone holds them
    identical_ids_dropped: int
    noted: dict[str, Any]  # what else its record says
    seconds: float
    written: Written | None = None

    @property
    def means(self) -> dict[str, float]:
        return {name: float(values.mean()) for name, values in self.per_query.items()}

    @property
    def shown(self) -> dict[str, float]:
        """The scores that are reported."""
        usual = [key for key in MAIN if key in self.per_query]
        answers = [key for key in self.per_query if key.startswith("accuracy_at_")]
        keys = dict.fromkeys([*usual, *answers, *self.task.reported, self.task.main_score])
        return {key: self.means[key] for key in keys}


class MtebResult(NamedTuple):
    """Scores that mteb computed: of one subset and split of a task, without scores of single queries."""

    main_score: str
    scores: dict[str, Any]  # mteb's
    whole: dict[str, Any]  # mteb's result of the whole task
    seconds: float

    @property
    def shown(self) -> dict[str, float]:
        return {self.main_score: float(self.scores["main_score"])}


def title(score: str) -> str:
    """A score as readers know it."""
    return TITLES.get(score, score)


def group_means(groups: Groups, results: dict[str, Result | MtebResult]) -> dict[str, dict[str, float]]:
    """Group -> "main_score" and each score that all its collections have: the mean of its members.

    The main score is the one that the collection has in this group: MSMARCO's is nDCG@10 in BEIR and MRR@10 by itself.
    A member is the mean of its collections (subsets and splits of a task; the twelve parts of CQADupstack). A group of
    one member is left out.
    """
    means = {}
    for group, members in groups.items():
        if not group or len(members) < 2:
            continue
        rows = [[_row(results[name], main) for name, main in member.items()] for member in members.values()]
        shared = [key for key in rows[0][0] if all(key in row for member in rows for row in member)]
        means[group] = {
            key: float(np.mean([np.mean([row[key] for row in member]) for member in rows])) for key in shared
        }
    return means


def _row(result: Result | MtebResult, main: str) -> dict[str, float]:
    return result.shown | {"main_score": result.shown[main]}


def write_collection(folder: Path, record: dict[str, Any], name: str, result: Result, data: str) -> Written:
    """Write the rankings of a collection and, where mteb does not know it, its scores in mteb's format.

    `data` is a digest of all of the collection that its scores depend on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if result.rankings is not None:
        write_rankings(folder / "rankings", file_name(name), result.rankings, record["label"])
    written = Written(_describe(result) | {"data": data}, _mteb_row(result))
    if result.task.official is None:
        whole = _mteb_format([result._replace(written=written)])
        replace_text(folder / f"{file_name(name)}.json", _dump(whole))
    return written


def write_mteb_task(folder: Path, scored: Scored, parts: list[Result]) -> None:
    """Write what there is of a task of mteb's; it is whole once it has all its subsets and splits."""
    official = parts[0].task.official
    assert official is not None
    write_task(folder, scored, parts[0].task.task_name, _mteb_format(parts), len(parts) == official.parts)


def write_results(
    folder: Path,
    record: dict[str, Any],
    results: dict[str, Result | MtebResult],
    groups: Groups,
    skipped: list[str],
    finished: bool,
) -> None:
    """Write metrics.json and per_query.json; `record` says what was scored and how."""
    folder.mkdir(parents=True, exist_ok=True)
    collections, per_query = {}, {}
    for name, result in results.items():
        if isinstance(result, Result):
            assert result.written is not None
            collections[name] = result.shown | result.written.about
            per_query[name] = {
                key: dict(zip(result.query_ids, result.per_query[key].tolist(), strict=True)) for key in result.shown
            }
        else:
            revision = result.whole["dataset_revision"]
            about = {"main_score": result.main_score, "revision": revision, "seconds": round(result.seconds, 3)}
            collections[name] = result.shown | about
    replace_text(folder / "per_query.json", _dump(per_query))
    summary = {"collections": collections, "groups": group_means(groups, results), "skipped": skipped}
    replace_text(folder / "metrics.json", _dump({**record, "finished": finished, **summary, "versions": versions()}))


def _describe(result: Result) -> dict[str, Any]:
    task = result.task
    documents, qrels = task.collection.documents, task.collection.qrels
    return {
        **result.shown,
        "main_score": task.main_score,
        "documents": len(documents),
        "queries": len(result.query_ids),
        "judged_documents_missing": len({d for grades in qrels.values() for d in grades if d not in documents}),
        "ignore_identical_ids": task.ignore_identical_ids,
        "identical_ids_dropped": result.identical_ids_dropped,
        "bm25_words": "code" if task.code else "prose",
        **result.noted,
        "revision": task.revision,
        "seconds": round(result.seconds, 3),
        **_limits(task),
    }


def _limits(task: Task) -> dict[str, int]:
    """How many documents its queries must not find, and may find, where a collection says so."""
    given = {"excluded": task.excluded, "candidates": task.candidates}
    documents = task.collection.documents
    return {
        key: sum(document in documents for query in task.collection.queries for document in pairs.get(query, []))
        for key, pairs in given.items()
        if pairs is not None
    }


def _mteb_row(result: Result) -> dict[str, Any]:
    """A subset and split as mteb has it; its main score is mteb's, whichever the suite reports."""
    task = result.task
    scores = {key: round(value, 5) for key, value in result.means.items() if not key.endswith("_at_50")}  # not mteb's
    main_score = task.main_score if task.official is None else task.official.main_score
    return {**scores, "main_score": scores[main_score], "hf_subset": task.subset, "languages": task.languages}


def _mteb_format(parts: list[Result]) -> dict[str, Any]:
    """mteb's result of a task, of all its subsets and splits."""
    scores: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        assert part.written is not None
        scores.setdefault(part.task.split, []).append(part.written.row)
    return {
        "dataset_revision": parts[0].task.revision,
        "task_name": parts[0].task.task_name,
        "mteb_version": version("mteb"),
        "scores": scores,
        "evaluation_time": sum(part.seconds for part in parts),
        "kg_co2_emissions": None,
    }


def context_file(folder: Path, collection: str) -> Path:
    """Where the context that a collection was read with lies."""
    return folder / "context" / f"{file_name(collection)}.safetensors"


def file_name(collection: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", collection)


def _dump(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def versions() -> dict[str, str]:
    """Of Python and of what scores are made with."""
    return {"python": platform.python_version(), **installed(PACKAGES)}


def installed(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of those of these packages that are there."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):  # one of the two faiss packages, or both
            found[package] = version(package)
    return found
