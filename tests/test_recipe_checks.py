"""toolkit/recipe.py: keys that contradict one another are named with path and fix."""

import copy
import json

import pytest
from recipe_changes import BUILD, LM_START, MISSING, START_FIX, TINY, changed, problems, write

from toolkit.recipe import load_recipe

LORA = {"rank": 2, "alpha": 2, "dropout": 0.0, "targets": ["q_proj"]}
GROUPS = {"folder": "g", "format": "groups"}
BUILT_BEFORE = "revela starts from a trained model; build it in a language_model stage before this one"
NO_LM_BEFORE = "no language_model stage comes just before; name a hub id or a folder"
CROSS = {
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
        ["stages.0.encoder.append_eos: pooling eos reads the end token; set append_eos to true"],
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
            "stages.0.data.passages: only documents for revela or language_model are cut; remove the key",
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
}


@pytest.mark.parametrize(("changes", "lines"), CROSS.values(), ids=CROSS.keys())
def test_keys_that_contradict_one_another_are_named(tmp_path, changes, lines):
    assert problems(tmp_path, changed(*changes)) == lines


def test_what_the_cross_checks_must_let_through(tmp_path):
    two_revela = changed(("stages.0", TINY["stages"][1] | {"name": "first", "start": {"hub": "a/b"}}))
    for stage in two_revela["stages"]:
        stage["objective"] = stage["objective"] | {
            "language_model": stage["objective"]["language_model"] | {"start": {"hub": "a/b"}, "max_tokens": 4096}
        }
    assert load_recipe(write(tmp_path, two_revela)).stages[1].start == "previous"
    offload = {"stage": 3, "offload_param": {"nvme": str(tmp_path)}, "offload_optimizer": "cpu"}
    assert load_recipe(write(tmp_path, changed(("stages.0.zero", offload)))).stages[0].zero.offload_optimizer == "cpu"


def test_a_second_lora_stage_must_repeat_the_adapter(tmp_path):
    recipe = changed(("stages.0", TINY["stages"][1] | {"name": "first", "start": {"hub": "a/b"}, "lora": LORA}))
    recipe["stages"] = json.loads(json.dumps(recipe["stages"]))
    for stage in recipe["stages"]:
        stage["objective"]["language_model"]["start"] = {"hub": "a/b"}
    assert problems(tmp_path, recipe) == [
        "stages.1.lora: continues the adapter of stage first; repeat that stage's lora section"
    ]
