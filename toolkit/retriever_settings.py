"""How a retriever is evaluated: settings that differ from its export's, and prompts of tasks.

Called by eval.evaluate and toolkit.retrievers.
"""

from toolkit.embed import Retriever
from toolkit.models.backbone import check_length
from toolkit.models.encoder import Encoder
from toolkit.recipe import EncoderSettings, EvalSettings, RecipeError


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
        check_length(backbone.config, settings.eval_max_tokens)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise RecipeError(f"eval.max_tokens: {error}") from None
    return Retriever(Encoder(backbone, settings.pooling, settings.normalize).eval(), retriever.tokenizer, settings)


def changed(settings: EncoderSettings, changes: EvalSettings) -> EncoderSettings:
    """Encoder settings with those of an evaluation in their place; pooling eos adds the end token."""
    given = {
        "query_prefix": changes.query_prefix,
        "passage_prefix": changes.passage_prefix,
        "eval_max_tokens": changes.max_tokens,
        "pooling": changes.pooling,
        "normalize": changes.normalize,
        "append_eos": True if changes.pooling == "eos" else None,
    }
    return settings.model_copy(update={key: value for key, value in given.items() if value is not None})


def for_task(retriever: Retriever, changes: EvalSettings, task: str, task_type: str) -> Retriever:
    """A retriever with the prefix that `prompts` has for a task or else for its type, on both sides."""
    prompt = changes.prompts.get(task, changes.prompts.get(task_type))
    if prompt is None:
        return retriever
    update = {"query_prefix": prompt, "passage_prefix": prompt}
    return retriever._replace(settings=retriever.settings.model_copy(update=update))
