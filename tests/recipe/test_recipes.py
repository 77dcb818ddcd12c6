"""Every shipped recipe loads and says what it must; recipes/README.md is current."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from recipe_changes import MISSING

from launcher.recipe_reference import named_values, reference, sentences
from toolkit.methods.recontriever.keys import ReContrieverObjective
from toolkit.methods.revela.keys import RevelaObjective
from toolkit.methods.sycl.keys import SyclObjective
from toolkit.recipe.graded import GradedData
from toolkit.recipe.models import FolderStart, HubStart
from toolkit.recipe.schema import Recipe, data_seed, load_recipe
from toolkit.recipe.stage import batch_numbers

RECIPES = Path(__file__).parent.parent.parent / "recipes"
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


def unsaid(recipe: Recipe) -> list[str]:
    """What a shipped recipe must say of itself and does not."""
    found = []
    told = sentences(recipe.description)
    if not 1 <= len(told) <= 2 or not told[-1].endswith("."):
        found.append(f"description: one or two sentences, not {len(told)}: {recipe.description!r}")
    figures = {"hardware": recipe.hardware, "memory": recipe.memory, "time": recipe.time}
    found += [f"{key}: missing" for key, value in figures.items() if value is None]
    if recipe.hardware is not None:
        planned = recipe.hardware.estimate or ""
        if re.search("GPU|[AVH]100", f"{recipe.hardware.paper} {planned}") and "not measured on GPU" not in planned:
            found.append("hardware.estimate: say `not measured on GPU`")
    if not recipe.sources:
        found.append("sources: missing")
    for key, source in recipe.sources.items():
        if " " not in key and not named_values(recipe, key):
            found.append(f"sources: {key} is no key of the recipe or of a stage")
        if not re.search(r"\barXiv \d{4}\.\d{5}\b|^(ours|measured|estimate|as [a-z0-9_]+\.json)\b|^as of", source):
            found.append(f"sources: {key}: neither a paper with its arXiv id nor a reason")
    return found


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_a_shipped_recipe_says_for_what_it_is_with_figures_and_sources(path):
    assert unsaid(load_recipe(path)) == []


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("description", "One. Two. Three.", "description: one or two sentences, not 3"),
        ("description", "", "description: one or two sentences"),
        ("description", "No end", "description: one or two sentences"),
        ("hardware", {"estimate": "8 GPUs"}, "hardware.estimate: say `not measured on GPU`"),
        ("hardware", MISSING, "hardware: missing"),
        ("memory", None, "memory: missing"),
        ("time", MISSING, "time: missing"),
        ("sources", MISSING, "sources: missing"),
        ("sources", {"optim.lrr": "ours"}, "sources: optim.lrr is no key"),
        ("sources", {"stages.1.optim.lr": "ours"}, "sources: stages.1.optim.lr is no key"),
        ("sources", {"optim.lr.peak": "ours"}, "sources: optim.lr.peak is no key"),
        ("sources", {"optim.lr": "a paper"}, "sources: optim.lr: neither a paper"),
    ],
)
def test_what_a_recipe_does_not_say_is_found(tmp_path, key, value, said):
    raw: dict[str, Any] = json.loads((RECIPES / "revela_1b.json").read_text())
    if value is MISSING:
        del raw[key]
    else:
        raw[key] = value
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(raw))
    (found,) = unsaid(load_recipe(path))
    assert found.startswith(said)


def test_a_source_may_name_a_key_of_the_recipe_of_one_stage_or_of_all():
    recipe = load_recipe(RECIPES / "quickstart.json")
    assert named_values(recipe, "seed") == [42]
    assert named_values(recipe, "optim.steps") == [stage.optim.steps for stage in recipe.stages]
    assert named_values(recipe, "stages.3.optim.steps") == [recipe.stages[3].optim.steps]
    assert named_values(recipe, "objective.temperature") == [0.05, 0.05, 0.05]  # the first stage has none
    assert named_values(recipe, "stages.4.optim.steps") == named_values(recipe, "every value") == []


def test_figures_and_sources_decide_no_weight_and_are_not_needed(tmp_path):
    raw = json.loads((RECIPES / "quickstart.json").read_text())
    bare = {key: copy.deepcopy(raw[key]) for key in ("name", "seed", "stages")}
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(bare))
    recipe = load_recipe(path)
    assert (recipe.description, recipe.hardware, recipe.memory, recipe.time, recipe.sources) == (
        "",
        None,
        None,
        None,
        {},
    )
    shipped = load_recipe(RECIPES / "quickstart.json")
    for last in (None, 0, 1):
        assert recipe.digest(last) == shipped.digest(last)
    for made in (recipe, shipped):
        path.write_text(made.to_json())
        assert load_recipe(path) == made
    bare["seed"] += 1
    path.write_text(json.dumps(bare))
    assert load_recipe(path).digest() != shipped.digest()


def test_the_shipped_recipes_are_these():
    assert [path.relative_to(RECIPES).as_posix() for path in ALL] == [
        "biencoder_clustered.json",
        *(f"cde_{name}.json" for name in ("compared", "mistral_7b", "qwen_0.6b", "small_v1", "small_v2")),
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
        *(f"sycl_{name}.json" for name in ("compared", "contriever", "mistral_7b", "qwen_0.6b")),
        "tiny/cde.json",
        "tiny/contrastive.json",
        "tiny/language_model.json",
        "tiny/mined.json",
        "tiny/recontriever.json",
        "tiny/revela.json",
        "tiny/sycl.json",
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
    hardware, memory, time = recipe.hardware, recipe.memory, recipe.time
    assert hardware and memory and time and hardware.paper and hardware.estimate and memory.estimate
    assert hardware.paper.startswith("4 x A100 80 GB") and "not measured on GPU" in hardware.estimate
    assert time.measured is None and "hours on 4 x A100" in ((time.paper if "1b" in path.stem else time.estimate) or "")
    assert recipe.sources["optim.lr"].startswith("Revela, arXiv 2506.16552")
    assert "authors' code" in recipe.sources["lora.alpha"] and "inferred" in recipe.sources["optim.betas"]
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
    recipe = load_recipe(RECIPES / f"{name}.json")
    assert recipe.hardware and recipe.memory and recipe.time and recipe.hardware.estimate
    assert "not measured on GPU" in recipe.hardware.estimate and recipe.memory.estimate and recipe.time.estimate
    assert "authors' training script" in recipe.sources["optim.lr"]


def test_the_contriever_recipe_of_sycl_has_the_published_values():
    """16 queries a device on 4: a loss sees 64, a step adds up four losses."""
    recipe = load_recipe(RECIPES / "sycl_contriever.json")
    (stage,) = recipe.stages
    objective, data, optim, encoder = stage.objective, stage.data, stage.optim, stage.encoder
    assert isinstance(objective, SyclObjective) and isinstance(data, GradedData)
    assert (objective.losses.weights(), objective.temperature) == ({"wasserstein": 1.0}, 1.0)
    assert (objective.label_scale, objective.in_batch_grade) == (1.0, 0.0)
    assert (data.group.size, data.group.by, data.group.few) == (4, "random", "cycle")
    numbers = batch_numbers(stage, 4)
    assert (numbers["rows_per_forward_per_rank"], numbers["accumulation_per_rank"]) == (16, 4)
    assert (stage.batch.pool, stage.batch.span, numbers["rows_per_step_global"]) == (64, "world", 256)
    assert (optim.lr, optim.warmup_steps, optim.warmup, optim.schedule) == (1e-5, 98, "log", "linear")
    assert (optim.steps, optim.weight_decay, optim.clip) == (1960, 0, 1) and optim.warmup_steps == 0.05 * optim.steps
    assert (encoder.pooling, encoder.normalize) == ("mean", False)
    assert encoder.max_tokens == encoder.eval_max_tokens == 256
    assert encoder.query_prefix == encoder.passage_prefix == ""
    assert stage.start == HubStart(hub="facebook/contriever") and stage.lora is None
    assert (stage.precision, stage.zero.stage, recipe.seed) == ("fp32", 3, 42)
    assert "inferred" in recipe.sources["optim.warmup"] and "arXiv 2503.23239" in recipe.sources["optim.lr"]


@pytest.mark.parametrize("name", ["sycl_qwen_0.6b", "sycl_mistral_7b"])
def test_a_language_model_becomes_a_retriever_by_kl_before_the_wasserstein_loss(name: str):
    recipe = load_recipe(RECIPES / f"{name}.json")
    own = {"name", "description", "start", "objective", "optim"}
    first, second = (stage.model_dump(exclude=own) for stage in recipe.stages)
    assert first == second and recipe.stages[1].start == "previous" and "EXTRAPOLATED" in recipe.description
    losses = [stage.objective.losses.weights() for stage in recipe.stages]
    assert losses == [{"kl": 1.0}, {"wasserstein": 1.0, "kl": 0.1}]
    assert {(stage.objective.temperature, stage.encoder.normalize) for stage in recipe.stages} == {(0.05, True)}
    rows = sum(stage.optim.steps * stage.batch.pool * stage.batch.pools_per_step for stage in recipe.stages)
    assert 500_000 < rows < 503_000
    assert recipe.hardware and recipe.hardware.measured is None and recipe.hardware.paper is None


def test_data_of_sycl_compared_side_by_side_differ_in_data_and_loss_alone():
    """Grades, loss and size of a group are those of the paper's four configurations."""
    recipe = load_recipe(RECIPES / "sycl_compared.json")
    own = {"name": True, "description": True, "objective": {"losses"}, "data": True}
    first, *others = [stage.model_dump(exclude=own) for stage in recipe.stages]
    assert len(others) == 3 and all(other == first for other in others)
    assert {data_seed(recipe, index) for index in range(4)} == {recipe.seed}
    found = []
    for stage in recipe.stages:
        ((loss, weight),) = stage.objective.losses.weights().items()
        keys = {"folder", "at_least", "below", "pick", "grade"}
        sources = [source.model_dump(exclude_none=True, include=keys) for source in stage.data.sources]
        found.append((stage.name, loss, weight, stage.data.group.size, stage.data.group.by, sources))
    real, bm25, made = ({"folder": f"data/scifact{end}"} for end in ("", "_bm25", "_generated"))
    picked = bm25 | {"below": 1, "pick": {"random": 2}}
    assert found == [
        ("real_binary", "infonce", 1, 3, "positive_first", [real | {"at_least": 1, "grade": 1}, picked | {"grade": 0}]),
        (
            "synth_binary",
            "infonce",
            1,
            3,
            "positive_first",
            [made | {"at_least": 2, "grade": 1}, made | {"below": 2, "grade": 0}],
        ),
        ("synth_multilevel", "wasserstein", 1, 4, "random", [made]),
        (
            "synth_plus_real",
            "wasserstein",
            1,
            7,
            "random",
            [real | {"at_least": 1, "grade": 3}, picked | {"grade": 1}, made],
        ),
    ]


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
        for key in keys(json.loads(path.read_text()) | {"sources": {}}):
            assert f"| `{key}` |" in text


