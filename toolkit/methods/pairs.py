"""Rows that are pairs, of several methods: prepared, put in order, and looked at before anything is trained."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from toolkit.data.first_look import Look, check_limit, look_at_pairs, no_negatives, too_few
from toolkit.data.packing import ClusterPlan, pools_of
from toolkit.data.pairs import PairBatch, PairPlan, PairStore, collate_pairs
from toolkit.data.stream import Collate, Plan
from toolkit.data.surrogate import SurrogateVectors
from toolkit.data.tokens import pad_id
from toolkit.methods.method import Feed, Lines, Models, Row, StageRun, Tokenizers
from toolkit.methods.preview import as_tokens
from toolkit.prepare.clusters import prepare_clusters
from toolkit.prepare.negatives import with_negatives
from toolkit.prepare.pairs import prepare_pairs
from toolkit.prepare.surrogate import surrogate_vectors
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.pairs import PairsData, PairSource
from toolkit.recipe.stage import Stage

PairStage = Stage[Any, PairsData]


# (order of the rows, their texts, data section with what was mined, batches of pairs) -> a method's own batches
OwnBatches = Callable[[Plan, PairStore, PairsData, Collate], Collate]


def open_pairs(run: StageRun, models: Models, tokenizer: Any, own_batches: OwnBatches | None = None) -> Feed:
    """The pairs of a stage; mined first, and looked at by a surrogate, where the recipe asks for it."""
    stage = run.stage
    previous = None if run.before is None else run.before / "export"
    data = with_negatives(stage.data, previous, run.run, run.seed, run.device)
    # Limits draw by the recipe's seed, so that those of several stages are nested.
    store = prepare_pairs(data, stage.encoder_settings, models.retriever.folder, run.run, run.seed)
    slots = {"positives": data.positives, "negatives": data.negatives}
    plan, digest = _plan(run, data, store, previous)
    vectors = _surrogate(run, data, store, previous)
    if vectors is not None:
        digest = _digest(digest, vectors.digest)
    settings = {"seed": run.data_seed, "pad_id": pad_id(tokenizer), "surrogate": vectors and vectors[:2]}
    collate = partial(_collate, store, slots | settings)
    collate = collate if own_batches is None else own_batches(plan, store, data, collate)
    return Feed(plan, collate, len(store), "pairs", digest, store.examples)


def _plan(run: StageRun, data: PairsData, store: PairStore, previous: Path | None) -> tuple[Plan, str]:
    """The order of the rows, and a digest of all that decides it besides the seed."""
    pool, packing = run.stage.batch.pool, data.packing
    if packing is None:
        weights = [source.weight for source in data.sources if source.weight is not None]
        return PairPlan(store.sizes, weights or None, pool, data.mix, run.data_seed), store.digest
    within = packing.within or "all"
    pools_of(store.sizes, pool, within)  # an error comes before hours of embedding
    clusters = prepare_clusters(data, store, previous, run.run, run.seed, run.device)
    plan = ClusterPlan(clusters, pool, packing.walk, within, run.data_seed)
    return plan, _digest(store.digest, clusters.digest)


def _surrogate(run: StageRun, data: PairsData, store: PairStore, previous: Path | None) -> SurrogateVectors | None:
    """The vectors by which the objective finds false negatives; None if it does not."""
    rule = run.stage.objective.false_negatives
    if rule is None:
        return None
    at = "objective.false_negatives.surrogate"
    return surrogate_vectors(rule.surrogate, data, store, previous, run.run, run.seed, run.device, at)


def _digest(*parts: str) -> str:
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=8).hexdigest()


def _collate(store: PairStore, settings: dict[str, Any], pool: int, places: np.ndarray, rows: np.ndarray) -> PairBatch:
    return collate_pairs(store, rows, pool, places, **settings)


def pair_row(stage: PairStage) -> Row:
    """What a row of pairs is."""
    data = stage.data
    positives = f"at most {data.positives} positives" if data.positives > 1 else "1 positive"
    negatives = f"at most {data.negatives}" if data.negatives else "0"  # rows may have fewer
    what = f"queries with {positives} and {negatives} hard negatives each"
    documents = data.positives + data.negatives
    return Row(what, 1 + documents, stage.encoder.max_tokens, {"queries": 1, "documents": documents})


def look(source: PairSource, data: PairsData) -> Look:
    """The first rows of a source."""
    seen = look_at_pairs(source, data)
    check_limit(source)
    return seen


def warn(data: PairsData, looks: dict[int, Look]) -> Iterator[tuple[bool, str]]:
    """Slots of the rows that stay empty; mined negatives are found later."""
    if data.mine is not None:
        return
    if data.negatives and len(looks) == len(data.sources) and all(each.negatives is False for each in looks.values()):
        yield True, no_negatives(data.negatives, list(looks.values()))
        return
    for number, each in looks.items():
        have = {"positives": [len(pair.positives) for pair in each.pairs]}
        have["negatives"] = [len(pair.negatives) for pair in each.pairs]
        for key, wanted in (("positives", data.positives), ("negatives", data.negatives)):
            if line := too_few(key, wanted, have[key], "rows looked at"):
                yield False, f"data.sources.{number}: {line}"


def pair_epochs(stage: PairStage, seed: int, counts: list[int], looks: list[Look], tokenizer: Any) -> str:
    """What the steps make of the pairs."""
    del looks, tokenizer
    data, batch = stage.data, stage.batch
    sizes = [min(n, source.limit or n) for n, source in zip(counts, data.sources, strict=True)]
    weights = [source.weight for source in data.sources if source.weight is not None]
    if data.packing is None:
        of_an_epoch = PairPlan(sizes, weights or None, batch.pool, data.mix, seed).pools_per_epoch
    else:
        of_an_epoch = pools_of(sizes, batch.pool, data.packing.within or "all")
    epochs = stage.optim.steps * batch.pools_per_step / of_an_epoch
    longest = " of the source that lasts longest" if len(sizes) > 1 and data.packing is None else ""
    return f"{epochs:.2f}{longest} (more if rows lack a query or positive: they are left out)"


def pair_example(stage: PairStage, number: int, look: Look, tokenizers: Tokenizers) -> Lines:
    """A query, a positive and a hard negative of a source as the model gets them."""
    encoder, source, tokenizer = stage.encoder_settings, stage.data.sources[number], tokenizers("retriever")
    of_query = encoder.query_prefix if source.query_prefix is None else source.query_prefix
    of_passage = encoder.passage_prefix if source.passage_prefix is None else source.passage_prefix
    pair = next((each for each in look.pairs if each.negatives), look.pairs[0])
    lines = [
        as_tokens("query", tokenizer, pair.query, of_query, encoder),
        as_tokens("positive", tokenizer, pair.positives[0], of_passage, encoder),
    ]
    if stage.data.negatives and pair.negatives:
        lines.append(as_tokens("negative", tokenizer, pair.negatives[0], of_passage, encoder))
    elif stage.data.negatives:
        why = "mined before the stage trains" if stage.data.mine else "none in the rows looked at"
        lines.append(("example negative", why))
    return lines


def check_sizes(stage: PairStage, configs: dict[str, PretrainedConfig]) -> None:
    """RecipeError for sizes of vectors that the retriever has not, or whose last is not its own.

    The export holds vectors of all dimensions, so these are trained too.
    """
    sizes = stage.objective.matryoshka
    if sizes is None:
        return
    largest, width = max(sizes), configs["retriever"].hidden_size
    if largest > width:
        raise RecipeError(f"objective.matryoshka: {largest} is more than the model's {width} dimensions; remove it")
    if largest < width:
        problem = f"lacks the model's {width} dimensions, which its export has; add {width}"
        raise RecipeError(f"objective.matryoshka: {problem}")
