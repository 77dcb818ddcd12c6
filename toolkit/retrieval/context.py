"""The context of a contextual retriever: documents drawn from a collection, embedded by its first stage.

Called by evaluation, mining, surrogates and the module for sentence-transformers.
"""

from collections.abc import Iterable, Sequence
from itertools import islice

from toolkit.data.tokens import tokenize
from toolkit.determinism import generator
from toolkit.models.in_context import Context, FirstStage, contextual_of, in_context, make_context
from toolkit.models.retriever import Retriever
from toolkit.retrieval.embed import encode


def context_documents(retriever: Retriever) -> int:
    """How many documents a context of a contextual retriever is made of: J over the vectors of each."""
    contextual = contextual_of(retriever.encoder)
    assert contextual is not None
    return contextual.settings.size // contextual.settings.vectors_per_document


def draw(texts: Iterable[str], total: int, count: int, seed: int) -> list[str]:
    """So many of `total` texts at random, WITH replacement (Morris and Rush, arXiv 2410.02525, section 4).

    Raises:
        ValueError: if there is no text.
    """
    if not total:
        raise ValueError("there is no text to draw a context from")
    places = generator("context", seed, 0).integers(0, total, count).tolist()
    wanted = set(places)
    found = {place: text for place, text in enumerate(islice(texts, max(wanted) + 1)) if place in wanted}
    return [found[place] for place in places]


def embed_context(
    retriever: Retriever, texts: Sequence[str], of: str, seed: int | None = None, drawn_from: int | None = None
) -> Context:
    """The context that documents make, each with the passages' prefix; every rank calls it and embeds its share.

    Args:
        retriever: a contextual one.
        texts: so many as `context_documents` says.
        of, seed, drawn_from: where they come from, for the record; None: they were not drawn.

    Raises:
        ValueError: for another number of documents, or vectors that are not finite.
    """
    contextual, first = contextual_of(retriever.encoder), retriever.first
    assert contextual is not None and first is not None
    if len(texts) != (wanted := context_documents(retriever)):
        raise ValueError(f"{len(texts)} context documents, where the model reads {wanted}; give as many")
    settings = retriever.settings.model_copy(update={"eval_max_tokens": contextual.settings.max_tokens})
    rows = tokenize(
        first.tokenizer, list(texts), settings.passage_prefix, settings.eval_max_tokens, settings.append_eos
    )
    stage = Retriever(FirstStage(contextual, max(map(len, rows))), first.tokenizer, settings)
    numbered = {f"context document {number}": text for number, text in enumerate(texts)}
    vectors = encode(stage, numbered, "passage", may_collapse=True).array()
    vectors = vectors.reshape(contextual.settings.size, contextual.width)
    return make_context(vectors, first.identity, len(texts), drawn_from or len(texts), of, seed)


def in_own_context(retriever: Retriever, texts: Iterable[str], total: int, of: str, seed: int) -> Retriever:
    """A retriever that reads with documents of the `total` texts that it is to embed; a plain one as it is.

    Every rank calls it. Raises ValueError as `draw` and `embed_context`.
    """
    if retriever.first is None:
        return retriever
    chosen = draw(texts, total, context_documents(retriever), seed)
    return in_context(retriever, embed_context(retriever, chosen, of, seed, total))
