"""Every shipped recipe loads and says what it must; recipes/README.md is current."""

import json
from pathlib import Path

import pytest

from launcher.recipe_reference import reference
from toolkit.recipe import FolderStart, HubStart, ReContrieverObjective, RevelaObjective, batch_numbers, load_recipe
from toolkit.training.feed import data_seed

RECIPES = Path(__file__).parent.parent / "recipes"
ALL = sorted(RECIPES.rglob("*.json"))
PAPER = sorted(RECIPES.glob("revela_*.json"))


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_a_shipped_recipe_loads_and_fits_one_and_two_ranks(path):
    recipe = load_recipe(path)
    assert recipe.name in (path.stem, f"tiny_{path.stem}")
    for stage in recipe.stages:
        for ranks in (1, 2):
            numbers = batch_numbers(stage, ranks)
            assert numbers["rows_per_step_global"] == stage.batch.pool * stage.batch.pools_per_step


def test_the_shipped_recipes_are_these():
    assert [path.relative_to(RECIPES).as_posix() for path in ALL] == [
        "contriever_bert_base.json",
        "crops_compared.json",
        "fewshot.json",
        "mined.json",
        "pools_1b.json",
        "pools_compared.json",
        "pools_start.json",
        "quickstart.json",
        "recontriever_bert_base.json",
        "recontriever_further.json",
        "recontriever_qwen_0.6b.json",
        *(f"revela_{size}.json" for size in ("1b", "3b", "500m", "7b", "code_1b", "code_3b", "code_500m")),
        "supervised_7b.json",
        "tiny/contrastive.json",
        "tiny/language_model.json",
        "tiny/mined.json",
        "tiny/recontriever.json",
        "tiny/revela.json",
    ]


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_a_paper_recipe_has_the_papers_values(path):
    recipe = load_recipe(path)
    (stage,) = recipe.stages
    objective, code = stage.objective, "code" in path.stem
    assert isinstance(objective, RevelaObjective)
    assert (objective.temperature, objective.similarity_dtype) == (1e-4, "bf16")
    assert objective.v_norm is objective.half_query is not code
    assert objective.language_model.start == HubStart(hub="meta-llama/Llama-3.2-1B")
    for lora in (stage.lora, objective.language_model.lora):
        assert lora is not None
        assert (lora.rank, lora.alpha, lora.dropout, len(lora.targets)) == (256, 64, 0.1, 7)
    optim = stage.optim
    assert (optim.lr, optim.warmup_steps, optim.warmup, optim.schedule) == (1e-4, 100, "log", "linear")
    assert optim.steps == (358_763 // 32 if code else 320_000 // 32)
    assert (stage.batch.pool, stage.batch.pools_per_step) == (8 if path.stem[-2:] in ("3b", "7b") else 16, 32)
    assert (stage.encoder.query_prefix, stage.encoder.passage_prefix) == ("query: ", "passage: ")
    assert (stage.encoder.max_tokens, objective.language_model.max_tokens) == (157, 156)
    for word in ("Paper", "authors' code", "Hardware", "Memory: estimate", "Hours:", "Not measured on GPU"):
        assert word in recipe.description
    assert ("EXTRAPOLATED" in recipe.description) == (path.stem == "revela_7b")


@pytest.mark.parametrize("name", ["recontriever_bert_base", "contriever_bert_base"])
def test_the_bert_recipes_have_the_papers_values(name):
    (stage,) = load_recipe(RECIPES / f"{name}.json").stages
    objective, crops, optim, paper = stage.objective, stage.data.crops, stage.optim, name.startswith("recontriever")
    assert isinstance(objective, ReContrieverObjective) and crops is not None and objective.queue is not None
    assert (objective.views, objective.relevance) == ((4, "linear") if paper else (1, "none"))
    assert (objective.temperature, objective.label_smoothing, objective.clamp_negative) == (0.05, 0, False)
    assert (objective.queue.size, objective.queue.momentum) == (131_072, 0.9995)
    assert (crops.chunk_tokens, crops.min_ratio, crops.max_ratio, crops.delete) == (256, 0.05, 0.5, 0.1)
    assert crops.across_documents and stage.batch.pool * stage.batch.pools_per_step == 2048
    assert (optim.lr, optim.betas, optim.eps, optim.weight_decay, optim.clip) == (5e-5, [0.9, 0.98], 1e-6, 0.01, 0)
    assert (optim.warmup_steps, optim.warmup, optim.schedule, optim.steps) == (
        20_000,
        "linear_from_zero",
        "linear",
        500_000,
    )
    encoder = stage.encoder
    assert (encoder.pooling, encoder.normalize, encoder.eval_max_tokens) == ("mean", False, 512)
    assert stage.precision == "fp32" and stage.lora is None
    for word in ("Hardware", "Memory: estimate", "Hours: estimate", "Not measured on GPU"):
        assert word in load_recipe(RECIPES / f"{name}.json").description


def test_methods_compared_side_by_side_differ_in_the_method_alone():
    recipe = load_recipe(RECIPES / "crops_compared.json")
    own = {"name", "description", "objective"}
    first, *others = [stage.model_dump(exclude=own) for stage in recipe.stages]
    assert len(others) == 2 and all(other == first for other in others)
    assert {data_seed(recipe, index) for index in range(3)} == {recipe.seed}


def test_pools_compared_side_by_side_differ_in_the_pool_alone():
    recipe = load_recipe(RECIPES / "pools_compared.json")
    own = {"name": True, "description": True, "batch": {"pool", "pools_per_step"}}
    first, *others = [stage.model_dump(exclude=own) for stage in recipe.stages]
    assert len(others) == 3 and all(other == first for other in others)
    assert [stage.batch.pool for stage in recipe.stages] == [8, 16, 32, 64]
    assert {stage.batch.pool * stage.batch.pools_per_step for stage in recipe.stages} == {128}
    (start,) = load_recipe(RECIPES / "pools_start.json").stages
    export = f"runs/pools_start/stage_0_{start.name}/export"
    for stage in recipe.stages:
        assert isinstance(stage.objective, RevelaObjective)
        assert stage.start == FolderStart(folder=export)
        assert stage.objective.language_model.start == FolderStart(folder=f"{export}/lm")


def test_the_reference_is_current_and_names_every_key():
    text = reference()
    assert (RECIPES / "README.md").read_text(encoding="utf-8") == text, "run `make recipes`"
    for path in ALL:
        for key in keys(json.loads(path.read_text())):
            assert f"| `{key}` |" in text


def keys(value) -> set[str]:
    if isinstance(value, list):
        return {key for item in value for key in keys(item)}
    return set(value) | keys(list(value.values())) if isinstance(value, dict) else set()


def test_mining_is_compared_with_as_many_steps_without_it():
    """Two chains that differ in what is mined alone, on the same rows in the same order."""
    recipe = load_recipe(RECIPES / "mined.json")
    kept = [stage.model_dump(exclude={"name", "description"}) for stage in recipe.stages]
    mined, unmined = kept[2]["data"], kept[5]["data"]
    assert kept[:2] == kept[3:5] and kept[2] != kept[5]
    assert (mined.pop("mine")["by"], mined.pop("negatives")) == ("previous", 1)
    assert (unmined.pop("mine"), unmined.pop("negatives")) == (None, 0)
    assert kept[2] == kept[5] and data_seed(recipe, 2) == data_seed(recipe, 5)
