"""Score a retriever or BM25 on suites of collections.

Called by the launcher before the first stage and after each, and by the command (eval.run); every rank calls the same
functions, rank 0 writes.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eval.answers import accuracies
from eval.mteb_encoder import score_by_mteb
from eval.results import Groups, MtebResult, Result, group_means, write_results
from eval.scores import DEPTH, as_run, per_query_scores
from eval.suites import load_suite
from eval.tasks import MtebTask, Task
from eval.trec import keep_rankings
from toolkit import bm25
from toolkit.collectives import on_rank_zero, rank, world_size
from toolkit.embed import Retriever, checkpoint_digest, encode
from toolkit.prepare import on_every_rank, together
from toolkit.recipe import EvalSettings, RecipeError
from toolkit.retriever_settings import for_task, with_settings
from toolkit.search import search, search_among
from toolkit.vectors import Store, gather_rows, leave
from toolkit.words import reading_of

Ranking = tuple[np.ndarray, np.ndarray]  # scores fp32 [q, k], indices of documents int64 [q, k], -1 for none
RankDocuments = Callable[[Task, list[str], slice, list[np.ndarray] | None], Ranking]


def evaluate(
    retriever: Retriever,
    suites: list[str],
    folder: Path,
    label: str,
    step: int | None,
    changes: EvalSettings | None = None,
    vectors: Path | None = None,
    may_collapse: bool = False,
) -> dict[str, dict[str, float]]:
    """Score a retriever by exact search, and tasks of other kinds by mteb; all ranks get the result, rank 0 writes it.

    The vectors of documents lie on disk, where an interrupted evaluation finds them; identical documents of several
    collections are embedded once. Nothing is taken from mteb's cache of scores.

    Args:
        retriever: in eval mode.
        suites: names as `load_suite` reads them.
        folder: gets metrics.json, per_query.json and one <collection>.json in mteb's format for each collection.
        label, step: what is scored, for the record.
        changes: of the retriever's settings, how ids and prompts are treated, number format of the documents' vectors;
            None: none.
        vectors: a folder that all ranks see, which keeps the vectors of documents for other evaluations of the same
            weights; None: folder/vectors, deleted when the scores are written.
        may_collapse: see `encode`.

    Returns:
        collection -> its reported scores ("ndcg_at_10", "recall_at_100", "mrr_at_10", its own), then group -> means.

    Raises:
        RecipeError: see `load_suite` and `with_settings`. ValueError: see `encode`.
    """
    changes = changes or EvalSettings()  # pyright: ignore[reportCallIssue]
    retriever = with_settings(retriever, changes)
    checkpoint = on_rank_zero(lambda: checkpoint_digest(retriever))
    store = Store(vectors or folder / "vectors", checkpoint, changes.vectors_dtype)

    def rank_documents(task: Task, texts: list[str], own: slice, candidates: list[np.ndarray] | None) -> Ranking:
        prompted = for_task(retriever, changes, task.task_name, task.task_type)
        documents = encode(prompted, task.collection.documents, "passage", store, may_collapse)
        queries = encode(prompted, task.collection.queries, "query", may_collapse=may_collapse).array()
        if candidates is not None:
            return search_among(queries[own], documents, candidates, DEPTH)
        scores, indices = search(queries, documents, DEPTH)
        return scores[own], indices[own]

    system = {
        "kind": "dense",
        "dtype": str(next(retriever.encoder.parameters()).dtype).removeprefix("torch."),
        "checkpoint": checkpoint,
        "vectors": changes.vectors_dtype,
        "settings": retriever.settings.model_dump(),
        "prompts": changes.prompts,
    }

    def by_mteb(task: MtebTask) -> dict[str, MtebResult]:
        return score_by_mteb(task, retriever, changes, label, checkpoint, may_collapse)

    record = {"label": label, "step": step, "system": system, "identical_ids": changes.identical_ids}
    scores = _evaluate(rank_documents, by_mteb, suites, changes, folder, record)
    on_rank_zero(lambda: leave(store, keep=vectors is not None))
    return scores


def evaluate_bm25(
    suites: list[str], folder: Path, changes: EvalSettings | None = None, cache: Path | None = None
) -> dict[str, dict[str, float]]:
    """Score BM25 in the same way; it reads the embedded corpus as code and else prose, unless `changes` says which.

    Prose is read in the language of `changes`, or in each collection's own as detected; metrics.json says in which, and
    for how many queries nothing is found. If that are more than half, a warning says so. Tasks without a search
    (clustering and so on) are left out and named in metrics.json. `cache` keeps the index of each collection
    (toolkit.bm25.bm25_index).
    """
    changes = changes or EvalSettings()  # pyright: ignore[reportCallIssue]
    languages: dict[str, str | None] = {}  # of each collection; None for code
    without: dict[str, int] = {}  # queries of each collection for which nothing is found

    def rank_documents(task: Task, texts: list[str], own: slice, candidates: list[np.ndarray] | None) -> Ranking:
        name, queries = task.collection.name, list(task.collection.queries.values())
        reading = _bm25_reading(task, texts, queries, changes)

        def keep_index() -> None:
            bm25.bm25_index(texts, reading=reading, cache=cache)

        if cache is not None:  # one rank makes it, all read it
            together(keep_index)
        scores, indices = on_every_rank(
            lambda: bm25.bm25_top_k(texts, queries[own], DEPTH, reading=reading, candidates=candidates, cache=cache)
        )
        languages[name] = None if task.code else reading
        without[name] = int(gather_rows((indices < 0).all(1).astype(np.int64)).sum())
        if rank() == 0:
            of, keys = (
                f"queries of {name}",
                "bm25_text and bm25_language (--bm25-text, --bm25-language) before comparing",
            )
            bm25.warn_if_nothing_found(of, without[name], len(queries), reading, keys)
        return scores, indices

    system = {
        "kind": "bm25",
        "method": "lucene",
        "k1_b": bm25.SETTINGS,
        "languages": languages,
        "queries_without_documents": without,
    }
    record = {"label": "BM25", "step": None, "system": system, "identical_ids": changes.identical_ids}
    return _evaluate(rank_documents, None, suites, changes, folder, record)


def _bm25_reading(task: Task, texts: list[str], queries: list[str], changes: EvalSettings) -> str:
    """How BM25 reads a collection; says in one line what is detected, and where a language has no effect."""
    text = "code" if task.code else "prose"
    reading = reading_of(text, changes.bm25_language, texts, queries)
    if rank() == 0:
        if changes.bm25_language is None:
            bm25.say_language(task.collection.name, reading, "bm25_language (--bm25-language)")
        elif task.code:
            print(f"BM25 reads {task.collection.name} as code: bm25_language has no effect on it", flush=True)
    return reading


def _as_asked(task: Task, changes: EvalSettings) -> Task:
    if changes.identical_ids != "task":
        task = task._replace(ignore_identical_ids=changes.identical_ids == "drop")
    return task if changes.bm25_text is None else task._replace(code=changes.bm25_text == "code")


def _evaluate(
    rank_documents: RankDocuments,
    by_mteb: Callable[[MtebTask], dict[str, MtebResult]] | None,
    suites: list[str],
    changes: EvalSettings,
    folder: Path,
    record: dict[str, Any],
) -> dict[str, dict[str, float]]:
    results: dict[str, Result | MtebResult] = {}
    groups: Groups = {}
    of_mteb: dict[str, tuple[Path | None, dict[str, str]]] = {}  # task -> its folder, its collections' main scores
    skipped: list[str] = []
    for task in _read_tasks(suites):
        if isinstance(task, Task):
            _score_once(_as_asked(task, changes), rank_documents, results)
            main_scores = {task.collection.name: task.main_score}
        elif by_mteb is None:
            skipped.append(task.name)
            continue
        else:
            if task.name not in of_mteb:
                found = by_mteb(task)
                results |= found
                of_mteb[task.name] = task.folder, {name: result.main_score for name, result in found.items()}
            folder_before, main_scores = of_mteb[task.name]
            if task.folder != folder_before:
                raise RecipeError(f"suites: two different collections are called {task.name}; name one of them")
        groups.setdefault(task.group, {}).setdefault(task.member, {}).update(main_scores)
    on_rank_zero(lambda: write_results(folder, record, results, groups, skipped))
    return {name: result.shown for name, result in results.items()} | group_means(groups, results)


def _read_tasks(suites: list[str]) -> Iterator[Task | MtebTask]:
    """The collections of all suites one after another, on every rank; all names are checked before the first."""
    for suite in on_every_rank(lambda: [iter(load_suite(name)) for name in suites]):
        while (task := on_every_rank(lambda suite=suite: next(suite, None))) is not None:
            yield task


def _score_once(task: Task, rank_documents: RankDocuments, results: dict[str, Result | MtebResult]) -> None:
    """Score a collection that is not yet among the results; else add the scores that this suite reports besides."""
    name = task.collection.name
    known = results.get(name)
    if known is None:
        results[name] = _score(task, rank_documents)
    elif isinstance(known, Result):
        if known.task.revision != task.revision:
            raise RecipeError(f"suites: two different collections are called {name}; rename one of the folders")
        _check_scores(task, known.per_query)
        reported = tuple(dict.fromkeys([*known.task.reported, *task.reported, task.main_score]))
        results[name] = known._replace(task=known.task._replace(reported=reported))


def _score(task: Task, rank_documents: RankDocuments) -> Result:
    """Each rank searches for its share of the queries; all of them see all rankings."""
    started = time.perf_counter()
    _, documents, queries, qrels = task.collection
    _check_identical_ids(task)
    query_ids, document_ids = list(queries), list(documents)
    own = slice(*(len(query_ids) * part // world_size() for part in (rank(), rank() + 1)))
    texts = list(documents.values())
    scores, indices = rank_documents(task, texts, own, _candidates(task, query_ids[own]))
    scores, indices = gather_rows(scores), gather_rows(indices)
    run = as_run(query_ids, document_ids, scores, indices)
    dropped = 0
    if task.ignore_identical_ids:
        dropped = sum(ranking.pop(query, None) is not None for query, ranking in run.items())
    per_query: dict[str, np.ndarray] = {}
    if any(qrels.values()):
        per_query |= per_query_scores(run, {query: qrels[query] for query in query_ids})
    if task.answers is not None and task.body_starts is not None:
        per_query |= accuracies([task.answers[query] for query in query_ids], texts, task.body_starts, indices)
    _check_scores(task, per_query)
    rankings = keep_rankings(task.collection, run if rank() == 0 else {})
    kept = task._replace(candidates=None, answers=None, body_starts=None)
    return Result(kept, query_ids, per_query, rankings, dropped, time.perf_counter() - started)


def _check_scores(task: Task, per_query: dict[str, np.ndarray]) -> None:
    for key in (task.main_score, *task.reported):
        if key not in per_query:
            raise RecipeError(f"{task.collection.name}: its score {key} is not computed here")


def _check_identical_ids(task: Task) -> None:
    """Where ids are dropped, a query and its relevant document must not share one by chance."""
    hit = [query for query, grades in task.collection.qrels.items() if grades.get(query, 0) > 0]
    if task.ignore_identical_ids and hit:
        raise RecipeError(
            f"{task.collection.name}: dropping documents with the query's id would take relevant ones from {len(hit)} "
            f"queries ({hit[0]}); set identical_ids to keep"
        )


def _candidates(task: Task, query_ids: list[str]) -> list[np.ndarray] | None:
    """For each query the rising indices of the documents it may find, none for one that the candidates do not name."""
    if task.candidates is None:
        return None
    place = {document: i for i, document in enumerate(task.collection.documents)}
    found = ({place[d] for d in task.candidates.get(query, []) if d in place} for query in query_ids)
    return [np.array(sorted(numbers), np.int64) for numbers in found]
