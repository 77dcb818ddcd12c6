"""The revela method: the retriever learns from what a language model makes of the passages that it weights."""

from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig

from toolkit.data.first_look import Look, look_at_texts
from toolkit.methods.costs import Costs, head_cost, matrices, recomputations, rule_text
from toolkit.methods.method import Feed, Lines, Method, Models, Row, StageRun, Tokenizers
from toolkit.methods.passages import open_passages, passage_epochs, warn_of_groups
from toolkit.methods.preview import as_tokens, first_passage, for_causal_lm
from toolkit.methods.revela.inbatch_attention import INBATCH_ATTENTION, InBatchLanguageModel
from toolkit.methods.revela.keys import RevelaStage
from toolkit.methods.revela.objective import Revela
from toolkit.methods.revela.rows import collate_revela
from toolkit.methods.shared import build_encoder, logit_chunks, recompute_layers
from toolkit.models.backbone import DTYPES, adapted, load_causal_lm, read_config
from toolkit.models.lengths import check_window
from toolkit.models.vocabulary import model_tokenizer
from toolkit.recipe.errors import RecipeError


def _row(stage: RevelaStage) -> Row:
    longest = stage.objective.language_model.max_tokens
    return Row("passages", 1, longest, {"queries": 1, "passages": 1, "language model inputs": 1})


def _open_feed(run: StageRun, models: Models, tokenizer: Any) -> Feed:
    objective = run.stage.objective
    read = partial(
        collate_revela,
        tokenizer=tokenizer,
        lm_tokenizer=model_tokenizer(models.others["language_model"].folder),
        encoder=run.stage.encoder_settings,
        half_query=objective.half_query,
        lm_max_tokens=objective.language_model.max_tokens,
        near_duplicates=run.stage.data.near_duplicates,
    )
    return open_passages(run, models, read)


def _build(stage: RevelaStage, seed: int, device: torch.device | str, models: Models) -> Revela:
    reader, folder = stage.objective.language_model, models.others["language_model"].folder
    config = read_config(folder)
    check_window(config, reader.max_tokens)
    encoder = build_encoder(stage, seed, device, models.retriever)
    causal_lm = load_causal_lm(folder, DTYPES[stage.precision], INBATCH_ATTENTION, device)
    causal_lm = adapted(causal_lm, reader.lora, None, True, seed + 1).train()
    if stage.activation_checkpointing:
        recompute_layers(causal_lm)
    chunks = logit_chunks(stage, reader.max_tokens, config.vocab_size)
    language_model = InBatchLanguageModel(causal_lm, stage.objective.v_norm, chunks)
    return Revela(encoder, language_model, stage.objective, stage.batch, stage.data.near_duplicates, stage.optim.steps)


def _costs(stage: RevelaStage, objective: Revela) -> Costs:
    """The language model reads a text twice: for its keys and values, which carry a gradient unless detached, and for
    the loss. The plain loss of pass 1 needs the head forward, and backward only if it is trained on.
    """
    again = recomputations(stage)
    retriever, _ = matrices(objective.encoder.backbone, stage.zero.stage)
    body, head = matrices(objective.language_model.causal_lm, stage.zero.stage)
    of_head = head_cost(head, stage.in_slices, objective.language_model.logit_chunks)
    dual = objective.settings.dual_loss
    backward = dual or not objective.settings.detach_kv
    first = body.cost(backward, again if backward else 0) + (of_head if dual else head.cost(False))
    second = body.cost(True, again) + of_head
    rules = [rule_text("retriever", [retriever], again), rule_text("language model, twice", [body, head], again)]
    if not backward:
        rules.append("pass 1 forward only")
    side = retriever.cost(True, again)
    return Costs({"query": side, "passage": side, "text": first + second}, "; ".join(rules))


def _fit(stage: RevelaStage, configs: dict[str, PretrainedConfig]) -> None:
    try:
        check_window(configs["language_model"], stage.objective.language_model.max_tokens)
    except ValueError as error:
        raise RecipeError(f"objective.language_model.max_tokens: {error}") from None


def _example(stage: RevelaStage, number: int, look: Look, tokenizers: Tokenizers) -> Lines:
    del number
    encoder, reader = stage.encoder_settings, tokenizers("language_model")
    text, tokenizer = first_passage(look, stage.data), tokenizers("retriever")
    lines = [
        as_tokens("query", tokenizer, text, encoder.query_prefix, encoder, stage.objective.half_query),
        as_tokens("passage", tokenizer, text, encoder.passage_prefix, encoder),
    ]
    if isinstance(reader, str):
        return [*lines, ("example for language model", f"not shown: {reader}")]
    longest = stage.objective.language_model.max_tokens
    return [*lines, for_causal_lm("for language model", reader, text, longest)]


METHOD = Method(
    row=_row,
    open_feed=_open_feed,
    build=_build,
    costs=_costs,
    fit=_fit,
    look=look_at_texts,
    warn=warn_of_groups,
    epochs=passage_epochs,
    example=_example,
    training_text=None,
    card="Revela: Dense Retriever Learning via Language Modeling "
    "([arXiv 2506.16552](https://arxiv.org/abs/2506.16552))",
)
