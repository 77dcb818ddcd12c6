"""The language_model method: a causal language model trained on passages, and read as a retriever afterwards."""

from functools import partial
from typing import Any

import torch

from toolkit.data.first_look import Look, look_at_texts
from toolkit.methods.costs import Costs, head_cost, matrices, recomputations, rule_text
from toolkit.methods.language_model.keys import LanguageModelStage
from toolkit.methods.language_model.objective import LanguageModel
from toolkit.methods.language_model.rows import collate_language_model
from toolkit.methods.method import Feed, Lines, Method, Models, Row, StageRun, Tokenizers
from toolkit.methods.passages import open_passages, passage_epochs, passages_alone, warn_of_groups
from toolkit.methods.preview import first_passage, for_causal_lm
from toolkit.methods.shared import logit_chunks, recompute_layers
from toolkit.models.backbone import DTYPES, load_causal_lm, read_config


def _row(stage: LanguageModelStage) -> Row:
    return Row("passages", 1, stage.objective.max_tokens, {"passages": 1})


def _open_feed(run: StageRun, models: Models, tokenizer: Any) -> Feed:
    longest = run.stage.objective.max_tokens
    return open_passages(run, models, partial(collate_language_model, tokenizer=tokenizer, max_tokens=longest))


def _build(stage: LanguageModelStage, seed: int, device: torch.device | str, models: Models) -> LanguageModel:
    del seed  # nothing is drawn: all weights are there
    folder = models.retriever.folder
    causal_lm = load_causal_lm(folder, DTYPES[stage.precision], "sdpa", device).train()
    if stage.activation_checkpointing:
        recompute_layers(causal_lm)
    chunks = logit_chunks(stage, stage.objective.max_tokens, read_config(folder).vocab_size)
    encoder = stage.encoder_settings
    return LanguageModel(causal_lm, encoder.pooling, encoder.normalize, stage.batch, chunks)


def _costs(stage: LanguageModelStage, objective: LanguageModel) -> Costs:
    again = recomputations(stage)
    body, head = matrices(objective.causal_lm, stage.zero.stage)
    cost = body.cost(True, again) + head_cost(head, stage.in_slices, objective.logit_chunks)
    return Costs({"text": cost}, rule_text("language model", [body, head], again))


def _example(stage: LanguageModelStage, number: int, look: Look, tokenizers: Tokenizers) -> Lines:
    del number
    text = first_passage(look, stage.data)
    return [for_causal_lm("passage", tokenizers("language_model"), text, stage.objective.max_tokens)]


METHOD = Method(
    row=_row,
    open_feed=_open_feed,
    build=_build,
    costs=_costs,
    fit=None,
    look=look_at_texts,
    warn=warn_of_groups,
    epochs=passage_epochs,
    example=_example,
    training_text=passages_alone,
    card="next-token prediction with all parameters (a language model read as a retriever)",
)
