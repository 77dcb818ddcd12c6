"""toolkit/training/numbers.py: what a stage's models refuse before they are built, and what is said of its slices."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    TARGETS,
    build_objective,
    random_crops,
    random_pairs,
    random_pools,
    random_tokens,
    revela_stage,
    save_model,
    stage_of,
)
from transformers import AutoConfig

from toolkit.methods import keys_of, shared
from toolkit.methods.language_model import objective as language_model
from toolkit.methods.language_model.rows import LanguageModelBatch
from toolkit.methods.revela import objective as revela
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.stage import Stage
from toolkit.slicing import Slices, plan_slices
from toolkit.training.numbers import derived, parameter_counts

CONFIG = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def counts(stage: Stage, *configs: Any) -> dict[str, int]:
    """parameter_counts of a stage whose models have these configs, in their order."""
    names = [model.name for model in keys_of(stage.objective.name).models(stage)]
    return parameter_counts(stage, dict(zip(names, configs, strict=True)))


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ([8], "lacks the model's 32 dimensions, which its export has; add 32"),
        ([16, 31, 8], "lacks the model's 32 dimensions, which its export has; add 32"),
        ([32, 33], "33 is more than the model's 32 dimensions; remove it"),
    ],
)
def test_matryoshka_dimensions_end_with_all_of_them(sizes: list[int], problem: str) -> None:
    model = AutoConfig.for_model("llama", **CONFIG)
    with pytest.raises(RecipeError) as caught:
        counts(stage_of("contrastive", objective__matryoshka=sizes), model)
    assert str(caught.value) == f"stage contrastive: objective.matryoshka: {problem}"
    for allowed in ([8, 32], [32], None):
        counts(stage_of("contrastive", objective__matryoshka=allowed), model)


def test_a_sliding_window_shorter_than_the_passages_is_refused() -> None:
    retriever = AutoConfig.for_model("llama", **CONFIG)
    narrow, wide = (AutoConfig.for_model("mistral", sliding_window=window, **CONFIG) for window in (31, 32))
    stage = revela_stage(objective__language_model__max_tokens=32)
    with pytest.raises(RecipeError) as caught:
        counts(stage, retriever, narrow)
    assert str(caught.value) == (
        "stage revela: objective.language_model.max_tokens: a sliding window of 31 tokens is shorter than max_tokens "
        "32; shorten the input"
    )
    counts(stage, retriever, wide)
    counts(stage, narrow, retriever)  # a retriever's window is no matter of Revela


def line(stage: Stage, ranks: int = 1) -> str:
    return dict(derived(stage, ranks))["slices"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_model(root / kind, kind) for kind in ("llama", "bert")}


@pytest.mark.parametrize("method", ["language_model", "revela", "contrastive", "recontriever"])
def test_the_slices_that_are_told_are_those_that_run(
    folders: dict[str, Path], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"batch__forward_rows": 3}
    llama, bert = folders["llama"], folders["bert"]
    if method == "revela":
        stage, batch, sides = revela_stage(**changes), random_pools(1, 8)[0], "queries passages inputs"
        objective = build_objective(stage, 3, "cpu", llama, None, llama)
    elif method == "contrastive":
        stage = stage_of(method, lora=None, data__positives=2, data__negatives=3, **changes)
        batch, sides = random_pairs(1, 8, 2, 3)[0], "queries documents"
        objective = build_objective(stage, 3, "cpu", bert, None, None)
    elif method == "recontriever":
        stage, batch, sides = stage_of(method, lora=None, **changes), random_crops(1, 8, 3)[0], "queries keys"
        objective = build_objective(stage, 3, "cpu", bert, None, None)
    else:
        of_tokens = {"name": "language_model", "max_tokens": 32}
        stage, sides = revela_stage(lora=None, objective=of_tokens, **changes), "passages"
        batch = LanguageModelBatch(random_tokens(8, torch.Generator()))
        objective = build_objective(stage, 3, "cpu", llama, None, None)
    ran: list[int] = []

    def counted(*arguments: Any) -> Slices:
        slices = plan_slices(*arguments)
        ran.append(len(slices.rows or ()))
        return slices

    for module in (revela, shared, language_model):
        monkeypatch.setattr(module, "plan_slices", counted)
    objective(batch)
    told = re.fullmatch(r"of at most 3 texts; a forward has (.*)", line(stage))
    assert told is not None
    said = re.findall(r"(\d+) of [a-z ]*?(\w+)(?:, |$)", told[1])
    assert said == [(str(count), side) for count, side in zip(ran, sides.split(), strict=True)] and min(ran) == 3


def test_slices_of_a_rank_s_part_of_the_pool_and_those_that_none_can_count() -> None:
    world: dict[str, Any] = {"batch__pool": 64, "batch__span": "world", "data__negatives": 2}
    sliced = stage_of("contrastive", batch__forward_rows=10, **world)
    assert line(sliced, 2) == "of at most 10 texts; a forward has 4 of queries, 10 of documents"
    assert line(sliced, 4) == "of at most 10 texts; a forward has 2 of queries, 5 of documents"
    by_tokens = stage_of("contrastive", batch__forward_tokens=16384, **world)
    assert line(by_tokens, 2) == "about 16,384 tokens each, texts sorted by length"
    assert line(stage_of("contrastive", **world), 2) == "none: all activations are kept"


def test_lora_targets_are_looked_for_in_each_model() -> None:
    bert, llama = AutoConfig.for_model("bert", **CONFIG), AutoConfig.for_model("llama", **CONFIG)
    unknown = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["q_proj", "k_prj"]}
    for stage, encoder, model, missing in (
        (revela_stage(), bert, "retriever", ", ".join(TARGETS)),
        (revela_stage(objective__language_model__lora=unknown), llama, "language_model", "k_prj"),
    ):
        with pytest.raises(RecipeError) as caught:
            counts(stage, encoder, llama)
        assert str(caught.value).startswith(f"stage revela: {model}: LoRA targets {missing} match no module; the model")
