"""The contrastive method: queries against the documents of their pool."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PretrainedConfig

from toolkit.data.first_look import Look, check_limit, look_at_pairs, no_negatives, too_few
from toolkit.data.pairs import PairPlan
from toolkit.methods.contrastive.keys import ContrastiveStage
from toolkit.methods.contrastive.objective import Contrastive
from toolkit.methods.contrastive.rows import open_pairs
from toolkit.methods.costs import Costs, matrices, recomputations, rule_text
from toolkit.methods.method import Lines, Method, Models, Row, Tokenizers
from toolkit.methods.preview import as_tokens
from toolkit.methods.shared import build_encoder
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.pairs import PairsData, PairSource


def _row(stage: ContrastiveStage) -> Row:
    data = stage.data
    positives = f"at most {data.positives} positives" if data.positives > 1 else "1 positive"
    negatives = f"at most {data.negatives}" if data.negatives else "0"  # rows may have fewer
    what = f"queries with {positives} and {negatives} hard negatives each"
    documents = data.positives + data.negatives
    return Row(what, 1 + documents, stage.encoder.max_tokens, {"queries": 1, "documents": documents})


def _build(stage: ContrastiveStage, seed: int, device: torch.device | str, models: Models) -> Contrastive:
    encoder = build_encoder(stage, seed, device, models.retriever)
    return Contrastive(encoder, stage.objective, stage.batch).to(device)


def _costs(stage: ContrastiveStage, objective: Contrastive) -> Costs:
    again = recomputations(stage)
    body, _ = matrices(objective.encoder.backbone, stage.zero.stage)
    return Costs(dict.fromkeys(("query", "document"), body.cost(True, again)), rule_text("retriever", [body], again))


def _fit(stage: ContrastiveStage, configs: dict[str, PretrainedConfig]) -> None:
    """The export holds vectors of all dimensions, so these are trained too."""
    if stage.objective.matryoshka is None:
        return
    largest, width = max(stage.objective.matryoshka), configs["retriever"].hidden_size
    if largest > width:
        raise RecipeError(f"objective.matryoshka: {largest} is more than the model's {width} dimensions; remove it")
    if largest < width:
        problem = f"lacks the model's {width} dimensions, which its export has; add {width}"
        raise RecipeError(f"objective.matryoshka: {problem}")


def _look(source: PairSource, data: PairsData) -> Look:
    seen = look_at_pairs(source, data)
    check_limit(source)
    return seen


def _warn(data: PairsData, looks: dict[int, Look]) -> Iterator[tuple[bool, str]]:
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


def _epochs(stage: ContrastiveStage, seed: int, counts: list[int], looks: list[Look], tokenizer: Any) -> str:
    del looks, tokenizer
    data, batch = stage.data, stage.batch
    sizes = [min(n, source.limit or n) for n, source in zip(counts, data.sources, strict=True)]
    weights = [source.weight for source in data.sources if source.weight is not None]
    plan = PairPlan(sizes, weights or None, batch.pool, data.mix, seed)
    epochs = stage.optim.steps * batch.pools_per_step / plan.pools_per_epoch
    longest = " of the source that lasts longest" if len(sizes) > 1 else ""
    return f"{epochs:.2f}{longest} (more if rows lack a query or positive: they are left out)"


def _example(stage: ContrastiveStage, number: int, look: Look, tokenizers: Tokenizers) -> Lines:
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


METHOD = Method(
    row=_row,
    open_feed=open_pairs,
    build=_build,
    costs=_costs,
    fit=_fit,
    look=_look,
    warn=_warn,
    epochs=_epochs,
    example=_example,
    training_text=None,
    card="InfoNCE over (query, positive, negatives) rows and the other rows of the pool",
)
