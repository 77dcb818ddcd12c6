"""Score a retriever or BM25 on suites of collections, and `python -m eval.run EXPORT|bm25 --suite NAME ...`.

Called by the launcher before the first stage and after each; every rank calls the same functions, rank 0 writes.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from eval.scores import DEPTH, as_run, per_query_scores
from eval.suites import Task, load_suite
from toolkit import bm25
from toolkit.collectives import PATIENCE, RankZeroFailed, on_rank_zero, rank, world_size
from toolkit.embed import Retriever, embed_texts, gather_rows
from toolkit.files import replace_text
from toolkit.last_words import SECONDS_TO_SPEAK, end, is_told_by_another, say
from toolkit.prepare import on_every_rank
from toolkit.recipe import RecipeError
from toolkit.search import best, top_k

MAIN = ("ndcg_at_10", "recall_at_100", "mrr_at_10")
PACKAGES = ("torch", "transformers", "numpy", "faiss-cpu", "faiss-gpu", "bm25s", "pytrec-eval-terrier", "mteb")

Ranking = tuple[np.ndarray, np.ndarray]  # scores fp32 [q, k], indices of documents int64 [q, k], -1 for none


class Result(NamedTuple):
    task: Task
    query_ids: list[str]
    per_query: dict[str, np.ndarray]  # metric -> [q]
    seconds: float

    @property
    def means(self) -> dict[str, float]:
        return {name: float(values.mean()) for name, values in self.per_query.items()}


def evaluate(
    retriever: Retriever, suites: list[str], folder: Path, label: str, step: int | None
) -> dict[str, dict[str, float]]:
    """Score a retriever by exact search; all ranks call it and get the result, rank 0 writes it.

    Documents that two neighbouring collections share are embedded once.

    Args:
        retriever: in eval mode.
        suites: names as `load_suite` reads them.
        folder: gets metrics.json, per_query.json and one <collection>.json in mteb's format for each collection.
        label, step: what is scored, for the record.

    Returns:
        collection -> {"ndcg_at_10", "recall_at_100", "mrr_at_10", and the collection's own main score}.

    Raises:
        RecipeError: see `load_suite`. ValueError: see `embed_texts`.
    """
    shared: tuple[list[str], np.ndarray] = ([], np.empty((0, 0), np.float32))

    def rank_documents(task: Task, texts: list[str], own: slice, candidates: list[np.ndarray] | None) -> Ranking:
        nonlocal shared
        if shared[0] != texts:
            shared = texts, embed_texts(retriever, texts, "passage")
        queries = embed_texts(retriever, list(task.collection.queries.values()), "query")[own]
        return _dense_top_k(queries, shared[1], candidates)

    dtype = str(next(retriever.encoder.parameters()).dtype).removeprefix("torch.")
    system = {"kind": "dense", "dtype": dtype, "settings": retriever.settings.model_dump()}
    return _evaluate(rank_documents, suites, folder, {"label": label, "step": step, "system": system})


def evaluate_bm25(suites: list[str], folder: Path, cache: Path | None = None) -> dict[str, dict[str, float]]:
    """Score BM25 in the same way; code is split at underscores and changes of case, prose is stemmed.

    `cache`: keeps the index of each collection (toolkit.bm25.bm25_index).
    """

    def rank_documents(task: Task, texts: list[str], own: slice, candidates: list[np.ndarray] | None) -> Ranking:
        queries = list(task.collection.queries.values())[own]
        return bm25.bm25_top_k(texts, queries, DEPTH, code=task.code, candidates=candidates, cache=cache)

    system = {"kind": "bm25", "method": "lucene", "k1_b": bm25.SETTINGS}
    return _evaluate(rank_documents, suites, folder, {"label": "BM25", "step": None, "system": system})


def _evaluate(
    rank_documents: Callable[[Task, list[str], slice, list[np.ndarray] | None], Ranking],
    suites: list[str],
    folder: Path,
    record: dict[str, Any],
) -> dict[str, dict[str, float]]:
    results: dict[str, Result] = {}
    for task in _read_tasks(suites):
        name = task.collection.name
        if name not in results:
            results[name] = _score(task, rank_documents)
        elif results[name].task.revision != task.revision:
            raise RecipeError(f"suites: two different collections are called {name}; rename one of the folders")
    on_rank_zero(lambda: _write(folder, record, results))
    return {name: {key: result.means[key] for key in _main_keys(result.task)} for name, result in results.items()}


def _read_tasks(suites: list[str]) -> Iterator[Task]:
    """The collections of all suites one after another, on every rank; all names are checked before the first."""
    for suite in on_every_rank(lambda: [iter(load_suite(name)) for name in suites]):
        while (task := on_every_rank(lambda suite=suite: next(suite, None))) is not None:
            yield task


def _score(task: Task, rank_documents: Callable[[Task, list[str], slice, list[np.ndarray] | None], Ranking]) -> Result:
    """Each rank searches for its share of the queries; all of them see all rankings."""
    started = time.perf_counter()
    _, documents, queries, qrels = task.collection
    query_ids, document_ids = list(queries), list(documents)
    own = slice(*(len(query_ids) * part // world_size() for part in (rank(), rank() + 1)))
    scores, indices = rank_documents(task, list(documents.values()), own, _candidates(task, query_ids[own]))
    run = as_run(query_ids, document_ids, gather_rows(scores), gather_rows(indices))
    if task.ignore_identical_ids:
        for query, ranking in run.items():
            ranking.pop(query, None)
    per_query = per_query_scores(run, {query: qrels[query] for query in query_ids})
    if task.main_score not in per_query:
        raise RecipeError(f"{task.collection.name}: its main score {task.main_score} is not computed here")
    return Result(task._replace(candidates=None), query_ids, per_query, time.perf_counter() - started)


def _candidates(task: Task, query_ids: list[str]) -> list[np.ndarray] | None:
    """For each query the rising indices of the documents it may find."""
    if task.candidates is None:
        return None
    place = {document: i for i, document in enumerate(task.collection.documents)}
    return [np.array(sorted({place[document] for document in task.candidates[query]})) for query in query_ids]


def _dense_top_k(queries: np.ndarray, documents: np.ndarray, candidates: list[np.ndarray] | None) -> Ranking:
    if candidates is None:
        return top_k(queries, documents, DEPTH)
    k = min(DEPTH, len(documents))
    scores, indices = np.zeros((len(queries), k), np.float32), np.full((len(queries), k), -1, np.int64)
    for row, allowed in enumerate(candidates):
        products = (documents @ queries[row])[allowed]
        chosen = best(products, k)
        scores[row, : len(chosen)], indices[row, : len(chosen)] = products[chosen], allowed[chosen]
    return scores, indices


# --------------------------------------------------------------------------- what is written


def _main_keys(task: Task) -> list[str]:
    return list(dict.fromkeys([*MAIN, task.main_score]))


def _write(folder: Path, record: dict[str, Any], results: dict[str, Result]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    versions = _versions()
    collections = {}
    for name, result in results.items():
        task = result.task
        documents, qrels = task.collection.documents, task.collection.qrels
        collections[name] = {
            **{key: result.means[key] for key in _main_keys(task)},
            "main_score": task.main_score,
            "documents": len(documents),
            "queries": len(result.query_ids),
            "judged_documents_missing": len({d for grades in qrels.values() for d in grades if d not in documents}),
            "ignore_identical_ids": task.ignore_identical_ids,
            "bm25_words": "code" if task.code else "prose",
            "revision": task.revision,
            "seconds": round(result.seconds, 3),
        }
        replace_text(folder / f"{file_name(name)}.json", _dump(_mteb_result(result, versions["mteb"])))
    per_query = {
        name: {key: dict(zip(r.query_ids, r.per_query[key].tolist(), strict=True)) for key in _main_keys(r.task)}
        for name, r in results.items()
    }
    replace_text(folder / "per_query.json", _dump(per_query))
    replace_text(folder / "metrics.json", _dump({**record, "collections": collections, "versions": versions}))


def _mteb_result(result: Result, mteb_version: str) -> dict[str, Any]:
    task = result.task
    scores = {key: round(value, 5) for key, value in result.means.items()}
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


def _versions() -> dict[str, str]:
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # one of the two faiss packages, or both
            continue
    return versions


# --------------------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m eval.run", description="Score an export or BM25 on collections.")
    parser.add_argument("what", help="the export/ folder of a stage, or bm25")
    suites = "stdlib:dev, stdlib:test, FOLDER or FOLDER:split in BEIR layout, an mteb task or benchmark; repeatable"
    parser.add_argument("--suite", action="append", required=True, metavar="NAME", help=suites)
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: EXPORT/eval/<suite>, or eval_bm25")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_args(argv)
    try:
        _run(arguments.what, arguments.suite, arguments.output)
    except RankZeroFailed:  # rank 0 says why; the launcher ends it when this rank ends
        time.sleep(SECONDS_TO_SPEAK)
        return 2
    except (RecipeError, ValueError, ImportError, OSError) as error:
        say(f"error: {error}")
        return 2
    except Exception:
        if is_told_by_another():
            os._exit(2)  # as that rank did: the process group is broken
        raise
    return 0


def _run(what: str, suites: list[str], output: Path | None) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    rows: dict[str, Path] = {}
    if what == "bm25":
        rows["BM25"] = output or Path("eval_bm25")
        evaluate_bm25(suites, rows["BM25"])
    else:
        from toolkit.export import load_export

        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        folder = output or Path(what) / "eval" / file_name("+".join(Path(suite).name for suite in suites))
        rows["BM25"], rows["retriever"] = folder / "bm25", folder
        retriever = on_every_rank(lambda: load_export(Path(what), device))
        evaluate(retriever, suites, folder, label=what, step=None)
        evaluate_bm25(suites, rows["BM25"])
    if rank() == 0:
        _print_table(rows)


def _print_table(rows: dict[str, Path]) -> None:
    table = Table(show_edge=False)
    for title in ("collection", "documents", "queries", "", "nDCG@10", "Recall@100", "MRR@10"):
        is_text = title in ("collection", "")
        table.add_column(title, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    found = {label: json.loads((folder / "metrics.json").read_text())["collections"] for label, folder in rows.items()}
    for name in next(iter(found.values())):
        for label, collections in found.items():
            row = collections[name]
            sizes = [f"{row[key]:,}" for key in ("documents", "queries")]
            table.add_row(name, *sizes, label, *(f"{row[key]:.4f}" for key in MAIN))
    console = Console()
    console.print(table)
    for name, row in next(iter(found.values())).items():
        if row["judged_documents_missing"]:
            console.print(f"{name}: {row['judged_documents_missing']} judged documents are not in the corpus")
    console.print(f"written to {list(rows.values())[-1]}")


if __name__ == "__main__":
    end(main())
