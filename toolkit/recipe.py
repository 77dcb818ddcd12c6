"""The whole recipe schema: what a user writes, checked before anything else is imported.

Called by the launcher and by everything that reads settings. Imports pydantic and nothing heavier, never torch.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from toolkit.recipe_errors import RecipeError, explain, override, read_json


class Section(BaseModel):
    """Base of every recipe section: frozen, strict types, finite numbers, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Text = Annotated[str, Field(min_length=1)]


# --------------------------------------------------------------------------- where a model comes from


class HubStart(Section):
    hub: Text = Field(description="Model id on the hub, e.g. meta-llama/Llama-3.2-1B.")


class FolderStart(Section):
    folder: Text = Field(description="Folder with config.json, safetensors weights and a tokenizer.")


class BuildTokenizer(Section):
    """Byte-level BPE, trained on the stage's own training text."""

    vocab_size: Annotated[int, Field(ge=300)] = Field(description="Number of tokens, the two special ones included.")
    split_identifiers: bool = Field(
        description="Split words at underscores, changes of case and digits before merging (for source code)."
    )


class BuildModel(Section):
    """A Llama-type model with random weights."""

    hidden_size: Positive = Field(description="Width of the residual stream.")
    layers: Positive = Field(description="Number of layers.")
    heads: Positive = Field(description="Number of query heads; divides hidden_size.")
    kv_heads: Positive = Field(description="Number of key and value heads; divides heads.")
    intermediate_size: Positive = Field(description="Width of the feed-forward layer.")
    max_tokens: Positive = Field(description="Longest input in tokens (max_position_embeddings).")
    tie_embeddings: bool = Field(description="Share input embedding and output head.")
    tokenizer: BuildTokenizer


class BuildStart(Section):
    build: BuildModel


def _start_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "previous" if value == "previous" else None
    if isinstance(value, dict):
        known = [kind for kind in ("hub", "folder", "build") if kind in value]
        return known[0] if len(known) == 1 else None
    return {HubStart: "hub", FolderStart: "folder", BuildStart: "build"}.get(type(value))


_START_FIX = 'write "previous", {"hub": "<model id>"}, {"folder": "<path>"} or {"build": {...}}'
Start = Annotated[
    Annotated[Literal["previous"], Tag("previous")]
    | Annotated[HubStart, Tag("hub")]
    | Annotated[FolderStart, Tag("folder")]
    | Annotated[BuildStart, Tag("build")],
    Discriminator(_start_kind, custom_error_type="start_kind", custom_error_message=_START_FIX),
]


