"""Tiny tasks of mteb with data of the tests, and a plain encoder behind mteb's protocol."""

from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from mteb.abstasks.classification import AbsTaskClassification
from mteb.abstasks.clustering import AbsTaskClustering
from mteb.abstasks.pair_classification import AbsTaskPairClassification
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.model_meta import ModelMeta, ScoringFunction
from retrievers import ragged_texts

from toolkit.data.records import Collection


class PlainEncoder:
    """A function (texts, "query" or "passage") -> vectors, in the order in which mteb gives the texts."""

    def __init__(self, embed: Callable[[list[str], Any], np.ndarray], revision: str = "1") -> None:
        self.embed = embed
        self.calls = 0
        name = {"name": "test/vectors", "revision": revision, "similarity_fn_name": ScoringFunction.COSINE}
        self.mteb_model_meta = ModelMeta.create_empty(name | {"modalities": ["text"]})

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs):
        self.calls += 1
        texts = [text for batch in inputs for text in batch["text"]]
        return self.embed(texts, "passage" if prompt_type is not None and prompt_type.value == "document" else "query")

    def similarity(self, a, b):
        return a @ b.T

    def similarity_pairwise(self, a, b):
        return (a * b).sum(1)


def _metadata(name: str, kind: str, main_score: str) -> TaskMetadata:
    return TaskMetadata(
        name=name, description="", type=kind, category="t2t", dataset={"path": "local", "revision": "1"},
        eval_splits=["test"], eval_langs=["eng-Latn"], main_score=main_score, modalities=["text"],
    )  # fmt: skip


class LocalRetrieval(AbsTaskRetrieval):
    metadata = _metadata("LocalRetrieval", "Retrieval", "ndcg_at_10")


class LocalSTS(AbsTaskSTS):
    metadata = _metadata("LocalSTS", "STS", "cosine_spearman")
    min_score, max_score = 0, 5


class LocalClassification(AbsTaskClassification):
    metadata = _metadata("LocalClassification", "Classification", "accuracy")
    samples_per_label, n_experiments = 4, 2


class LocalClustering(AbsTaskClustering):
    metadata = _metadata("LocalClustering", "Clustering", "v_measure")
    max_fraction_of_documents_to_embed = None


class LocalPairs(AbsTaskPairClassification):
    metadata = _metadata("LocalPairs", "PairClassification", "max_ap")


def retrieval(collection: Collection, candidates: dict[str, list[str]] | None = None) -> Any:
    """A retrieval task of mteb on a collection."""
    rows = [{"id": i, "text": text, "title": ""} for i, text in collection.documents.items()]
    queries = [{"id": i, "text": text} for i, text in collection.queries.items()]
    data = {"corpus": Dataset.from_list(rows), "queries": Dataset.from_list(queries)}
    judged = {query: dict(grades) for query, grades in collection.qrels.items()}
    return _with(LocalRetrieval(), {"test": data | {"relevant_docs": judged, "top_ranked": candidates}})


def others() -> list[Any]:
    """Similarity, classification, clustering and pairs, each of a few texts."""
    texts = ragged_texts(48, longest=9)
    grades = [float(i % 6) for i in range(24)]
    labels = [i % 3 for i in range(48)]
    pairs: dict[str, list[Any]] = {"sentence1": texts[:24], "sentence2": texts[24:]}
    named = {"text": texts, "label": labels}
    return [
        _with(LocalSTS(), DatasetDict(test=Dataset.from_dict(pairs | {"score": grades}))),
        _with(LocalClassification(), DatasetDict(train=Dataset.from_dict(named), test=Dataset.from_dict(named))),
        _with(LocalClustering(), DatasetDict(test=Dataset.from_dict({"sentences": texts, "labels": labels}))),
        _with(LocalPairs(), DatasetDict(test=Dataset.from_dict(pairs | {"labels": [i % 2 for i in range(24)]}))),
    ]  # fmt: skip


def _with(task: Any, dataset: Any) -> Any:
    task.dataset, task.data_loaded = {"default": dataset}, True
    return task


def of_subsets(parts: dict[tuple[str, str], Collection]) -> Any:
    """A retrieval task of mteb whose subsets (one a language) and splits are collections."""
    subsets, splits = (list(dict.fromkeys(names)) for names in zip(*parts, strict=True))
    task = LocalRetrieval()
    changes = {"eval_langs": {subset: ["eng-Latn"] for subset in subsets}, "eval_splits": splits}
    task.metadata = task.metadata.model_copy(update=changes)
    task.hf_subsets = subsets
    task.dataset = {
        s: {split: retrieval(parts[s, split]).dataset["default"]["test"] for split in splits} for s in subsets
    }
    task.data_loaded = True
    return task
