"""Score a retriever or BM25 on suites of collections.

Called by the launcher before the first stage and after each, and by the command (eval.run); every rank calls the same
functions, rank 0 writes.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eval.answers import accuracies
from eval.contexts import Contexts
from eval.earlier import is_unfinished
from eval.mteb_encoder import score_by_mteb
from eval.mteb_files import name_scored
from eval.progress import Progress
from eval.results import MtebResult, Result, group_means
from eval.scores import DEPTH, as_run, per_query_scores
from eval.suites import load_suite
from eval.tasks import MtebTask, Task
from eval.trec import keep_rankings
from toolkit.collectives import on_rank_zero, rank, world_size
from toolkit.models.retriever import Retriever
from toolkit.ranks.together import on_every_rank, together
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.evaluation import EvalSettings
from toolkit.retrieval import bm25
from toolkit.retrieval.embed import checkpoint_digest, encode
from toolkit.retrieval.search import search, search_among
from toolkit.retrieval.settings import for_task, with_settings
from toolkit.retrieval.vectors import Store, adopt, gather_rows, leave
from toolkit.retrieval.words import reading_of


class Ranked(NamedTuple):
    """What a system finds for some queries of a collection."""

    scores: np.ndarray  # fp32 [q, k]
    indices: np.ndarray  # of documents, int64 [q, k], -1 for none
    noted: dict[str, Any]  # what the collection's record says of it besides


RankDocuments = Callable[[Task, list[str], slice, list[np.ndarray] | None, int], Ranked]  # the last: how many


def evaluate(
    retriever: Retriever,
    suites: list[str],
    folder: Path,
    label: str,
    step: int | None,
    changes: EvalSettings | None = None,
    vectors: Path | None = None,
    may_collapse: bool = False,
    beside: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Score a retriever by exact search, and tasks of other kinds by mteb; all ranks get the result, rank 0 writes it.

    Each collection's scores are said and written as it ends. An interrupted evaluation that is started again does not
    score them again if weights, settings, data and versions are the same; vectors lie on disk, where it finds them.
    Identical documents of several collections are embedded once. Nothing is taken from mteb's cache of scores.

    Args:
        retriever: in eval mode.
        suites: names as `load_suite` reads them.
        folder: gets metrics.json, per_query.json, rankings/, and the scores in mteb's format: results/ in the layout of
            mteb's cache, and <collection>.json for each collection that mteb does not know.
        label, step: what is scored, for the record.
        changes: of the retriever's settings, how ids and prompts are treated, the context of a contextual retriever,
            number format of the documents' vectors; None: none.
        vectors: a folder that all ranks see, which keeps the vectors for other evaluations of the same weights; None:
            folder/vectors, deleted when all scores are written.
        may_collapse: see `encode`.
        beside: a result of BM25, whose scores are said beside those of the same data.

    Returns:
        collection -> its reported scores ("ndcg_at_10", "recall_at_100", "mrr_at_10", its own), then group -> means.

    Raises:
        RecipeError: see `load_suite` and `with_settings`. ValueError: see `encode`.
    """
    changes = changes or EvalSettings()  # pyright: ignore[reportCallIssue]
    retriever = with_settings(retriever, changes)
    contexts = Contexts(retriever, changes.context, folder)
    retriever = contexts.bare(retriever)
    checkpoint = on_rank_zero(lambda: checkpoint_digest(retriever))
    store = Store(vectors or folder / "vectors", checkpoint, changes.vectors_dtype)
    kept = on_rank_zero(lambda: _prepare_store(store, folder, vectors))

    def rank_documents(task: Task, texts: list[str], own: slice, candidates: list[np.ndarray] | None, k: int) -> Ranked:
        prompted = for_task(retriever, changes, task.task_name, task.task_type)
        prompted, noted = contexts.of(task.collection.name, prompted, texts)
        documents = encode(prompted, task.collection.documents, "passage", store, may_collapse)
        exact = store._replace(dtype="fp32")  # they are few; documents alone may be kept in less
        queries = encode(prompted, task.collection.queries, "query", exact, may_collapse).array()
        if candidates is not None:
            return Ranked(*search_among(queries[own], documents, candidates, k), noted)
        scores, indices = search(queries, documents, k)
        return Ranked(scores[own], indices[own], noted)

    system = {
        "kind": "dense",
        "dtype": str(next(retriever.encoder.parameters()).dtype).removeprefix("torch."),
        "checkpoint": checkpoint,
        "vectors": changes.vectors_dtype,
        "settings": retriever.settings.model_dump(),
        "prompts": changes.prompts,
        **contexts.record(),
    }

    scored = name_scored(label, [system, changes.identical_ids])

    def by_mteb(task: MtebTask) -> dict[str, MtebResult]:
        return score_by_mteb(task, retriever, changes, scored, may_collapse, contexts)

    record = {"label": label, "step": step, "system": system, "identical_ids": changes.identical_ids}
    progress = Progress(folder, record | {"mteb": scored._asdict()}, beside)
    scores = _evaluate(rank_documents, by_mteb, suites, changes, progress)
    on_rank_zero(lambda: leave(store, kept))
    return scores