class Lora(Section):
    """Low-rank adapters (Hu et al. 2022, arXiv 2106.09685)."""

    rank: Positive = Field(description="Rank r of the update.")
    alpha: Annotated[float, Field(gt=0)] = Field(description="The update is scaled by alpha / rank.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(description="Dropout on the adapter's input.")
    targets: Annotated[list[Text], Field(min_length=1)] = Field(
        description="Names of the linear modules that get an adapter, e.g. q_proj."
    )


class EncoderSettings(Section):
    """How a text becomes one vector; travels with the export."""

    pooling: Literal["eos", "mean"] = Field(description="eos: state of the last token; mean: mean over real tokens.")
    normalize: bool = Field(description="Scale vectors to unit length.")
    append_eos: bool = Field(description="End each text with the tokenizer's end token.")
    query_prefix: str = Field(description="Put before every query, spaces included.")
    passage_prefix: str = Field(description="Put before every passage, spaces included.")
    max_tokens: Annotated[int, Field(ge=2)] = Field(
        description="Longest input in tokens when training, prefix and end token included."
    )
    eval_max_tokens: Annotated[int, Field(ge=2)] = Field(
        description="Longest input in tokens in evaluation and in the export."
    )


# --------------------------------------------------------------------------- objectives


class LanguageModelObjective(Section):
    """Next-token prediction with all parameters; writes export/ (the encoder) and export/lm/ (with its head)."""

    name: Literal["language_model"]
    max_tokens: Annotated[int, Field(ge=2)] = Field(description="Longest passage in tokens.")


class RevelaLanguageModel(Section):
    """The language model that reads the other passages of the pool; thrown away after training."""

    start: Start = Field(description="previous: the export/lm of the stage before.")
    lora: Lora | None = Field(description="Adapters on the language model; null trains all its parameters.")
    max_tokens: Annotated[int, Field(ge=2)] = Field(description="Longest passage in tokens, as the model reads it.")


class RevelaObjective(Section):
    """Revela (arXiv 2506.16552): a retriever learns from next-token prediction through in-batch attention."""

    name: Literal["revela"]
    temperature: Annotated[float, Field(gt=0)] = Field(
        description="tau of the softmax over similarities; the paper uses 1e-4 with bf16 similarities."
    )
    similarity_dtype: Literal["fp32", "bf16", "fp64"] = Field(
        description="Number format of similarities, weights and their softmax."
    )
    v_norm: bool = Field(
        description="Divide the in-batch term by the attended value norms (paper: on for text, off for code)."
    )
    half_query: bool = Field(description="The query side is the first half of the passage's tokens.")
    dual_loss: bool = Field(description="Add the plain next-token loss of pass 1 with weight 1.")
    detach_kv: bool = Field(description="Stop gradients through the cached keys and values (same retriever gradient).")
    language_model: RevelaLanguageModel


Objective = Annotated[LanguageModelObjective | RevelaObjective, Field(discriminator="name")]


# --------------------------------------------------------------------------- data


class Fields(Section):
    """Column names of a source."""

    text: Text = Field("text", description="Column with the text (for groups: the list of texts).")
    title: Text | None = Field(None, description="Column put before the text; null: none.")
    document: Text | None = Field(
        None, description="For format passages: consecutive rows with equal values here are one document."
    )


class HubSource(Section):
    hub: Text = Field(description="Dataset id on the hub.")
    config: Text | None = Field(None, description="Configuration of the dataset; null: the default one.")
    split: Text = Field("train", description="Split of the dataset.")
    format: Literal["documents", "passages", "groups"] = Field(
        "documents",
        description="documents: cut into passages here; passages: one per row; groups: a list of texts per row.",
    )
    fields: Fields = Fields()  # pyright: ignore[reportCallIssue]


class FolderSource(Section):
    folder: Text = Field(description="Folder (or file) with .jsonl, .jsonl.gz or .parquet.")
    format: Literal["documents", "passages", "groups"] = Field("documents", description="As for hub sources.")
    fields: Fields = Fields()  # pyright: ignore[reportCallIssue]


class StdlibSource(Section):
    stdlib: Literal["files"] = Field(
        description="The embedded corpus: files of this Python's standard library, without dev and test docstrings."
    )


def _source_kind(value: Any) -> str | None:
    if isinstance(value, dict):
        known = [kind for kind in ("hub", "folder", "stdlib") if kind in value]
        return known[0] if len(known) == 1 else None
    return {HubSource: "hub", FolderSource: "folder", StdlibSource: "stdlib"}.get(type(value))


Source = Annotated[
    Annotated[HubSource, Tag("hub")] | Annotated[FolderSource, Tag("folder")] | Annotated[StdlibSource, Tag("stdlib")],
    Discriminator(
        _source_kind,
        custom_error_type="source_kind",
        custom_error_message='write {"hub": "<dataset id>"}, {"folder": "<path>"} or {"stdlib": "files"}',
    ),
]


class Passages(Section):
    """How documents are cut: whole units, as many as fit."""

    unit: Literal["sentences", "lines"] = Field(description="Never cut inside a sentence (prose) or a line (code).")
    max_words: Positive = Field(description="Longest passage in words separated by white space (Revela: 120).")


class Data(Section):
    sources: Annotated[list[Source], Field(min_length=1)] = Field(description="Read one after another.")
    passages: Passages | None = Field(None, description="Needed by sources of format documents.")
    interleave: Positive | None = Field(
        None, description="Documents whose passages are dealt in turn; needed by every source but groups."
    )


# --------------------------------------------------------------------------- batch, optimizer, engine


class Batch(Section):
    pool: Annotated[int, Field(ge=2)] = Field(description="Passages that attend to one another.")
    span: Literal["rank", "world"] = Field(description="rank: a pool on one rank; world: spread over all ranks.")
    pools_per_step: Positive = Field(description="Pools per optimizer step, over all ranks.")
    forward_rows: Positive | None = Field(
        description="Rows per slice of gradient caching; null keeps all activations. Memory only, never the result."
    )


class Optim(Section):
    """AdamW (decoupled weight decay)."""

    lr: Annotated[float, Field(gt=0)] = Field(description="Peak learning rate.")
    warmup_steps: Natural = Field(description="Optimizer steps until the peak.")
    warmup: Literal["linear", "log"] = Field(description="Shape of the warm-up; log as DeepSpeed's WarmupLR.")
    schedule: Literal["linear", "cosine", "constant"] = Field(description="After warm-up; linear and cosine end at 0.")
    steps: Positive = Field(description="Optimizer steps of the stage.")
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.999], description="Adam betas."
    )
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="Adam epsilon.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Decoupled weight decay.")
    clip: Annotated[float, Field(ge=0)] = Field(1.0, description="Largest gradient norm; 0 turns clipping off.")


