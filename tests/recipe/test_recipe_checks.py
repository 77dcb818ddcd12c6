"""Checks of a recipe: keys that contradict one another are named with path and fix."""

import copy
import json
from typing import Any

import pytest
import Stemmer
from recipe_changes import BUILD, LM_START, MISSING, RECIPES, START_FIX, TINY, changed, problems, write

from toolkit.recipe.schema import load_recipe


def second(method: str, **keys: Any) -> list[tuple[str, Any]]:
    """Changes that make stage 1 that of tiny/<method>.json, with its section__key set."""
    stage = json.loads((RECIPES / "tiny" / f"{method}.json").read_text())["stages"][1]
    return [("stages.1", stage), *((f"stages.1.{key.replace('__', '.')}", value) for key, value in keys.items())]


LORA = {"rank": 2, "alpha": 2, "dropout": 0.0, "targets": ["q_proj"]}
GROUPS = {"folder": "g", "format": "groups"}
BUILT_BEFORE = "revela starts from a trained model; build it in a language_model stage before this one"
NO_LM_BEFORE = "no language_model stage comes just before; name a hub id or a folder"
FILES, PAIRS, BEIR = {"stdlib": "files"}, {"folder": "p", "format": "pairs"}, {"folder": "b", "format": "beir"}
CROPS = {"chunk_tokens": 48, "min_ratio": 0.1, "max_ratio": 0.5, "delete": 0.1}
CODE_IN_GERMAN = {"bm25_text": "code", "bm25_language": "german"}
NO_LANGUAGE = 'code is read without a language; leave it out, or set text to "prose"'
UNKNOWN_LANGUAGE = (
    "input should be 'none', 'ngrams', "
    + ", ".join(f"'{name}'" for name in Stemmer.algorithms()[:-1])
    + f" or '{Stemmer.algorithms()[-1]}'; found \"klingon\""
)
BM25, NGRAMS = {"by": "bm25", "text": "code"}, {"ngram": 5, "threshold": 0.5}
BM25_IN_GERMAN = BM25 | {"svd": 8, "language": "german"}
NOT_DEALT = "only documents whose passages are dealt (interleave) have neighbours; remove the key"
Q_TO_D, D_TO_Q = "query_to_document", "document_to_query"
Q_TO_D_ALONE = "is for queries against documents alone; remove it, or the other directions"
RELATIVE = {"surrogate": {"by": "previous"}, "rule": "relative", "eps": 0.0}
KEYS_OF_A_STEP = "is no multiple of the 32 keys of a step (views x pool x pools_per_step)"
NVME_STAGE = 'NVMe works at ZeRO stage 3 only; set stage to 3 or offload_optimizer to "cpu"'
MAX_TOKENS = TINY["stages"][0]["start"]["build"]["max_tokens"]
STOP_0, STOP_1 = "stages.0.eval.stop_if_worse", "stages.1.eval.stop_if_worse"
ELSE = "remove it, or change objective.name"
OF_PASSAGES = f"unknown key; language_model and revela have it: {ELSE}"
OF_REVELA = f"unknown key; revela has it: {ELSE}"
OF_CONTRASTIVE = f"unknown key; contrastive and cde have it: {ELSE}"
OF_A_PAIR = "known: clusters, faulty_rows, mine, mix, negatives, packing, positives, sources"
OF_A_TEXT = "known: faulty_rows, interleave, neighbours, passages, sources"
CROSS = {
    "stop without scores": (
        [(STOP_1, {"than": "bm25"})],
        [f"{STOP_1}: nothing is scored after this stage; name suites, or set it to null"],
    ),
    "stop in the first stage": (
        [("stages.0.eval.suites", ["stdlib:dev"]), (STOP_0, {"than": "previous"})],
        [f'{STOP_0}.than: there is no stage before the first; write "start" or "bm25"'],
    ),
    "context of a retriever that reads none": (
        [("stages.1.eval.context", {"from": "corpus"})],
        ["stages.1.eval.context: what revela trains reads no context; remove the key"],
    ),
    "stop on other suites": (
        [
            ("stages.0.eval.suites", ["stdlib:test"]),
            ("stages.1.eval.suites", ["stdlib:dev"]),
            (STOP_1, {"than": "previous"}),
        ],
        [f"{STOP_1}.than: stage language_model is scored on none of this stage's suites; give it one of them"],
    ),
    "stage name twice": (
        [("stages.1.name", "language_model")],
        ["stages.1.name: 'language_model' names an earlier stage too; give each stage its own name"],
    ),
    "previous in the first stage": (
        [("stages.0.start", "previous")],
        [f"stages.0.start: there is no stage before the first; {START_FIX}"],
    ),
    "built retriever for revela": (
        [("stages.1.start", TINY["stages"][0]["start"])],
        [f"stages.1.start: {BUILT_BEFORE}"],
    ),
    "built language model for revela": (
        [(LM_START, TINY["stages"][0]["start"])],
        [f"{LM_START}: {BUILT_BEFORE}"],
    ),
    "no language model before": (
        [("stages.0", copy.deepcopy(TINY["stages"][1]) | {"start": {"hub": "a/b"}, "name": "first"})],
        [f"stages.0.objective.language_model.start: {NO_LM_BEFORE}", f"{LM_START}: {NO_LM_BEFORE}"],
    ),
    "other ids than BM25's": (
        [("stages.1.eval.identical_ids", "drop")],
        ["stages.1.eval.identical_ids: differs from the first stage's, with which BM25 is scored; make them equal"],
    ),
    "other words than BM25's": (
        [("stages.1.eval.bm25_text", "code")],
        ["stages.1.eval.bm25_text: differs from the first stage's, with which BM25 is scored; make them equal"],
    ),
    "another language than BM25's": (
        [("stages.1.eval.bm25_language", "german")],
        ["stages.1.eval.bm25_language: differs from the first stage's, with which BM25 is scored; make them equal"],
    ),
    "code in a language": (
        [
            *((f"stages.{i}.eval.{key}", value) for i in (0, 1) for key, value in CODE_IN_GERMAN.items()),
            ("stages.1.data.neighbours", BM25 | {"language": "german"}),
        ],
        [
            f"stages.0.eval.bm25_language: {NO_LANGUAGE}",
            f"stages.1.data.neighbours.language: {NO_LANGUAGE}",
            f"stages.1.eval.bm25_language: {NO_LANGUAGE}",
        ],
    ),
    "an unknown language": (
        [("stages.1.data.neighbours", BM25 | {"text": "prose", "language": "klingon"})],
        ["stages.1.data.neighbours.language: " + UNKNOWN_LANGUAGE],
    ),
    "evaluated longer than built": (
        [("stages.0.eval.max_tokens", 100_000)],
        [f"stages.0.eval.max_tokens: 100000 is above the built model's max_tokens {MAX_TOKENS}; lower it"],
    ),
    "heads": (
        [(f"{BUILD}.heads", 5)],
        [
            f"{BUILD}.heads: 5 does not divide hidden_size 32; change one",
            f"{BUILD}.kv_heads: 2 does not divide heads 5; change one",
        ],
    ),
    "odd head size": (
        [(f"{BUILD}.hidden_size", 28)],
        [f"{BUILD}.heads: hidden_size / heads = 7 is odd; rotary embedding needs it even"],
    ),
    "texts longer than the built model, in both stages": (
        [("stages.0.objective.max_tokens", 200), ("stages.1.encoder.eval_max_tokens", 129)],
        [
            "stages.0.objective.max_tokens: 200 is above the built model's max_tokens 128; lower it",
            "stages.1.encoder.eval_max_tokens: 129 is above the built model's max_tokens 128; lower it",
        ],
    ),
    "lora on a language_model stage": (
        [("stages.0.lora", LORA)],
        [
            "stages.0.lora: language_model trains all parameters; set lora to null",
            "stages.1.lora: continues the adapter of stage language_model; repeat that stage's lora section",
        ],
    ),
    "eos pooling without end token": (
        [("stages.0.encoder.pooling", "eos"), ("stages.0.encoder.append_eos", False)],
        ["stages.0.encoder.append_eos: pooling eos reads the end token; remove the key, or set it to true"],
    ),
    "revela without unit length": (
        [("stages.1.encoder.normalize", False)],
        ["stages.1.encoder.normalize: revela's similarities are cosines; set normalize to true"],
    ),
    "warm-up longer than the stage": (
        [("stages.0.optim.warmup_steps", 5)],
        ["stages.0.optim.warmup_steps: is above steps (4); lower it"],
    ),
    "unknown split of the embedded corpus": (
        [("stages.0.eval.suites", ["stdlib:dev", "stdlib:train"])],
        ["stages.0.eval.suites.1: 'stdlib:train' is unknown; write stdlib:dev or stdlib:test"],
    ),
    "documents without how to cut them": (
        [("stages.0.data.passages", MISSING), ("stages.0.data.interleave", MISSING)],
        [
            'stages.0.data.passages: missing; documents need {"unit": ..., "max_words": ...}',
            "stages.0.data.interleave: missing; say how many documents are dealt in turn",
        ],
    ),
    "groups with keys of documents": (
        [("stages.0.data.sources", [GROUPS])],
        [
            "stages.0.data.passages: only documents are cut; remove the key",
            "stages.0.data.interleave: groups are read as they are; remove the key",
        ],
    ),
    "groups among documents": (
        [("stages.0.data.sources", [GROUPS, {"stdlib": "files"}])],
        ["stages.0.data.sources: groups do not mix with documents or passages; use one kind in a stage"],
    ),
    "offload at too low a stage": (
        [("stages.0.zero", {"stage": 0, "offload_param": "cpu", "offload_optimizer": "cpu"})],
        [
            "stages.0.zero.offload_param: works at ZeRO stage 3 only; set stage to 3 or offload_param to null",
            "stages.0.zero.offload_optimizer: works at ZeRO stages 1 to 3; set stage to 1 or offload_optimizer to null",
        ],
    ),
    "NVMe folder that is not there": (
        [("stages.0.zero", {"stage": 3, "offload_param": {"nvme": "/no/such/disk"}})],
        ["stages.0.zero.offload_param.nvme: /no/such/disk is no folder; create it on the NVMe disk of every node"],
    ),
    "texts longer than the built model that the language model reads": (
        [("stages.1.objective.language_model.max_tokens", 129)],
        ["stages.1.objective.language_model.max_tokens: 129 is above the built model's max_tokens 128; lower it"],
    ),
    "data of another method": (
        second("contrastive", data__sources=[{"stdlib": "files"}, GROUPS]),
        [
            "stages.1.data.sources.0.stdlib: input should be 'docstrings' or 'names'; found \"files\"",
            "stages.1.data.sources.1.format: input should be 'pairs' or 'beir'; found \"groups\"",
        ],
    ),
    "documents that are not cut, with how to cut them": (
        second("recontriever", data__passages={"unit": "lines", "max_words": 9}),
        [
            f"stages.1.data.passages: {OF_PASSAGES}; known: crops, faulty_rows, sources",
        ],
    ),
    "dealing where nothing is dealt": (
        second("contrastive", data__interleave=2),
        [
            f"stages.1.data.interleave: {OF_PASSAGES}; {OF_A_PAIR}",
        ],
    ),
    "neighbours of what is not dealt": (
        [("stages.0.data", {"sources": [GROUPS], "neighbours": BM25})],
        [f"stages.0.data.neighbours: {NOT_DEALT}"],
    ),
    "neighbours of pairs": (
        second("contrastive", data__neighbours=BM25),
        [f"stages.1.data.neighbours: {OF_PASSAGES}; {OF_A_PAIR}"],
    ),
    "neighbours of one document": (
        [("stages.1.data.interleave", 1), ("stages.1.data.neighbours", BM25)],
        [
            "stages.1.data.interleave: a bundle of neighbours has two documents or more; raise it, or remove "
            "neighbours",
        ],
    ),
    "embeddings where there is no retriever": (
        [("stages.0.data.neighbours", {"by": "embeddings"})],
        [
            'stages.0.data.neighbours: language_model starts from no retriever; write {"by": "bm25", "text": ...} or '
            "null",
        ],
    ),
    "near-duplicates where no passage reads another": (
        [
            ("stages.0.data.near_duplicates", NGRAMS),
            *second("contrastive", data__near_duplicates=NGRAMS),
        ],
        [
            f"stages.0.data.near_duplicates: {OF_REVELA}; {OF_A_TEXT}",
            f"stages.1.data.near_duplicates: {OF_REVELA}; {OF_A_PAIR}",
        ],
    ),
    "a configuration of a folder in BEIR layout": (
        second("contrastive", data__sources=[BEIR | {"config": "default"}]),
        ["stages.1.data.sources.0.config: a folder in BEIR layout has none; remove the key"],
    ),
    "fields that a format does not read": (
        [
            ("stages.0.data.sources", [{"folder": "d", "fields": {"document": "id"}}]),
            *second("contrastive", data__sources=[BEIR | {"fields": {"text": "body"}}]),
        ],
        [
            "stages.0.data.sources.0.fields.document: is not read with format documents; remove the key",
            "stages.1.data.sources.0.fields.text: is not read with format beir; remove the key",
        ],
    ),
    "fields of other rows": (
        [
            ("stages.0.data.sources", [{"folder": "d", "fields": {"query": "q", "negatives": ["n"]}}]),
            *second("contrastive", data__sources=[PAIRS | {"fields": {"document": "id"}}]),
        ],
        [
            "stages.0.data.sources.0.fields.query: unknown key; known: document, text, title",
            "stages.0.data.sources.0.fields.negatives: unknown key; known: document, text, title",
            "stages.1.data.sources.0.fields.document: unknown key; known: negatives, positive, query, text, title, "
            "weight",
        ],
    ),
    "keys of pairs on documents": (
        [
            ("stages.0.data.positives", 2),
            ("stages.0.data.negatives", 1),
            ("stages.0.data.mix", "rows"),
            ("stages.0.data.sources.0", FILES | {"weight": 1.0, "limit": 3}),
            ("stages.1.data.sources.0", FILES | {"query_prefix": "", "passage_prefix": "p"}),
        ],
        [
            *(f"stages.0.data.sources.0.{key}: unknown key; known: stdlib" for key in ("weight", "limit")),
            *(f"stages.0.data.{key}: {OF_CONTRASTIVE}; {OF_A_TEXT}" for key in ("positives", "negatives", "mix")),
            *(
                f"stages.1.data.sources.0.{key}: unknown key; known: stdlib"
                for key in ("query_prefix", "passage_prefix")
            ),
        ],
    ),
    "weights of some sources": (
        second("contrastive", data__sources=[PAIRS | {"weight": 1.0}, BEIR], data__mix="rows"),
        ["stages.1.data.sources.1.weight: missing; give every source a weight, or none"],
    ),
    "several sources unmixed": (
        second("contrastive", data__sources=[PAIRS, BEIR]),
        ['stages.1.data.mix: missing; write "rows" (all sources in every pool) or "pools" (one source per pool)'],
    ),
    "one source mixed": (
        second("contrastive", data__mix="pools"),
        ["stages.1.data.mix: there is one source; remove the key"],
    ),
    "crops without lengths": (
        second("recontriever", data__crops=None),
        [
            "stages.1.data.crops: must be a section; write {...} in place of null",
        ],
    ),
    "crops of another method": (
        second("contrastive", data__crops=CROPS),
        [
            f"stages.1.data.crops: unknown key; recontriever has it: {ELSE}; {OF_A_PAIR}",
        ],
    ),
    "crops of no length": (
        second("recontriever", data__crops=CROPS | {"min_ratio": 0.6}),
        ["stages.1.data.crops.min_ratio: is above max_ratio 0.5; lower it"],
    ),
    "two budgets of slices": (
        second("contrastive", batch__forward_rows=2),
        ["stages.1.batch.forward_tokens: stands beside forward_rows; remove one of the two"],
    ),
    "a direction twice": (
        second("contrastive", objective__directions=[Q_TO_D, D_TO_Q, Q_TO_D]),
        ["stages.1.objective.directions: names a direction twice; name each once"],
    ),
    "a joint sum of one direction": (
        second("contrastive", objective__partition="joint"),
        ["stages.1.objective.partition: there is one direction; set it to separate"],
    ),
    "no direction from queries to documents": (
        second("contrastive", objective__directions=[D_TO_Q]),
        ["stages.1.objective.directions: lacks query_to_document; add it"],
    ),
    "a learned temperature that is too low": (
        second("contrastive", objective__learn_temperature=True, objective__temperature=0.009),
        ["stages.1.objective.temperature: a learned temperature is at least 0.01; raise it"],
    ),
    "a temperature that rises": (
        [("stages.1.objective.temperature", {"start": 1e-4, "end": 0.05})],
        ["stages.1.objective.temperature.end: 0.05 is above start 0.0001; a temperature decays, so lower it"],
    ),
    "a decay in one step": (
        [("stages.1.objective.temperature", {"start": 0.05, "end": 0.05}), ("stages.1.optim.steps", 1)],
        ["stages.1.objective.temperature: one step has no decay; write a number"],
    ),
    "a surrogate and other directions": (
        second("contrastive", objective__directions=[Q_TO_D, D_TO_Q], objective__false_negatives=RELATIVE),
        [f"stages.1.objective.false_negatives: {Q_TO_D_ALONE}"],
    ),
    "joint positives and hard negatives alone, and other directions": (
        second(
            "contrastive",
            objective__directions=[Q_TO_D, D_TO_Q],
            objective__equal_queries="joint",
            objective__in_batch_negatives=False,
            data__negatives=1,
        ),
        [f"stages.1.objective.{key}: {Q_TO_D_ALONE}" for key in ("in_batch_negatives", "equal_queries")],
    ),
    "hard negatives alone without any": (
        second("contrastive", objective__in_batch_negatives=False),
        [
            "stages.1.objective.in_batch_negatives: false, but data.negatives is 0: no row would have a negative; "
            "raise that"
        ],
    ),
    "hard negatives alone and a surrogate": (
        second(
            "contrastive",
            objective__in_batch_negatives=False,
            objective__false_negatives=RELATIVE,
            data__negatives=1,
        ),
        [
            "stages.1.objective.false_negatives: leaves out documents of other rows, which in_batch_negatives leaves "
            "out too; remove one of the two"
        ],
    ),
    "a surrogate that reads code in a language": (
        second("contrastive", objective__false_negatives=RELATIVE | {"surrogate": BM25_IN_GERMAN}),
        [f"stages.1.objective.false_negatives.surrogate.language: {NO_LANGUAGE}"],
    ),
    "the cut of the other rule": (
        second("contrastive", objective__false_negatives=RELATIVE | {"cut": 0.5}),
        ["stages.1.objective.false_negatives.cut: unknown key; known: eps, rule, surrogate"],
    ),
    "a Matryoshka dimension twice": (
        second("contrastive", objective__matryoshka=[32, 8, 8]),
        ["stages.1.objective.matryoshka: names a dimension twice; name each once"],
    ),
    "prefixes on crops": (
        second("recontriever", encoder__query_prefix="q: ", encoder__passage_prefix="p: "),
        [
            'stages.1.encoder.query_prefix: crops are trained without prefixes; set it to ""',
            'stages.1.encoder.passage_prefix: crops are trained without prefixes; set it to ""',
        ],
    ),
    "softmax weights without temperature": (
        second("recontriever", objective__relevance="softmax"),
        ["stages.1.objective.relevance_temperature: missing; softmax weights need it"],
    ),
    "linear weights with temperature": (
        second("recontriever", objective__relevance_temperature=0.1),
        ["stages.1.objective.relevance_temperature: only softmax weights have one; remove the key"],
    ),
    "weights clamped that are never negative": (
        second("recontriever", objective__relevance="none", objective__clamp_negative=True),
        ["stages.1.objective.clamp_negative: only linear weights can be negative; set it to false"],
    ),
    "a queue of part of a step": (
        second("recontriever", objective__queue={"size": 80, "momentum": 0.9}),
        [f"stages.1.objective.queue.size: {KEYS_OF_A_STEP}; write 64"],
    ),
    "a queue shorter than a step": (
        second("recontriever", objective__queue={"size": 16, "momentum": 0.9}),
        [f"stages.1.objective.queue.size: {KEYS_OF_A_STEP}; write 32"],
    ),
    "a momentum copy of all parameters at ZeRO-3": (
        second("recontriever", lora=None, zero={"stage": 3}),
        [
            "stages.1.zero.stage: a momentum copy of all parameters would have to be gathered whole at every step; use "
            "stage 0, 1 or 2, lora, or in-batch negatives (objective.queue null)"
        ],
    ),
    "NVMe for the optimizer where it is ignored": (
        [(f"stages.{i}.zero", {"stage": zero, "offload_optimizer": {"nvme": "."}}) for i, zero in enumerate((2, 0))],
        [f"stages.{i}.zero.offload_optimizer: {NVME_STAGE}" for i in (0, 1)],
    ),
}