def _prepare_store(store: Store, folder: Path, vectors: Path | None) -> bool:
    """Clear away what an interrupted evaluation left beside a store; returns whether the store's vectors are kept."""
    own = folder / "vectors"
    if vectors is not None and vectors.resolve() == own.resolve():  # there the user keeps them
        return True
    if is_unfinished(folder):
        adopt(own, store)
        return vectors is not None
    there = (own / store.checkpoint).is_dir()
    if there:
        print(f"vectors: {own}: kept, as they were there when the last evaluation had ended", flush=True)
    return vectors is not None or there


def evaluate_bm25(
    suites: list[str], folder: Path, changes: EvalSettings | None = None, cache: Path | None = None
) -> dict[str, dict[str, float]]:
    """Score BM25 in the same way; it reads the embedded corpus as code and else prose, unless `changes` says which.

    Prose is read in the language of `changes`, or in each collection's own as detected; metrics.json says in which, and
    for how many queries nothing is found. If that are more than half, a warning says so. Tasks without a search
    (clustering and so on) are left out and named in metrics.json. `cache` keeps the index of each collection
    (toolkit.retrieval.bm25.bm25_index).
    """
    changes = changes or EvalSettings()  # pyright: ignore[reportCallIssue]

    def rank_documents(task: Task, texts: list[str], own: slice, candidates: list[np.ndarray] | None, k: int) -> Ranked:
        name, queries = task.collection.name, list(task.collection.queries.values())
        reading = _bm25_reading(task, texts, queries, changes)

        def keep_index() -> None:
            bm25.bm25_index(texts, reading=reading, cache=cache)

        if cache is not None:  # one rank makes it, all read it
            together(keep_index)
        scores, indices = on_every_rank(
            lambda: bm25.bm25_top_k(texts, queries[own], k, reading=reading, candidates=candidates, cache=cache)
        )
        without = int(gather_rows((indices < 0).all(1).astype(np.int64)).sum())
        if rank() == 0:
            keys = "bm25_text and bm25_language (--bm25-text, --bm25-language) before comparing"
            bm25.warn_if_nothing_found(f"queries of {name}", without, len(queries), reading, keys)
        noted = {"bm25_language": None if task.code else reading, "queries_without_documents": without}
        return Ranked(scores, indices, noted)

    system = {"kind": "bm25", "method": "lucene", "k1_b": bm25.SETTINGS}
    record = {"label": "BM25", "step": None, "system": system, "identical_ids": changes.identical_ids}
    settings = {key: value for key, value in changes.model_dump().items() if key.startswith("bm25_")}
    scored = name_scored("BM25", [system, changes.identical_ids, settings])
    on_rank_zero(lambda: adopt(folder / "vectors", None) if is_unfinished(folder) else None)
    return _evaluate(rank_documents, None, suites, changes, Progress(folder, record | {"mteb": scored._asdict()}, None))


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
    progress: Progress,
) -> dict[str, dict[str, float]]:
    folders: dict[str, Path | None] = {}  # task that mteb scores -> where its data are
    for suite in _suites(suites):
        for task in _tasks(suite):
            if isinstance(task, Task):
                _score_once(_as_asked(task, changes), rank_documents, progress)
                main_scores = {task.collection.name: task.main_score}
            elif by_mteb is None:
                progress.skipped.append(task.name)
                continue
            else:
                if task.name not in folders:
                    progress.add_task(task, progress.finished_task(task) or by_mteb(task))
                    folders[task.name] = task.folder
                if task.folder != folders[task.name]:
                    raise RecipeError(f"suites: two different collections are called {task.name}; name one of them")
                main_scores = progress.main_scores_of(task)
            progress.count(task, main_scores)
        progress.end_suite()
    progress.end()
    results = progress.results
    return {name: result.shown for name, result in results.items()} | group_means(progress.groups, results)


