"""A suite's name -> the collections it means: the embedded corpus, a folder in BEIR layout, an mteb task or benchmark.

Called by eval.run.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from toolkit.data.beir import beir_splits, read_beir_texts, read_judgements
from toolkit.data.records import Collection
from toolkit.data.stdlib_corpus import collection as stdlib_collection
from toolkit.recipe import RecipeError

STDLIB: dict[str, Literal["dev", "test"]] = {"stdlib:dev": "dev", "stdlib:test": "test"}


class Task(NamedTuple):
    """A collection and how it is scored."""

    collection: Collection
    task_name: str
    subset: str
    split: str
    revision: str
    languages: list[str]
    main_score: str = "ndcg_at_10"
    code: bool = False  # BM25 reads identifiers, not prose
    ignore_identical_ids: bool = (
        False  # drop the document whose id equals the query's (mteb: off unless the task says so)
    )
    candidates: dict[str, list[str]] | None = None  # query id -> the documents it may find; None: all


def load_suite(name: str) -> Iterable[Task]:
    """The collections of a suite, read one at a time where they come from mteb; only queries with judgements are kept.

    Args:
        name: "stdlib:dev", "stdlib:test"; a folder in BEIR layout, FOLDER or FOLDER:split; an mteb retrieval task or
            benchmark.

    Raises:
        RecipeError: for an unknown name or split, a malformed file (with file and line), a hub that cannot be reached.
    """
    if name.startswith("stdlib:"):
        if name not in STDLIB:
            raise RecipeError(f"suite {name}: no such split; use {' or '.join(STDLIB)}")
        return [_local_task(stdlib_collection(STDLIB[name]), "stdlib", STDLIB[name], code=True)]
    folder, colon, split = name.rpartition(":")
    if Path(name).is_dir():
        return [_load_folder(Path(name), None)]
    if colon and Path(folder).is_dir():
        return [_load_folder(Path(folder), split)]
    if name.startswith((".", "/", "~")):
        raise RecipeError(f"suite {name}: no such folder; name a folder with corpus.jsonl, queries.jsonl and qrels/")
    return (part for task in _find_mteb_tasks(name) for part in _load_mteb_task(task))


def _local_task(collection: Collection, task_name: str, split: str, code: bool) -> Task:
    content = json.dumps(collection, ensure_ascii=False).encode()
    revision = hashlib.sha256(content).hexdigest()[:16]
    judged = {query: collection.queries[query] for query in collection.qrels}
    return Task(collection._replace(queries=judged), task_name, "default", split, revision, ["eng-Latn"], code=code)


# --------------------------------------------------------------------------- a folder in BEIR layout


def _load_folder(folder: Path, split: str | None) -> Task:
    splits = beir_splits(folder)
    if split is None:
        split = "test" if "test" in splits else splits[0] if len(splits) == 1 else None
    if split not in splits:
        found = ", ".join(f"{folder}:{s}" for s in splits) or "none (a split is a file qrels/NAME.tsv)"
        raise RecipeError(f"{folder}: name one of its splits; found {found}")
    documents, queries = read_beir_texts(folder / "corpus.jsonl"), read_beir_texts(folder / "queries.jsonl")
    qrels = read_judgements(folder / "qrels" / f"{split}.tsv", queries)
    if not any(grade > 0 and did in documents for grades in qrels.values() for did, grade in grades.items()):
        raise RecipeError(f"{folder}/qrels/{split}.tsv: no judged document is in corpus.jsonl; their ids must agree")
    name = folder.resolve().name
    return _local_task(Collection(f"{name}:{split}", documents, queries, qrels), name, split, code=False)


# --------------------------------------------------------------------------- mteb


def _find_mteb_tasks(name: str) -> list[Any]:
    import mteb  # takes seconds to import: only for those who ask for it
    from mteb.abstasks.aggregated_task import AbsTaskAggregate
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    benchmarks = {label: b for b in mteb.get_benchmarks() for label in (b.name, *b.aliases)}
    if name in benchmarks:
        found = list(benchmarks[name].tasks)
    else:
        try:
            found = [mteb.get_task(name)]
        except KeyError:
            known = [task.metadata.name for task in mteb.get_tasks(task_types=["Retrieval"])]
            known += [*benchmarks, *STDLIB]
            close = difflib.get_close_matches(name, known, n=3)
            hint = (
                f"did you mean {' or '.join(close)}?" if close else "name a folder, an mteb task or an mteb benchmark"
            )
            raise RecipeError(f"suite {name}: no folder and no mteb task or benchmark of this name; {hint}") from None
    tasks = [part for task in found for part in (task.tasks if isinstance(task, AbsTaskAggregate) else [task])]
    others = [
        t.metadata.name for t in tasks if not isinstance(t, AbsTaskRetrieval) or t.metadata.modalities != ["text"]
    ]
    if others:
        raise RecipeError(f"suite {name}: {', '.join(others)}: no text retrieval; name the retrieval tasks one by one")
    return tasks


def _load_mteb_task(task: Any) -> Iterator[Task]:
    """One collection for each subset and evaluation split of an mteb task."""
    from huggingface_hub.utils import logging

    info = task.metadata
    logging.set_verbosity_error()  # it retries for 20 s and logs each try; the error below says it once
    try:
        task.load_data()
    except OSError as error:  # what the hub's clients raise without network, for gated and for missing data
        reason = str(error).splitlines()[0]
        raise RecipeError(
            f"suite {info.name}: {info.dataset['path']} cannot be loaded ({reason}); give a folder"
        ) from error
    task.convert_v1_dataset_format_to_v2(num_proc=None)
    for subset in task.hf_subsets:
        for split in task.eval_splits:
            data = task.dataset[subset][split]
            texts = {row["id"]: _query_text(info.name, row) for row in data["queries"]}
            qrels = {query: dict(data["relevant_docs"][query]) for query in texts if data["relevant_docs"].get(query)}
            documents = {row["id"]: f"{row.get('title') or ''} {row['text']}".strip() for row in data["corpus"]}
            name = ":".join(
                [
                    info.name,
                    *([subset] if len(task.hf_subsets) > 1 else []),
                    *([split] if len(task.eval_splits) > 1 else []),
                ]
            )
            yield Task(
                Collection(name, documents, {query: texts[query] for query in qrels}, qrels),
                task_name=info.name,
                subset=subset,
                split=split,
                revision=info.dataset["revision"],
                languages=info.hf_subsets_to_langscripts[subset],
                main_score=info.main_score,
                ignore_identical_ids=task.ignore_identical_ids,
                candidates=data["top_ranked"],
            )
    task.unload_data()


def _query_text(task: str, row: dict[str, Any]) -> str:
    if not isinstance(row["text"], str):
        raise RecipeError(f"suite {task}: its queries are conversations, which are not read here")
    return f"{row['text']} {row['instruction']}" if row.get("instruction") else row["text"]