@pytest.mark.parametrize(("changes", "lines"), CROSS.values(), ids=CROSS.keys())
def test_keys_that_contradict_one_another_are_named(tmp_path, changes, lines):
    assert problems(tmp_path, changed(*changes)) == lines


def test_what_the_cross_checks_must_let_through(tmp_path):
    neighbours = [("stages.0.data.neighbours", BM25), ("stages.1.data.neighbours", {"by": "embeddings"})]
    masked = [("stages.1.data.near_duplicates", NGRAMS)]
    assert load_recipe(write(tmp_path, changed(*neighbours, *masked))).stages[1].data.interleave == 2
    two_revela = changed(("stages.0", TINY["stages"][1] | {"name": "first", "start": {"hub": "a/b"}}))
    for stage in two_revela["stages"]:
        stage["objective"] = stage["objective"] | {
            "language_model": stage["objective"]["language_model"] | {"start": {"hub": "a/b"}, "max_tokens": 4096}
        }
    assert load_recipe(write(tmp_path, two_revela)).stages[1].start == "previous"
    offload = {"stage": 3, "offload_param": {"nvme": str(tmp_path)}, "offload_optimizer": "cpu"}
    assert load_recipe(write(tmp_path, changed(("stages.0.zero", offload)))).stages[0].zero.offload_optimizer == "cpu"
    for offload in ({"stage": 2, "offload_optimizer": "cpu"}, {"stage": 3, "offload_optimizer": {"nvme": "."}}):
        load_recipe(write(tmp_path, changed(("stages.0.zero", offload))))
    suites = [(f"stages.{i}.eval.suites", ["stdlib:dev"]) for i in (0, 1)]
    stops = [(STOP_0, {"than": "start"}), (STOP_1, {"than": "previous", "by": 0.01})]
    assert load_recipe(write(tmp_path, changed(*suites, *stops))).stages[0].eval.stop_if_worse is not None


