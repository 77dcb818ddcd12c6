"""Rows of a language_model stage: passages, each read alone."""

from typing import Any, NamedTuple

import numpy as np

from toolkit.data.tokens import Tokens, pad, pad_id, tokenize


class LanguageModelBatch(NamedTuple):
    text: Tokens


def collate_language_model(
    texts: list[str], document: np.ndarray, tokenizer: Any, max_tokens: int
) -> LanguageModelBatch:
    """Texts as they are, with the begin token if the tokenizer adds one and no end token."""
    del document  # next-token prediction reads every passage alone
    return LanguageModelBatch(pad(tokenize(tokenizer, texts, "", max_tokens, append_eos=False), pad_id(tokenizer)))