class NvmeOffload(Section):
    nvme: Text = Field(description="Folder on a local NVMe disk.")


def _offload_kind(value: Any) -> str | None:
    if value == "cpu":
        return "cpu"
    return "nvme" if isinstance(value, NvmeOffload) or (isinstance(value, dict) and "nvme" in value) else None


Offload = Annotated[
    Annotated[Literal["cpu"], Tag("cpu")] | Annotated[NvmeOffload, Tag("nvme")],
    Discriminator(
        _offload_kind, custom_error_type="offload_kind", custom_error_message='write "cpu", {"nvme": "<path>"} or null'
    ),
]


class Zero(Section):
    stage: Literal[0, 1, 2, 3] = Field(
        description="What is sharded: 1 optimizer states, 2 + gradients, 3 + parameters."
    )
    offload_optimizer: Offload | None = Field(None, description="Optimizer states to cpu memory or NVMe.")
    offload_param: Offload | None = Field(None, description="Parameters to cpu memory or NVMe (stage 3).")


class Save(Section):
    every: Positive = Field(description="Optimizer steps between checkpoints; the last step is always saved.")
    keep: Positive = Field(description="Newest checkpoints kept.")


class Eval(Section):
    suites: list[Text] = Field(
        description="Scored after the stage: stdlib:dev, stdlib:test, a folder in BEIR layout (FOLDER or FOLDER:split) "
        "or an mteb task or benchmark."
    )


class Export(Section):
    merged: bool = Field(description="Also write export/merged/: full weights with the adapter added in.")


class Stage(Section):
    name: Name = Field(description="Folder name of the stage.")
    description: str = Field("", description="Free text.")
    start: Start = Field(description="The retriever's weights: previous stage, hub, folder or built here.")
    encoder: EncoderSettings
    lora: Lora | None = Field(description="Adapters on the retriever; null trains all its parameters.")
    objective: Objective
    data: Data
    batch: Batch
    optim: Optim
    precision: Literal["bf16", "fp32"] = Field(
        description="Number format of weights and activations; optimizer in fp32."
    )
    activation_checkpointing: bool = Field(False, description="Recompute every layer in the backward pass.")
    zero: Zero
    save: Save
    eval: Eval
    export: Export


