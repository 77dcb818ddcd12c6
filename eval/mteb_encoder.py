"""Tasks that mteb scores itself (clustering, classification, similarity ...), with vectors from all ranks.

Called by eval.evaluate. mteb runs on rank 0 alone; the other ranks wait for its requests to embed, so that no rank can
take another way through mteb's code than the others and hang them.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from eval.contexts import Contexts
from eval.mteb_files import Scored
from eval.results import MtebResult
from eval.tasks import MtebTask
from toolkit.collectives import on_rank_zero, rank
from toolkit.models.retriever import Retriever
from toolkit.recipe.evaluation import EvalSettings
from toolkit.retrieval.embed import encode
from toolkit.retrieval.settings import for_task

TEXTS_PER_REQUEST = 8192  # they travel as text

Embed = Callable[[str, str, str, list[str]], np.ndarray]


class MtebEncoder:
    """mteb's EncoderProtocol around a function (task, its type, "query" or "passage", texts) -> vectors."""

    def __init__(self, model_name: str, revision: str | None, *, embed: Embed, cosine: bool, **kwargs: Any) -> None:
        from mteb.models.model_meta import ModelMeta, ScoringFunction  # mteb takes seconds

        self._embed = embed
        self._cosine = cosine
        function = ScoringFunction.COSINE if cosine else ScoringFunction.DOT_PRODUCT
        about = {"name": model_name, "revision": revision, "similarity_fn_name": function, "modalities": ["text"]}
        self.mteb_model_meta = ModelMeta.create_empty(about)

    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None, **kwargs: Any
    ) -> np.ndarray:
        """Vectors of a DataLoader's texts [n, dim]; texts of no kind are queries."""
        texts = [text for batch in inputs for text in batch["text"]]
        kind = "passage" if prompt_type is not None and prompt_type.value == "document" else "query"
        parts = [
            self._embed(task_metadata.name, task_metadata.type, kind, texts[first : first + TEXTS_PER_REQUEST])
            for first in range(0, len(texts), TEXTS_PER_REQUEST)
        ]
        vectors = np.concatenate(parts)
        if len(vectors) != len(texts):
            raise ValueError(f"{task_metadata.name}: {len(vectors)} vectors came back for {len(texts)} texts")
        return vectors

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        from mteb.similarity_functions import cos_sim, dot_score  # mteb takes seconds

        return (cos_sim if self._cosine else dot_score)(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        from mteb.similarity_functions import pairwise_cos_sim, pairwise_dot_score  # mteb takes seconds

        return (pairwise_cos_sim if self._cosine else pairwise_dot_score)(embeddings1, embeddings2)


def score_by_mteb(
    task: MtebTask,
    retriever: Retriever,
    changes: EvalSettings,
    scored: Scored,
    may_collapse: bool,
    contexts: Contexts,
) -> dict[str, MtebResult]:
    """Collection -> scores of a task's subsets and splits; every rank calls it.

    A context of the task itself is drawn from the first of its texts that are embedded together.

    Raises:
        RecipeError: if the data cannot be loaded. ValueError: see `encode`.
    """

    prompted: dict[str, Retriever] = {}

    def embed(name: str, task_type: str, kind: Any, texts: list[str]) -> np.ndarray:
        if name not in prompted:
            prompted[name], _ = contexts.of(name, for_task(retriever, changes, name, task_type), texts)
        numbered = {str(i): text for i, text in enumerate(texts)}
        return encode(prompted[name], numbered, kind, may_collapse=may_collapse).array()

    def score(embed: Embed) -> dict[str, Any]:
        import mteb  # takes seconds to import: only for those who ask for it

        from eval.hub_layout import readable  # imports mteb

        encoder = MtebEncoder(*scored, embed=embed, cosine=retriever.settings.normalize)
        options: Any = {"batch_size": 64, "show_progress_bar": False}
        readable(info.name, info.dataset["path"], task.task.load_data, task.folder)
        done = mteb.evaluate(
            encoder, task.task, encode_kwargs=options, cache=None, co2_tracker=False, show_progress_bar=False
        )
        return json.loads(done.task_results[0].model_dump_json())

    info, started = task.task.metadata, time.perf_counter()
    whole = _on_rank_zero_with_all(score, embed)
    return by_collection(task, whole, time.perf_counter() - started)


def by_collection(task: MtebTask, whole: dict[str, Any], seconds: float) -> dict[str, MtebResult]:
    """Collection -> scores, of mteb's result of a task."""
    results = {}
    for split, rows in whole["scores"].items():
        for row in rows:
            subset = [row["hf_subset"]] if len(task.task.hf_subsets) > 1 else []
            name = ":".join([task.name, *subset, *([split] if len(whole["scores"]) > 1 else [])])
            results[name] = MtebResult(task.task.metadata.main_score, row, whole, seconds)
    return results


def _on_rank_zero_with_all(work: Callable[[Embed], Any], embed: Embed) -> Any:
    """What `work` returns on rank 0, on every rank; whenever it embeds, all ranks do so together.

    Raises:
        RankZeroFailed: on the other ranks, when `work` failed on rank 0 outside of embedding.
    """
    if rank() != 0:
        while "embed" in (message := on_rank_zero(lambda: None)):
            embed(*message["embed"])
        return message["result"]
    together = False

    def ask(*request: Any) -> np.ndarray:
        nonlocal together
        on_rank_zero(lambda: {"embed": request})
        together = True  # from here on all ranks do the same: what one raises, all raise
        vectors = embed(*request)
        together = False
        return vectors

    try:
        result = work(ask)
    except BaseException as error:
        problem = error
        if not together:
            on_rank_zero(lambda: _raise(problem))  # ends the others' waiting, and raises here
        raise
    return on_rank_zero(lambda: {"result": result})["result"]


def _raise(error: BaseException) -> None:
    raise error
