"""Texts -> padded token ids: tokenizers, prefixes, the end token, the half cut.

Called by batches (training), embedding (evaluation) and export, so that all three see the same ids.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """Right-padded token ids; both int64 [rows, length]."""

    input_ids: Tensor
    attention_mask: Tensor


def tokenize(
    tokenizer: Any, texts: list[str], prefix: str, max_tokens: int, append_eos: bool | None, half: bool = False
) -> list[list[int]]:
    """Token ids of each text within its `frame`, cut on the right so that the frame stays whole.

    Args:
        tokenizer: a fast transformers tokenizer; on which side it cuts and pads does not matter.
        texts: the texts, without prefix.
        prefix: put before each text.
        max_tokens: longest result, special ids included.
        append_eos: as in `frame`.
        half: keep the first int(0.5 * n) of the n ids before the end token.

    Raises:
        ValueError: if max_tokens leaves no room beside the special ids.
    """
    before, after = frame(tokenizer, append_eos)
    room = max_tokens - len(before) - len(after)
    if room < 1:
        raise ValueError(
            f"max_tokens {max_tokens} leaves no room beside the {len(before) + len(after)} special ids that the "
            "tokenizer puts around a text; raise it"
        )
    rows = []
    for ids in _bare(tokenizer, [prefix + text for text in texts]):
        row = [*before, *ids[:room]]
        row = row[: len(row) // 2] if half else row
        rows.append([*row, *after] or [tokenizer.eos_token_id])
    return rows


def frame(tokenizer: Any, append_eos: bool | None) -> tuple[list[int], list[int]]:
    """The special ids that `tokenize` puts before and after the ids of a text, e.g. those of [CLS] and of [SEP].

    append_eos: None: those that the tokenizer puts there by itself. True: the end token (eos_token) too where nothing
    comes after the text; what comes there is the end, whatever its name. False: nothing after the text.
    """
    before, after = _own_frame(tokenizer)
    if append_eos is None:
        return before, after
    return before, (after or [tokenizer.eos_token_id]) if append_eos else []


def _own_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Read off a text whose ids are none of the special ones: "a", or where a vocabulary has none, one of its own."""
    special = set(tokenizer("")["input_ids"])
    for text in itertools.chain(("a",), _words(tokenizer)):
        row, inner = tokenizer(text)["input_ids"], _bare(tokenizer, [text])[0]
        first = next((i for i in range(len(row)) if row[i : i + len(inner)] == inner), None)
        if inner and first is not None and not special & set(inner):
            return row[:first], row[first + len(inner) :]
    raise ValueError("the tokenizer gives no text a token of its own")


def _words(tokenizer: Any) -> Iterator[str]:
    words = tokenizer.get_vocab()
    yield from sorted(words, key=words.__getitem__)


def _bare(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of texts, however long, without special ids."""
    return tokenizer(
        texts,
        add_special_tokens=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning of texts that are longer than the model reads
    )["input_ids"]


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