class Recipe(Section):
    name: Name = Field(description="Folder name of the run below runs/.")
    description: str = Field(description="What it is, source of every value, hardware, memory and hours.")
    seed: Natural = Field(description="Seed of weights, data order and dropout.")
    stages: Annotated[list[Stage], Field(min_length=1)]

    def digest(self, last: int | None = None) -> str:
        """16 hex digits of what decides the weights after stage `last` (all stages if None): seed and stages."""
        stages = self.stages if last is None else self.stages[: last + 1]
        kept = [stage.model_dump(mode="json", exclude={"description", "eval", "save", "export"}) for stage in stages]
        return hashlib.sha256(json.dumps([self.seed, kept]).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The resolved recipe, every default written out."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


# --------------------------------------------------------------------------- loading


def load_recipe(path: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: JSON file.
        overrides: `key.path=value` strings; the value is JSON, or a plain string when it is not valid JSON.

    Raises:
        RecipeError: with every problem found, one a line, path and fix each.
    """
    path = Path(path)
    raw = read_json(path)
    override(raw, overrides)
    try:
        recipe = Recipe.model_validate(raw)
        recipe.to_json().encode()
    except ValidationError as error:
        raise RecipeError("\n".join(f"{path}: {line}" for line in explain(Recipe, error))) from None
    except UnicodeEncodeError as error:
        broken = error.object[error.start]
        raise RecipeError(f"{path}: {broken!r} is half a character (a lone surrogate); write the whole one") from None
    problems = list(_cross_checks(recipe))
    if problems:
        raise RecipeError("\n".join(f"{path}: {where}: {what}" for where, what in problems))
    return recipe


# --------------------------------------------------------------------------- checks over several keys


def _cross_checks(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(path, problem and fix) of everything that one key alone cannot show."""
    names = [stage.name for stage in recipe.stages]
    for index, stage in enumerate(recipe.stages):
        at = f"stages.{index}"
        before = recipe.stages[index - 1] if index else None
        if names.index(stage.name) < index:
            yield f"{at}.name", f"{stage.name!r} names an earlier stage too; give each stage its own name"
        yield from _check_starts(at, stage, before)
        yield from _check_lengths(at, stage, recipe.stages[: index + 1])
        yield from _check_data(f"{at}.data", stage.data)
        yield from _check_zero(f"{at}.zero", stage.zero)
        if stage.encoder.pooling == "eos" and not stage.encoder.append_eos:
            yield f"{at}.encoder.append_eos", "pooling eos reads the end token; set append_eos to true"
        if isinstance(stage.objective, RevelaObjective) and not stage.encoder.normalize:
            yield f"{at}.encoder.normalize", "revela's similarities are cosines; set normalize to true"
        if isinstance(stage.objective, LanguageModelObjective) and stage.lora is not None:
            yield f"{at}.lora", "language_model trains all parameters; set lora to null"
        if stage.optim.warmup_steps > stage.optim.steps:
            yield f"{at}.optim.warmup_steps", f"is above steps ({stage.optim.steps}); lower it"
        for number, suite in enumerate(stage.eval.suites):
            if suite.startswith("stdlib") and suite not in ("stdlib:dev", "stdlib:test"):
                yield f"{at}.eval.suites.{number}", f"{suite!r} is unknown; write stdlib:dev or stdlib:test"


def _check_starts(at: str, stage: Stage, before: Stage | None) -> Iterator[tuple[str, str]]:
    objective = stage.objective
    if isinstance(objective, RevelaObjective):
        language_model, where = objective.language_model.start, f"{at}.objective.language_model.start"
        if isinstance(stage.start, BuildStart):
            yield (
                f"{at}.start",
                "revela starts from a trained model; build it in a language_model stage before this one",
            )
        if isinstance(language_model, BuildStart):
            yield where, "revela starts from a trained model; build it in a language_model stage before this one"
    else:
        language_model, where = stage.start, f"{at}.start"
    if stage.start == "previous" and before is None:
        yield f"{at}.start", f"there is no stage before the first; {_START_FIX}"
    elif language_model == "previous" and (before is None or not isinstance(before.objective, LanguageModelObjective)):
        yield where, "no language_model stage comes just before; name a hub id or a folder"
    elif stage.start == "previous" and before and before.lora is not None and stage.lora != before.lora:
        yield f"{at}.lora", f"continues the adapter of stage {before.name}; repeat that stage's lora section"
    if isinstance(stage.start, BuildStart):
        build = stage.start.build
        if build.hidden_size % build.heads:
            yield (
                f"{at}.start.build.heads",
                f"{build.heads} does not divide hidden_size {build.hidden_size}; change one",
            )
        elif build.hidden_size // build.heads % 2:
            head = build.hidden_size // build.heads
            yield f"{at}.start.build.heads", f"hidden_size / heads = {head} is odd; rotary embedding needs it even"
        if build.heads % build.kv_heads:
            yield f"{at}.start.build.kv_heads", f"{build.kv_heads} does not divide heads {build.heads}; change one"


def _check_lengths(at: str, stage: Stage, upto: list[Stage]) -> Iterator[tuple[str, str]]:
    """No text may be longer than a model built in this recipe reads (hub models say so themselves)."""
    origin = next(earlier.start for earlier in reversed(upto) if earlier.start != "previous" or earlier is upto[0])
    if not isinstance(origin, BuildStart):
        return
    objective, limit = stage.objective, origin.build.max_tokens
    lengths = {"encoder.max_tokens": stage.encoder.max_tokens, "encoder.eval_max_tokens": stage.encoder.eval_max_tokens}
    if isinstance(objective, LanguageModelObjective):
        lengths["objective.max_tokens"] = objective.max_tokens
    elif objective.language_model.start == "previous":
        lengths["objective.language_model.max_tokens"] = objective.language_model.max_tokens
    for key, value in lengths.items():
        if value > limit:
            yield f"{at}.{key}", f"{value} is above the built model's max_tokens {limit}; lower it"


def _check_data(at: str, data: Data) -> Iterator[tuple[str, str]]:
    formats = {"documents" if isinstance(source, StdlibSource) else source.format for source in data.sources}
    if "groups" in formats and len(formats) > 1:
        yield f"{at}.sources", "groups do not mix with documents or passages; use one kind in a stage"
        return
    if "documents" in formats and data.passages is None:
        yield f"{at}.passages", 'missing; documents need {"unit": ..., "max_words": ...}'
    if "documents" not in formats and data.passages is not None:
        yield f"{at}.passages", "only sources of format documents are cut; remove the key"
    if "groups" in formats and data.interleave is not None:
        yield f"{at}.interleave", "groups are read as they are; remove the key"
    if "groups" not in formats and data.interleave is None:
        yield f"{at}.interleave", "missing; say how many documents are dealt in turn"


def _check_zero(at: str, zero: Zero) -> Iterator[tuple[str, str]]:
    if zero.offload_param is not None and zero.stage != 3:
        yield f"{at}.offload_param", "works at ZeRO stage 3 only; set stage to 3 or offload_param to null"
    if zero.offload_optimizer is not None and zero.stage == 0:
        yield f"{at}.offload_optimizer", "works at ZeRO stages 1 to 3; set stage to 1 or offload_optimizer to null"
    for key, place in (("offload_optimizer", zero.offload_optimizer), ("offload_param", zero.offload_param)):
        if isinstance(place, NvmeOffload) and not Path(place.nvme).is_dir():
            yield f"{at}.{key}.nvme", f"{place.nvme} is no folder; create it on the NVMe disk of every node"


# --------------------------------------------------------------------------- derived numbers


def batch_numbers(stage: Stage, world_size: int) -> dict[str, int]:
    """What the batch keys mean on `world_size` ranks.

    Returns:
        rows_per_step_global, rows_per_forward_per_rank, accumulation_per_rank (forwards per optimizer step),
        slices_per_forward.

    Raises:
        RecipeError: if the pool or pools_per_step cannot be spread over that many ranks; lists those that fit.
    """
    batch = stage.batch
    spread, key = (batch.pool, "pool") if batch.span == "world" else (batch.pools_per_step, "pools_per_step")
    if spread % world_size:
        fits = [str(n) for n in range(1, spread + 1) if spread % n == 0]
        raise RecipeError(
            f"stage {stage.name}: {world_size} ranks do not divide batch.{key} = {spread} (span {batch.span}); "
            f"use {', '.join(fits)} ranks or change batch.{key}"
        )
    rows = batch.pool // world_size if batch.span == "world" else batch.pool
    return {
        "rows_per_step_global": batch.pool * batch.pools_per_step,
        "rows_per_forward_per_rank": rows,
        "accumulation_per_rank": batch.pools_per_step if batch.span == "world" else batch.pools_per_step // world_size,
        "slices_per_forward": 1 if batch.forward_rows is None else -(-rows // batch.forward_rows),
    }