def test_the_reference_opens_with_which_recipe_for_what():
    text = reference()
    opening = text[text.index("\n## ") : text.index("\n## Shipped")]
    assert opening.startswith("\n## Which recipe for what")
    rows = [line for line in opening.splitlines() if line.startswith("| [")]
    for path, row in zip(ALL, rows, strict=True):
        recipe, name = load_recipe(path), path.relative_to(RECIPES).as_posix()
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert cells[:2] == [f"[{name}]({name})", sentences(recipe.description)[0]] and all(cells)
        assert cells[3] == "; ".join(dict.fromkeys(stage.objective.name for stage in recipe.stages))
        assert all(re.match("paper: |measured: |estimate: ", cell) for cell in cells[4:]) and len(cells) == 7
        assert f"\n### {name}\n\n{recipe.description}\n" in text


def test_the_reference_finds_the_models_below_an_objective_and_not_other_starts():
    """pools_1b.json has a temperature with a start too; the quickstart's language model is that of the stage before."""
    rows = [
        line.split(" | ") for line in reference().splitlines() if line.startswith(("| revela |", "| recontriever |"))
    ]
    others = {tuple(row[1:4]) for row in rows}
    llama = "meta-llama/Llama-3.2-1B"
    assert (llama, f"language_model: {llama}", "1024 x 1") in others
    assert ("the stage before", "language_model: the stage before", "32 x 2") in others
    assert ("google-bert/bert-base-uncased", "none", "2048 x 1") in others


def test_the_reference_lists_every_source_with_the_values_it_is_for():
    text = reference()
    for path in ALL:
        recipe, start = load_recipe(path), text.index(f"\n### {path.relative_to(RECIPES).as_posix()}\n")
        lines = [line for line in text[start + 1 :].split("\n### ")[0].splitlines() if line.startswith("- ")]
        for key, source in recipe.sources.items():
            named = f"`{key}`" if " " not in key else key
            assert any(named in line and line.lower().endswith(f". {source.lower()}.") for line in lines)
    assert "`optim.lr` = `0.0001`" in text


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
