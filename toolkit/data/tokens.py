"""Texts -> padded token ids: tokenizers, prefixes, the end token, the half cut.

Called by batches (training), embedding (evaluation) and export, so that all three see the same ids.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """Right-padded token ids; both int64 [rows, length]."""

    input_ids: Tensor
    attention_mask: Tensor


def tokenize(
    tokenizer: Any, texts: list[str], prefix: str, max_tokens: int, append_eos: bool, half: bool = False
) -> list[list[int]]:
    """Token ids of each text, special tokens included.

    Args:
        tokenizer: a fast transformers tokenizer.
        texts: the texts, without prefix.
        prefix: put before each text.
        max_tokens: longest result; texts are cut before the end token is added.
        append_eos: end each text with the end token (once, also if the tokenizer does so by itself).
        half: keep the first int(0.5 * n) of the n ids before the end token (Revela's query side).
    """
    own_eos, eos = ends_with_eos(tokenizer), tokenizer.eos_token_id
    room = max_tokens - int(append_eos) + int(own_eos)
    ids = tokenizer([prefix + text for text in texts], truncation=True, max_length=room)["input_ids"]
    rows = []
    for row in ids:
        row = row[:-1] if own_eos else row
        row = row[: len(row) // 2] if half else row
        rows.append([*row, eos] if append_eos or not row else row)
    return rows


def frame(tokenizer: Any, append_eos: bool) -> tuple[list[int], list[int]]:
    """The special ids that `tokenize` puts before and after the ids of a text."""
    row = tokenize(tokenizer, ["a"], "", 1_000, append_eos)[0]
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    first = next(i for i in range(len(row)) if row[i : i + len(inner)] == inner)
    return row[:first], row[first + len(inner) :]


def ends_with_eos(tokenizer: Any) -> bool:
    """True if the tokenizer itself ends every text with its end token."""
    return tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id


def pad(rows: list[list[int]], pad_id: int) -> Tokens:
    """Right-padded Tokens of the rows' largest length."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return Tokens(ids, mask)


def pad_id(tokenizer: Any) -> int:
    """The padding id; the end token's where the tokenizer has none (the attention mask tells them apart)."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