def _suites(suites: list[str]) -> list[Iterator[Task | MtebTask]]:
    """The collections of each suite, to be read one after another; all names are checked before the first."""
    return on_every_rank(lambda: [iter(load_suite(name)) for name in suites])


def _tasks(suite: Iterator[Task | MtebTask]) -> Iterator[Task | MtebTask]:
    """The collections of a suite one after another, on every rank."""
    while (task := on_every_rank(lambda: next(suite, None))) is not None:
        yield task


def _score_once(task: Task, rank_documents: RankDocuments, progress: Progress) -> None:
    """Score a collection that is not yet among the results; else add the scores that this suite reports besides."""
    name = task.collection.name
    known = progress.results.get(name)
    if known is None:
        if not progress.find(task):
            progress.add(task, _score(task, rank_documents))
    elif isinstance(known, Result):
        if known.task.revision != task.revision:
            raise RecipeError(f"suites: two different collections are called {name}; rename one of the folders")
        reported = tuple(dict.fromkeys([*known.task.reported, *task.reported, task.main_score]))
        if name in progress.found and any(key not in known.per_query for key in reported):  # of fewer suites
            task = task._replace(reported=reported, main_score=known.task.main_score)
            known = progress.add(task, _score(task, rank_documents))
        _check_scores(task, known.per_query)
        progress.results[name] = known._replace(task=known.task._replace(reported=reported))


def _score(task: Task, rank_documents: RankDocuments) -> Result:
    """Each rank searches for its share of the queries; all of them see all rankings."""
    started = time.perf_counter()
    _, documents, queries, qrels = task.collection
    _check_identical_ids(task)
    query_ids, document_ids = list(queries), list(documents)
    own = slice(*(len(query_ids) * part // world_size() for part in (rank(), rank() + 1)))
    texts = list(documents.values())
    candidates, excluded = _candidates(task, query_ids[own]), _excluded(task)
    deeper = 0 if candidates is not None else max(map(len, excluded.values()), default=0)  # what they take away
    scores, indices, noted = rank_documents(task, texts, own, candidates, DEPTH + deeper)
    _take_out(scores, indices, [excluded.get(query) for query in query_ids[own]])
    scores, indices = gather_rows(scores[:, :DEPTH]), gather_rows(indices[:, :DEPTH])
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
    return Result(task, query_ids, per_query, rankings, dropped, noted, time.perf_counter() - started)


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
    excluded = _excluded(task)
    found = ({place[d] for d in task.candidates.get(query, []) if d in place} for query in query_ids)
    own = (np.array(sorted(numbers), np.int64) for numbers in found)
    return [numbers[~np.isin(numbers, excluded.get(q, []))] for q, numbers in zip(query_ids, own, strict=True)]


def _excluded(task: Task) -> dict[str, list[int]]:
    """Query -> indices of the documents that it must not find, for those queries that have some."""
    if task.excluded is None:
        return {}
    place = {document: i for i, document in enumerate(task.collection.documents)}
    found = {query: [place[d] for d in documents if d in place] for query, documents in task.excluded.items()}
    return {query: numbers for query, numbers in found.items() if numbers}


def _take_out(scores: np.ndarray, indices: np.ndarray, excluded: list[list[int] | None]) -> None:
    """Take documents out of rankings in place; those behind them move up, and the last places hold none."""
    for row, numbers in enumerate(excluded):
        if numbers is not None:
            stays = ~np.isin(indices[row], numbers)
            count = int(stays.sum())
            for ranking, none in ((scores, 0), (indices, -1)):
                ranking[row, :count], ranking[row, count:] = ranking[row, stays], none
