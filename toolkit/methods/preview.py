"""What a dry run says of the rows of several methods: the epochs that they last, and texts as the models get them."""

from collections.abc import Callable
from typing import Any

from toolkit.data.first_look import FIRST, Look
from toolkit.data.spans import cut
from toolkit.data.tokens import tokenize
from toolkit.recipe.errors import one_line
from toolkit.recipe.models import EncoderSettings
from toolkit.recipe.stage import Stage
from toolkit.recipe.texts import PassagesData

_HEAD, _TAIL = 160, 60  # characters of a text that are shown


# --------------------------------------------------------------------------- epochs


def text_epochs(
    stage: Stage[Any, Any], counts: list[int], looks: list[Look], unit: str, pieces: Callable[[Look], float]
) -> str:
    """The epochs of a stage whose documents are cut into rows.

    Args:
        counts, looks: rows and first rows of each source.
        pieces: first rows of a source -> rows of the stage that each of them becomes, on average.
    """
    rows = sum(n * (pieces(each) if each.texts else 0.0) for n, each in zip(counts, looks, strict=True))
    if not rows:
        return "not known: the rows looked at hold no text"
    trained = stage.optim.steps * stage.batch.pools_per_step * stage.batch.pool
    return f"about {trained / rows:.2f} (some {rows:,.0f} {unit}, by the first {FIRST} rows of each file)"


def passages_of(data: PassagesData) -> Callable[[Look], float]:
    """First rows of a source -> the passages that each has, on average."""

    def pieces(look: Look) -> float:
        texts = texts_of(look)
        if data.passages is None:
            return len(texts) / len(look.texts)
        return sum(len(cut(text, data.passages.unit, data.passages.max_words)) for text in texts) / len(texts)

    return pieces


def texts_of(look: Look) -> list[str]:
    """The texts of the first rows of a source."""
    return [text for record in look.texts for text in record.texts]


# --------------------------------------------------------------------------- one row as the models get it


def first_passage(look: Look, data: PassagesData) -> str:
    """The first passage of a source's first rows."""
    text = next(iter(texts_of(look)), "")
    return text if data.passages is None else cut(text, data.passages.unit, data.passages.max_words)[0]


def as_tokens(
    name: str, tokenizer: Any, text: str, prefix: str, encoder: EncoderSettings, half: bool = False
) -> tuple[str, str]:
    """A line with a text as the retriever gets it."""
    limits = (encoder.max_tokens, 10**9)
    kept, whole = (tokenize(tokenizer, [text], prefix, most, encoder.append_eos, half)[0] for most in limits)
    return shown(name, tokenizer, kept, len(whole))


def for_causal_lm(name: str, tokenizer: Any, text: str, longest: int) -> tuple[str, str]:
    """A line with a text as a language model gets it, without an end token."""
    kept, whole = (tokenize(tokenizer, [text], "", most, append_eos=False)[0] for most in (longest, 10**9))
    return shown(name, tokenizer, kept, len(whole))


def shown(name: str, tokenizer: Any, ids: list[int], uncut: int) -> tuple[str, str]:
    """A line with ids as text; `uncut`: how many they are uncut."""
    text = one_line(tokenizer.decode(ids))
    if len(text) > _HEAD + _TAIL:
        text = f"{text[:_HEAD]} [...] {text[-_TAIL:]}"
    count = f"{len(ids)} tokens" if len(ids) == uncut else f"{len(ids)} of {uncut} tokens"
    return f"example {name}", f"{count}: {text}"
