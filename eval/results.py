"""What an evaluation leaves: metrics.json, per_query.json, a JSON in mteb's format and rankings a collection, means.

Called by eval.evaluate on rank 0.
"""

import json
import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eval.tasks import Task
from eval.trec import Rankings, write_rankings
from toolkit.files import replace_text

MAIN = ("ndcg_at_10", "recall_at_100", "mrr_at_10")
PACKAGES = ("torch", "transformers", "numpy", "faiss-cpu", "faiss-gpu", "bm25s", "pytrec-eval-terrier", "mteb")

Groups = dict[str, dict[str, dict[str, str]]]  # group -> member -> its collections -> their main scores in it


class Result(NamedTuple):
    """Scores of a collection that was searched."""

    task: Task
    query_ids: list[str]
    per_query: dict[str, np.ndarray]  # metric -> [q]
    rankings: Rankings  # rank 0 alone holds them
    identical_ids_dropped: int
    seconds: float

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


def write_results(
    folder: Path, record: dict[str, Any], results: dict[str, Result | MtebResult], groups: Groups, skipped: list[str]
) -> None:
    """Write all files of an evaluation; `record` says what was scored and how."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), **installed(PACKAGES)}
    collections, per_query = {}, {}
    for name, result in results.items():
        if isinstance(result, Result):
            collections[name] = _describe(result)
            per_query[name] = {
                key: dict(zip(result.query_ids, result.per_query[key].tolist(), strict=True)) for key in result.shown
            }
            written = _mteb_format(result, versions["mteb"])
            write_rankings(folder / "rankings", file_name(name), result.rankings, record["label"])
        else:
            revision = result.whole["dataset_revision"]
            about = {"main_score": result.main_score, "revision": revision, "seconds": round(result.seconds, 3)}
            collections[name], written = result.shown | about, result.whole
        replace_text(folder / f"{file_name(name)}.json", _dump(written))
    replace_text(folder / "per_query.json", _dump(per_query))
    summary = {**record, "collections": collections, "groups": group_means(groups, results), "skipped": skipped}
    replace_text(folder / "metrics.json", _dump({**summary, "versions": versions}))


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
        "revision": task.revision,
        "seconds": round(result.seconds, 3),
    }


def _mteb_format(result: Result, mteb_version: str) -> dict[str, Any]:
    task = result.task
    scores = {key: round(value, 5) for key, value in result.means.items() if not key.endswith("_at_50")}  # not mteb's
    row = {**scores, "main_score": scores[task.main_score], "hf_subset": task.subset, "languages": task.languages}
    return {
        "dataset_revision": task.revision,
        "task_name": task.task_name,
        "mteb_version": mteb_version,
        "scores": {task.split: [row]},
        "evaluation_time": result.seconds,
        "kg_co2_emissions": None,
    }


def file_name(collection: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", collection)


def _dump(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def installed(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of those of these packages that are there."""
    versions = {}
    for package in packages:
        with suppress(PackageNotFoundError):  # one of the two faiss packages, or both
            versions[package] = version(package)
    return versions