@pytest.mark.parametrize(
    "changes",
    [
        second(
            "contrastive",
            data__sources=[
                PAIRS | {"weight": 1.0, "fields": {"query": "q", "weight": "w"}},
                BEIR | {"weight": 2.0, "split": "dev"},
            ],
            data__mix="pools",
        ),
        second("contrastive", data__sources=[PAIRS | {"limit": 3, "query_prefix": "q"}], data__negatives=2),
        second("contrastive", objective__directions=[Q_TO_D, D_TO_Q], objective__partition="joint"),
        second("contrastive", objective__learn_temperature=True, objective__temperature=0.01),
        second("contrastive", objective__temperature=0.001, objective__matryoshka=[32, 8]),
        second("recontriever", objective__relevance="softmax", objective__relevance_temperature=0.1),
        second("recontriever", objective__clamp_negative=True, data__crops=CROPS | {"min_ratio": 0.5}),
        second("recontriever", zero={"stage": 3}),
        second("recontriever", zero={"stage": 3}, lora=None, objective__queue=None),
        second("recontriever", zero={"stage": 2}, lora=None),
        [("stages.1.objective.temperature", {"start": 0.05, "end": 1e-4}), ("stages.1.optim.steps", 2)],
        [("stages.1.objective.temperature", {"start": 0.05, "end": 0.05})],
        [("stages.1.objective.temperature", 1)],
    ],
)
def test_what_the_checks_of_data_and_methods_must_let_through(tmp_path, changes):
    assert len(load_recipe(write(tmp_path, changed(*changes))).stages) == 2


def test_a_second_lora_stage_must_repeat_the_adapter(tmp_path):
    recipe = changed(("stages.0", TINY["stages"][1] | {"name": "first", "start": {"hub": "a/b"}, "lora": LORA}))
    recipe["stages"] = json.loads(json.dumps(recipe["stages"]))
    for stage in recipe["stages"]:
        stage["objective"]["language_model"]["start"] = {"hub": "a/b"}
    assert problems(tmp_path, recipe) == [
        "stages.1.lora: continues the adapter of stage first; repeat that stage's lora section"
    ]
