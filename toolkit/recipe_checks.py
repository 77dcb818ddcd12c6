"""Checks over several keys of a recipe: what one key alone cannot show. Called by load_recipe."""

import os
from collections.abc import Iterator
from typing import Any

from toolkit.recipe import (
    START_FIX,
    Bm25Mine,
    Bm25Neighbours,
    BuildStart,
    ContrastiveObjective,
    Data,
    EmbeddingNeighbours,
    Fields,
    FolderSource,
    HubSource,
    LanguageModelObjective,
    MineSettings,
    NvmeOffload,
    Recipe,
    ReContrieverObjective,
    RetrieverMine,
    RevelaObjective,
    SourceSettings,
    Stage,
    StdlibSource,
    TemperatureDecay,
    Zero,
)

# The formats of sources that each method reads.
NEEDED_DATA = {
    "language_model": {"documents", "passages", "groups"},
    "revela": {"documents", "passages", "groups"},
    "contrastive": {"pairs", "beir"},
    "recontriever": {"documents"},
}

_CODE_HAS_NONE = 'code is read without a language; leave it out, or set text to "prose"'


def cross_checks(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(path, problem and fix) of everything that one key alone cannot show."""
    names = [stage.name for stage in recipe.stages]
    for index, stage in enumerate(recipe.stages):
        at = f"stages.{index}"
        before = recipe.stages[index - 1] if index else None
        if names.index(stage.name) < index:
            yield f"{at}.name", f"{stage.name!r} names an earlier stage too; give each stage its own name"
        yield from _check_starts(at, stage, before)
        yield from _check_lengths(at, stage, recipe.stages[: index + 1])
        yield from _check_data(f"{at}.data", stage)
        yield from _check_mine(f"{at}.data", stage.data, before)
        yield from _check_zero(f"{at}.zero", stage.zero)
        if stage.encoder.pooling == "eos" and stage.encoder.append_eos is False:
            yield f"{at}.encoder.append_eos", "pooling eos reads the end token; remove the key, or set it to true"
        yield from _check_method(at, stage)
        if isinstance(stage.objective, RevelaObjective) and stage.encoder.normalize is False:
            yield f"{at}.encoder.normalize", "revela's similarities are cosines; set normalize to true"
        if isinstance(stage.objective, RevelaObjective) and isinstance(stage.objective.temperature, TemperatureDecay):
            yield from _check_decay(f"{at}.objective.temperature", stage.objective.temperature, stage.optim.steps)
        if isinstance(stage.objective, LanguageModelObjective) and stage.lora is not None:
            yield f"{at}.lora", "language_model trains all parameters; set lora to null"
        if stage.optim.warmup_steps > stage.optim.steps:
            yield f"{at}.optim.warmup_steps", f"is above steps ({stage.optim.steps}); lower it"
        for key in ("identical_ids", "bm25_text", "bm25_language"):
            if getattr(stage.eval, key) != getattr(recipe.stages[0].eval, key):
                yield f"{at}.eval.{key}", "differs from the first stage's, with which BM25 is scored; make them equal"
        if stage.eval.bm25_text == "code" and stage.eval.bm25_language is not None:
            yield f"{at}.eval.bm25_language", _CODE_HAS_NONE
        yield from _check_stop(f"{at}.eval.stop_if_worse", stage, before)
        for number, suite in enumerate(stage.eval.suites):
            if suite.startswith("stdlib") and suite not in ("stdlib:dev", "stdlib:test"):
                yield f"{at}.eval.suites.{number}", f"{suite!r} is unknown; write stdlib:dev or stdlib:test"


def _check_starts(at: str, stage: Stage, before: Stage | None) -> Iterator[tuple[str, str]]:
    objective, reads_lm = stage.objective, f"{at}.start"
    lm_start: Any = stage.start if isinstance(objective, LanguageModelObjective) else None
    if isinstance(objective, RevelaObjective):
        lm_start, reads_lm = objective.language_model.start, f"{at}.objective.language_model.start"
    starts = {f"{at}.start": stage.start, reads_lm: lm_start or stage.start}
    for where, start in starts.items():
        if isinstance(start, BuildStart) and not isinstance(objective, LanguageModelObjective | ReContrieverObjective):
            yield (
                where,
                f"{objective.name} starts from a trained model; build it in a language_model stage before this one",
            )
    if stage.start == "previous" and before is None:
        yield f"{at}.start", f"there is no stage before the first; {START_FIX}"
    elif lm_start == "previous" and (before is None or not isinstance(before.objective, LanguageModelObjective)):
        yield reads_lm, "no language_model stage comes just before; name a hub id or a folder"
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
    if stage.eval.max_tokens is not None:
        lengths["eval.max_tokens"] = stage.eval.max_tokens
    if isinstance(objective, LanguageModelObjective):
        lengths["objective.max_tokens"] = objective.max_tokens
    elif isinstance(objective, RevelaObjective) and objective.language_model.start == "previous":
        lengths["objective.language_model.max_tokens"] = objective.language_model.max_tokens
    for key, value in lengths.items():
        if value is not None and value > limit:
            yield f"{at}.{key}", f"{value} is above the built model's max_tokens {limit}; lower it"


def _check_data(at: str, stage: Stage) -> Iterator[tuple[str, str]]:
    data, needed = stage.data, NEEDED_DATA[stage.objective.name]
    formats = {_format(source) for source in data.sources}
    if unfit := sorted(formats - needed):
        yield f"{at}.sources", f"{stage.objective.name} reads {' or '.join(sorted(needed))}, not {', '.join(unfit)}"
        return
    if "groups" in formats and len(formats) > 1:
        yield f"{at}.sources", "groups do not mix with documents or passages; use one kind in a stage"
        return
    cut, dealt = "documents" in formats and "passages" in needed, bool(formats & {"documents", "passages"} & needed)
    dealt = dealt and "passages" in needed
    if cut and data.passages is None:
        yield f"{at}.passages", 'missing; documents need {"unit": ..., "max_words": ...}'
    if not cut and data.passages is not None:
        yield f"{at}.passages", "only documents for revela or language_model are cut; remove the key"
    if "groups" in formats and data.interleave is not None:
        yield f"{at}.interleave", "groups are read as they are; remove the key"
    elif not dealt and data.interleave is not None:
        yield f"{at}.interleave", f"{stage.objective.name} deals no passages; remove the key"
    if dealt and data.interleave is None:
        yield f"{at}.interleave", "missing; say how many documents are dealt in turn"
    yield from _check_neighbours(at, stage, dealt)
    yield from _check_sources(at, data)
    yield from _check_pairs(at, data, needed == NEEDED_DATA["contrastive"])
    crops = data.crops
    if (crops is None) == (stage.objective.name == "recontriever"):
        fix = 'missing; recontriever needs {"chunk_tokens": ...}' if crops is None else "recontriever's; remove the key"
        yield f"{at}.crops", fix
    elif crops is not None and crops.min_ratio > crops.max_ratio:
        yield f"{at}.crops.min_ratio", f"is above max_ratio {crops.max_ratio}; lower it"


def _check_neighbours(at: str, stage: Stage, dealt: bool) -> Iterator[tuple[str, str]]:
    data, method = stage.data, stage.objective.name
    if data.neighbours is not None and not dealt:
        yield f"{at}.neighbours", "only documents whose passages are dealt (interleave) have neighbours; remove the key"
    elif data.neighbours is not None and data.interleave == 1:
        yield f"{at}.interleave", "a bundle of neighbours has two documents or more; raise it, or remove neighbours"
    elif isinstance(data.neighbours, EmbeddingNeighbours) and method != "revela":
        yield f"{at}.neighbours", f'{method} starts from no retriever; write {{"by": "bm25", "text": ...}} or null'
    if isinstance(data.neighbours, Bm25Neighbours) and data.neighbours.text == "code" and data.neighbours.language:
        yield f"{at}.neighbours.language", _CODE_HAS_NONE
    if data.near_duplicates is not None and method != "revela":
        yield f"{at}.near_duplicates", f"passages do not read one another in {method}; remove the key"


# The fields that each format reads.
READ_FIELDS = {
    "documents": {"text", "title"},
    "passages": {"text", "title", "document"},
    "groups": {"text"},
    "pairs": {"text", "title", "query", "positive", "negatives", "weight"},
    "beir": set(),
}


def _check_sources(at: str, data: Data) -> Iterator[tuple[str, str]]:
    """Keys of a source that its format does not read."""
    for number, source in enumerate(data.sources):
        if isinstance(source, StdlibSource):
            continue
        if isinstance(source, FolderSource) and source.format == "beir" and source.config is not None:
            yield f"{at}.sources.{number}.config", "a folder in BEIR layout has none; remove the key"
        for key, field in Fields.model_fields.items():
            if key not in READ_FIELDS[source.format] and getattr(source.fields, key) != field.default:
                yield f"{at}.sources.{number}.fields.{key}", f"is not read with format {source.format}; remove the key"


def _format(source: HubSource | FolderSource | StdlibSource) -> str:
    if isinstance(source, StdlibSource):
        return "documents" if source.stdlib == "files" else "pairs"
    return source.format


def _check_pairs(at: str, data: Data, pairs: bool) -> Iterator[tuple[str, str]]:
    """Keys that only sources of pairs have, and weights that go together."""
    if not pairs:
        for key in ("positives", "negatives", "mix", "mine"):
            if getattr(data, key) != Data.model_fields[key].default:
                yield f"{at}.{key}", "belongs to sources of pairs; remove the key"
        for number, source in enumerate(data.sources):
            for key in (key for key in SourceSettings.model_fields if getattr(source, key) is not None):
                yield f"{at}.sources.{number}.{key}", "belongs to sources of pairs; remove the key"
        return
    weighted = [source.weight is not None for source in data.sources]
    if any(weighted) and not all(weighted):
        yield f"{at}.sources.{weighted.index(False)}.weight", "missing; give every source a weight, or none"
    if len(data.sources) > 1 and data.mix is None:
        yield f"{at}.mix", 'missing; write "rows" (all sources in every pool) or "pools" (one source per pool)'
    if len(data.sources) == 1 and data.mix is not None:
        yield f"{at}.mix", "there is one source; remove the key"


def _check_mine(at: str, data: Data, before: Stage | None) -> Iterator[tuple[str, str]]:
    """Mined negatives come from somewhere and are used."""
    mine = data.mine
    if mine is None:
        return
    for key, problem in mine_problems(mine):
        yield f"{at}.mine.{key}", problem
    if isinstance(mine, RetrieverMine) and before is None:
        yield f"{at}.mine.by", 'there is no stage before the first; write {"by": "bm25", "text": ...}'
    if not 0 < data.negatives <= mine.negatives:
        most = mine.negatives
        fix = f"set negatives to {'1' if most == 1 else f'1 or {most}' if most == 2 else f'1 to {most}'}"
        if data.negatives > most:
            fix += f", raise mine.negatives to {data.negatives}"
        yield f"{at}.negatives", f"{data.negatives}, but data.mine finds {most} a row; {fix}, or remove mine"


def mine_problems(mine: MineSettings) -> Iterator[tuple[str, str]]:
    """(key, problem and fix) of what does not fit together in the settings of mining."""
    first, last = mine.ranks
    if last - first + 1 < mine.negatives:
        held = max(0, last - first + 1)
        fix = f"set ranks to {first} and {first + mine.negatives - 1} or more" + (
            f", or negatives to {held}" * (held > 0)
        )
        yield (
            "ranks",
            f"{first} to {last} hold {held} passages, but negatives asks for {mine.negatives}; {fix}",
        )
    if mine.positive != "highest" and mine.max_share is None and mine.margin is None:
        yield "positive", "only max_share and margin count from it; set one of them, or leave positive out"
    if isinstance(mine, Bm25Mine) and mine.text == "code" and mine.language is not None:
        yield "language", _CODE_HAS_NONE


def _check_decay(at: str, decay: TemperatureDecay, steps: int) -> Iterator[tuple[str, str]]:
    """A decay falls, and has a first and a last step."""
    if decay.end > decay.start:
        yield f"{at}.end", f"{decay.end:g} is above start {decay.start:g}; a temperature decays, so lower it"
    if steps == 1:
        yield at, "one step has no decay; write a number"


def _check_method(at: str, stage: Stage) -> Iterator[tuple[str, str]]:
    """What the contrastive methods ask of other keys."""
    objective, batch = stage.objective, stage.batch
    if batch.forward_rows is not None and batch.forward_tokens is not None:
        yield f"{at}.batch.forward_tokens", "stands beside forward_rows; remove one of the two"
    if isinstance(objective, ContrastiveObjective):
        if len(set(objective.directions)) < len(objective.directions):
            yield f"{at}.objective.directions", "names a direction twice; name each once"
        if objective.partition == "joint" and len(objective.directions) == 1:
            yield f"{at}.objective.partition", "there is one direction; set it to separate"
        if objective.learn_temperature and objective.temperature < 0.01:
            yield f"{at}.objective.temperature", "a learned temperature is at least 0.01; raise it"
        if "query_to_document" not in objective.directions:
            yield f"{at}.objective.directions", "lacks query_to_document; add it"
        if objective.matryoshka is not None and len(set(objective.matryoshka)) < len(objective.matryoshka):
            yield f"{at}.objective.matryoshka", "names a dimension twice; name each once"
    if isinstance(objective, ReContrieverObjective):
        for key in ("query_prefix", "passage_prefix"):
            if getattr(stage.encoder, key):
                yield f"{at}.encoder.{key}", 'crops are trained without prefixes; set it to ""'
        softmax = objective.relevance == "softmax"
        if softmax == (objective.relevance_temperature is None):
            fix = "missing; softmax weights need it" if softmax else "only softmax weights have one; remove the key"
            yield f"{at}.objective.relevance_temperature", fix
        if objective.clamp_negative and objective.relevance != "linear":
            yield f"{at}.objective.clamp_negative", "only linear weights can be negative; set it to false"
        keys = objective.views * batch.pool * batch.pools_per_step
        if objective.queue is not None and objective.queue.size % keys:
            fits = max(1, objective.queue.size // keys) * keys
            yield (
                f"{at}.objective.queue.size",
                f"is no multiple of the {keys} keys of a step (views x pool x pools_per_step); write {fits}",
            )
        if objective.queue is not None and stage.zero.stage == 3 and stage.lora is None:
            yield (
                f"{at}.zero.stage",
                "a momentum copy of all parameters would have to be gathered whole at every step; use stage 0, 1 or 2, "
                "lora, or in-batch negatives (objective.queue null)",
            )


def _check_stop(at: str, stage: Stage, before: Stage | None) -> Iterator[tuple[str, str]]:
    """There must be scores to compare."""
    stop, suites = stage.eval.stop_if_worse, stage.eval.suites
    if stop is None:
        return
    if not suites:
        yield at, "nothing is scored after this stage; name suites, or set it to null"
    elif stop.than == "previous" and before is None:
        yield f"{at}.than", 'there is no stage before the first; write "start" or "bm25"'
    elif stop.than == "previous" and before is not None and not set(suites) & set(before.eval.suites):
        yield f"{at}.than", f"stage {before.name} is scored on none of this stage's suites; give it one of them"


def _check_zero(at: str, zero: Zero) -> Iterator[tuple[str, str]]:
    if zero.offload_param is not None and zero.stage != 3:
        yield f"{at}.offload_param", "works at ZeRO stage 3 only; set stage to 3 or offload_param to null"
    if isinstance(zero.offload_optimizer, NvmeOffload) and zero.stage != 3:  # DeepSpeed would use memory and not say so
        yield f"{at}.offload_optimizer", 'NVMe works at ZeRO stage 3 only; set stage to 3 or offload_optimizer to "cpu"'
    elif zero.offload_optimizer is not None and zero.stage == 0:
        yield f"{at}.offload_optimizer", "works at ZeRO stages 1 to 3; set stage to 1 or offload_optimizer to null"
    for key, place in (("offload_optimizer", zero.offload_optimizer), ("offload_param", zero.offload_param)):
        if isinstance(place, NvmeOffload) and not os.path.isdir(place.nvme):
            yield f"{at}.{key}.nvme", f"{place.nvme} is no folder; create it on the NVMe disk of every node"
