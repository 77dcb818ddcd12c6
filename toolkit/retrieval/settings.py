"""How a retriever is evaluated: settings that differ from its export's, their flags, and prompts of tasks.

Called by eval.evaluate, toolkit.retrieval.retrievers, and the commands eval.run and toolkit.mine.
"""

import argparse
from typing import Any

from pydantic import ValidationError

from toolkit.models.lengths import check_length
from toolkit.models.retriever import Retriever
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.evaluation import EvalSettings
from toolkit.recipe.models import EncoderSettings

WHAT = "an export, a sentence-transformers model, an adapter or a base model, each a folder or a hub id; or bm25"


def add_model_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add `what`, --adapter and the settings of a retriever to a command; returns the settings' group."""
    parser.add_argument("what", help=WHAT)
    parser.add_argument("--adapter", metavar="FOLDER", help="an adapter for a base model")
    group = parser.add_argument_group("instead of the model's own settings (written into the result)")
    group.add_argument("--query-prefix", metavar="TEXT")
    group.add_argument("--passage-prefix", metavar="TEXT")
    group.add_argument("--max-tokens", type=int, metavar="N")
    group.add_argument("--pooling", help="eos, mean or cls")
    group.add_argument("--normalize", choices=("true", "false"), help="false: raw dot products")
    return group


def settings_from_flags(arguments: argparse.Namespace, **others: Any) -> EvalSettings:
    """The settings that the flags of `add_model_flags` give, and `others`; raises RecipeError naming the flag."""
    values = {
        "query_prefix": arguments.query_prefix,
        "passage_prefix": arguments.passage_prefix,
        "max_tokens": arguments.max_tokens,
        "pooling": arguments.pooling,
        "normalize": None if arguments.normalize is None else arguments.normalize == "true",
    }
    try:
        return EvalSettings.model_validate(values | others)
    except ValidationError as error:
        problem = error.errors()[0]
        raise RecipeError(f"--{str(problem['loc'][0]).replace('_', '-')}: {problem['msg']}") from None


def check_bm25_flags(others: object, changes: EvalSettings) -> None:
    """Raise RecipeError if bm25 is given settings of a retriever, or `others` (None: not given)."""
    of_models = changes.model_dump(exclude_defaults=True, exclude={"identical_ids", "bm25_text", "bm25_language"})
    if others is not None or of_models:
        raise RecipeError("bm25 has no adapter, prefixes, length, pooling, normalisation or vectors; drop their flags")


def with_settings(retriever: Retriever, changes: EvalSettings) -> Retriever:
    """A retriever with other prefixes, length, pooling or normalisation; the weights are shared.

    Raises:
        RecipeError: for a length above the model's learned positions.
    """
    settings = changed(retriever.settings, changes)
    if settings == retriever.settings:
        return retriever
    backbone = retriever.encoder.backbone
    try:
        check_length(backbone.config, settings.eval_max_tokens, "it")  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise RecipeError(f"eval.max_tokens: {error}") from None
    if retriever.first is not None and settings.pooling != retriever.settings.pooling:
        raise RecipeError("eval.pooling: a contextual retriever pools as it was trained to; leave it out")
    encoder = retriever.encoder.changed(settings.pooling, settings.normalize, settings.truncate_dim).eval()
    return retriever._replace(encoder=encoder, settings=settings)


def changed(settings: EncoderSettings, changes: EvalSettings) -> EncoderSettings:
    """Encoder settings with those of an evaluation in their place.

    Pooling eos in place of another adds the end token where the tokenizer puts none after a text.
    """
    to_eos = changes.pooling == "eos" and settings.pooling != "eos"
    given = {
        "query_prefix": changes.query_prefix,
        "passage_prefix": changes.passage_prefix,
        "eval_max_tokens": changes.max_tokens,
        "pooling": changes.pooling,
        "normalize": changes.normalize,
        "append_eos": True if to_eos else None,
    }
    return settings.model_copy(update={key: value for key, value in given.items() if value is not None})


def for_task(retriever: Retriever, changes: EvalSettings, task: str, task_type: str) -> Retriever:
    """A retriever with the prefix that `prompts` has for a task or else for its type, on both sides."""
    prompt = changes.prompts.get(task, changes.prompts.get(task_type))
    if prompt is None:
        return retriever
    update = {"query_prefix": prompt, "passage_prefix": prompt}
    return retriever._replace(settings=retriever.settings.model_copy(update=update))
