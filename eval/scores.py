"""Rankings -> scores per query and their means, by pytrec_eval under mteb's names. Called by eval.evaluate."""

import numpy as np
import pytrec_eval

K_VALUES = (1, 3, 5, 10, 20, 50, 100, 1000)  # those of mteb, and 50, at which MS MARCO counts recall
DEPTH = max(K_VALUES)
MEASURES = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P", "hit_rate": "success"}

Run = dict[str, dict[str, float]]  # query id -> document id -> score
Qrels = dict[str, dict[str, int]]  # query id -> document id -> grade


def as_run(query_ids: list[str], document_ids: list[str], scores: np.ndarray, indices: np.ndarray) -> Run:
    """The arrays of a search [q, k] as a run; places with index -1 hold no document."""
    return {
        query: {document_ids[i]: float(score) for i, score in zip(places, row, strict=True) if i >= 0}
        for query, places, row in zip(query_ids, indices, scores, strict=True)
    }


def per_query_scores(run: Run, qrels: Qrels) -> dict[str, np.ndarray]:
    """Scores of every judged query, in the order of `qrels`: {"ndcg_at_10": [q], ...}; a query without run scores 0.

    As in trec_eval, documents of equal score are ordered by descending id, and a query whose judgements are all 0
    stays in the mean with 0. The reciprocal rank is taken on the run cut at k.
    """
    cuts = ",".join(map(str, K_VALUES))
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {f"{measure}.{cuts}" for measure in MEASURES.values()})
    found = evaluator.evaluate({query: run.get(query, {}) for query in qrels})
    scores = {
        f"{name}_at_{k}": np.array([found[query][f"{measure}_{k}"] for query in qrels])
        for name, measure in MEASURES.items()
        for k in K_VALUES
    }
    first = np.array([_rank_of_first_relevant(run.get(query, {}), grades) for query, grades in qrels.items()])
    return scores | {f"mrr_at_{k}": np.where(first <= k, 1 / first, 0.0) for k in K_VALUES}


def _rank_of_first_relevant(ranking: dict[str, float], grades: dict[str, int]) -> float:
    """From 1; infinite if no relevant document is in the ranking."""
    ordered = sorted(ranking.items(), key=lambda item: (item[1], item[0]), reverse=True)
    return next((rank for rank, (document, _) in enumerate(ordered, 1) if grades.get(document, 0) > 0), np.inf)
