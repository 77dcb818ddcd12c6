"""A tokenizer put together with the model that reads its ids: every id must have an embedding.

Called by training, embedding, export, evaluation and --dry-run, wherever the two meet.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from toolkit.models.backbone import load_tokenizer, read_config
from toolkit.models.formats import warn_once


def model_tokenizer(folder: str | Path, config: PretrainedConfig | None = None) -> Any:
    """load_tokenizer of a folder, with an id for each token that its model (or that of `config`) has an embedding for.

    Raises:
        ValueError: as load_tokenizer and `fit_tokenizer`.
    """
    tokenizer = load_tokenizer(folder)
    fit_tokenizer(tokenizer, read_config(folder) if config is None else config, folder)
    return tokenizer


def fit_tokenizer(tokenizer: Any, config: PretrainedConfig, name: str | Path) -> None:
    """Let a tokenizer pad with its end token where the model has no embedding for its padding token, and say so.

    No vector depends on the padding token: the attention mask hides it.

    Raises:
        ValueError: if there is any other token without an embedding; a text may contain it.
    """
    rows, pad = config.vocab_size, tokenizer.pad_token
    beyond = _beyond(tokenizer, rows)
    others = [token for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"]
    if pad in beyond and pad not in others:
        _take_out(tokenizer, pad)
        tokenizer.pad_token = tokenizer.eos_token
        warn_once(
            f"warning: {name}: the padding token {pad!r} has id {beyond[pad]}, and the model {rows:,} embeddings; "
            f"padded is with the end token {tokenizer.eos_token!r}, which changes no vector"
        )
        beyond = _beyond(tokenizer, rows)
    if beyond:
        shown = ", ".join(f"{token!r} {number}" for token, number in list(beyond.items())[:3])
        raise ValueError(
            f"{name}: {len(beyond):,} of the tokenizer's {len(tokenizer):,} tokens have ids ({shown}) for which the "
            f"model has no embedding, as config.json says vocab_size {rows:,}; put the tokenizer beside the model that "
            "belongs to it, or give the model more embeddings (resize_token_embeddings)"
        )


def _beyond(tokenizer: Any, rows: int) -> dict[str, int]:
    """Tokens without an embedding and their ids, special ones first, then by id; those of the frame of a text too."""
    known = tokenizer.get_vocab()
    framed = {f"id {number}": number for number in tokenizer("a")["input_ids"] if number not in known.values()}
    special = set(tokenizer.all_special_tokens)
    found = [(token, number) for token, number in (known | framed).items() if not 0 <= number < rows]
    return dict(sorted(found, key=lambda item: (item[0] not in special, item[1])))


def _take_out(tokenizer: Any, token: str) -> None:
    """Make an added token text like any other."""
    backend = tokenizer.backend_tokenizer
    whole = json.loads(backend.to_str())
    whole["added_tokens"] = [added for added in whole["added_tokens"] if added["content"] != token]
    whole["padding"] = None
    tokenizer._tokenizer = type(backend).from_str(json.dumps(whole))
