"""Rows of a revela stage: passages, as the retriever's two sides and as the language model reads them."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from toolkit.data.tokens import Tokens, pad, pad_id, tokenize
from toolkit.methods.revela.keys import NearDuplicates
from toolkit.methods.revela.near_duplicates import signatures
from toolkit.recipe.models import EncoderSettings


class RevelaBatch(NamedTuple):
    query: Tokens  # the retriever's query side
    passage: Tokens  # the retriever's passage side
    text: Tokens  # what the language model reads
    document: Tensor  # int64 [rows], document number of each row
    signature: Tensor  # int32 [rows, HASHES] of the text, or [rows, 0] if near-duplicates may read one another


def collate_revela(
    texts: list[str],
    document: np.ndarray,
    *,
    tokenizer: Any,
    lm_tokenizer: Any,
    encoder: EncoderSettings,
    half_query: bool,
    lm_max_tokens: int,
    near_duplicates: NearDuplicates | None,
) -> RevelaBatch:
    """The retriever's two sides and the language model's text of each passage (Revela, section 4.2).

    Args:
        half_query: keep the first half of the query's tokens, the prefix counted, before the end token.
        lm_max_tokens: longest text for the language model; it gets neither prefix nor end token.
        near_duplicates: how the text's signature is made; None: no signature.
    """
    longest, eos = encoder.max_tokens, encoder.append_eos
    query = tokenize(tokenizer, texts, encoder.query_prefix, longest, eos, half=half_query)
    passage = tokenize(tokenizer, texts, encoder.passage_prefix, longest, eos)
    text = tokenize(lm_tokenizer, texts, "", lm_max_tokens, append_eos=False)
    padding = pad_id(tokenizer)
    return RevelaBatch(
        pad(query, padding),
        pad(passage, padding),
        pad(text, pad_id(lm_tokenizer)),
        torch.as_tensor(document),
        signatures(text, near_duplicates.ngram if near_duplicates else None),
    )
