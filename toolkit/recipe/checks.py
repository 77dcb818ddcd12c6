"""Checks over several keys of the stages: what one key alone cannot show. Called by load_recipe.

What a method asks of its own sections, and of others, stands in its keys.py.
"""

import os
from collections.abc import Iterator

from toolkit import methods
from toolkit.recipe.models import START_FIX, BuildStart
from toolkit.recipe.search import CODE_HAS_NO_LANGUAGE
from toolkit.recipe.stage import Stage
from toolkit.recipe.training import NvmeOffload, Zero

Problems = Iterator[tuple[str, str]]


def cross_checks(stages: list[Stage]) -> Problems:
    """(path, problem and fix) of everything that one key alone cannot show, in the stages of a recipe."""
    names = [stage.name for stage in stages]
    for index, stage in enumerate(stages):
        at = f"stages.{index}"
        before = stages[index - 1] if index else None
        if names.index(stage.name) < index:
            yield f"{at}.name", f"{stage.name!r} names an earlier stage too; give each stage its own name"
        yield from _check_starts(at, stage, before)
        yield from _check_lengths(at, stage, stages[: index + 1])
        yield from methods.keys_of(stage.objective.name).check(at, stage, before is None)
        yield from _check_zero(f"{at}.zero", stage.zero)
        if stage.batch.forward_rows is not None and stage.batch.forward_tokens is not None:
            yield f"{at}.batch.forward_tokens", "stands beside forward_rows; remove one of the two"
        if stage.encoder.pooling == "eos" and stage.encoder.append_eos is False:
            yield f"{at}.encoder.append_eos", "pooling eos reads the end token; remove the key, or set it to true"
        if stage.optim.warmup_steps > stage.optim.steps:
            yield f"{at}.optim.warmup_steps", f"is above steps ({stage.optim.steps}); lower it"
        if stage.eval.context is not None and not methods.keys_of(stage.objective.name).contextual:
            yield f"{at}.eval.context", f"what {stage.objective.name} trains reads no context; remove the key"
        for key in ("identical_ids", "bm25_text", "bm25_language"):
            if getattr(stage.eval, key) != getattr(stages[0].eval, key):
                yield f"{at}.eval.{key}", "differs from the first stage's, with which BM25 is scored; make them equal"
        if stage.eval.bm25_text == "code" and stage.eval.bm25_language is not None:
            yield f"{at}.eval.bm25_language", CODE_HAS_NO_LANGUAGE
        yield from _check_stop(f"{at}.eval.stop_if_worse", stage, before)
        for number, suite in enumerate(stage.eval.suites):
            if suite.startswith("stdlib") and suite not in ("stdlib:dev", "stdlib:test"):
                yield f"{at}.eval.suites.{number}", f"{suite!r} is unknown; write stdlib:dev or stdlib:test"


def _check_starts(at: str, stage: Stage, before: Stage | None) -> Problems:
    """Each model of a stage comes from somewhere."""
    keys = methods.keys_of(stage.objective.name)
    leaves_lm = before is not None and methods.keys_of(before.objective.name).exports_lm
    for number, model in enumerate(keys.models(stage)):
        where = f"{at}.{model.key}"
        if isinstance(model.start, BuildStart) and (number or not keys.may_build):
            fix = f"build it in a {_with_lm()} stage before this one"
            yield where, f"{stage.objective.name} starts from a trained model; {fix}"
        if model.start == "previous" and before is None and not number:
            yield where, f"there is no stage before the first; {START_FIX}"
        elif model.start == "previous" and model.causal and not leaves_lm:
            yield where, f"no {_with_lm()} stage comes just before; name a hub id or a folder"
        elif model.start == "previous" and not number and before and before.lora and stage.lora != before.lora:
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


def _with_lm() -> str:
    """The methods that leave a language model to the stage after them."""
    return " or ".join(name for name in methods.TABLE if methods.keys_of(name).exports_lm)


def _check_lengths(at: str, stage: Stage, upto: list[Stage]) -> Problems:
    """No text may be longer than a model built in this recipe reads (hub models say so themselves)."""
    origin = next(earlier.start for earlier in reversed(upto) if earlier.start != "previous" or earlier is upto[0])
    if not isinstance(origin, BuildStart):
        return
    limit = origin.build.max_tokens
    for number, model in enumerate(methods.keys_of(stage.objective.name).models(stage)):
        for key, value in model.lengths.items() if not number or model.start == "previous" else ():
            if value is not None and value > limit:
                yield f"{at}.{key}", f"{value} is above the built model's max_tokens {limit}; lower it"


def _check_stop(at: str, stage: Stage, before: Stage | None) -> Problems:
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


def _check_zero(at: str, zero: Zero) -> Problems:
    if zero.offload_param is not None and zero.stage != 3:
        yield f"{at}.offload_param", "works at ZeRO stage 3 only; set stage to 3 or offload_param to null"
    if isinstance(zero.offload_optimizer, NvmeOffload) and zero.stage != 3:  # DeepSpeed would use memory and not say so
        yield f"{at}.offload_optimizer", 'NVMe works at ZeRO stage 3 only; set stage to 3 or offload_optimizer to "cpu"'
    elif zero.offload_optimizer is not None and zero.stage == 0:
        yield f"{at}.offload_optimizer", "works at ZeRO stages 1 to 3; set stage to 1 or offload_optimizer to null"
    for key, place in (("offload_optimizer", zero.offload_optimizer), ("offload_param", zero.offload_param)):
        if isinstance(place, NvmeOffload) and not os.path.isdir(place.nvme):
            yield f"{at}.{key}.nvme", f"{place.nvme} is no folder; create it on the NVMe disk of every node"
