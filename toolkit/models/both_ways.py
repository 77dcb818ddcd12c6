"""A backbone that reads a prefix and a text together, both ways, whatever its type.

Called by the contextual encoder.
"""

from typing import Any

import torch
from torch import Tensor

from toolkit.models.backbone import CAUSAL_TYPES
from toolkit.models.lengths import LEARNED_POSITIONS

TOKEN_TYPES = ("bert", "roberta", "xlm-roberta", "nomic_bert")  # add the embedding of token type 0 to every input


def without_own_embeddings(model: Any, prefix: Tensor) -> Tensor:
    """A prefix [..., P, d] less what the model adds to every input: then only tokens of the text have it.

    That is the embedding of token type 0, and of the first position where positions are learned.
    """
    kind = model.config.model_type
    first = torch.zeros(1, dtype=torch.int64, device=prefix.device)
    if kind in TOKEN_TYPES:
        prefix = prefix - model.embeddings.token_type_embeddings(first)
    if kind in LEARNED_POSITIONS:
        prefix = prefix - model.embeddings.position_embeddings(first + first_position(model.config))
    return prefix


def both_ways_states(model: Any, words: Tensor, attention_mask: Tensor, prefix: Tensor, zeros: int) -> Tensor:
    """States [rows, P + length, d] of a prefix and texts.

    Args:
        words: [rows, length, d], embeddings of the texts' tokens.
        attention_mask: [rows, length], right-padded.
        prefix: [P, d], or [rows, P, d].
        zeros: so many of the prefix stand at position 0, and what follows at consecutive ones. Where positions are
            learned the prefix has none, and a text the same ones as without it.
    """
    rows, length, _ = words.shape
    before = prefix.shape[-2]
    mask = torch.cat([attention_mask.new_ones(rows, before), attention_mask], 1)
    kind = model.config.model_type
    masks: Any = mask
    if kind in CAUSAL_TYPES:
        masks = mask.bool()[:, None, None].expand(-1, -1, before + length, -1)
    elif kind == "modernbert":
        masks = _of_layers(mask.bool()[:, None, None].expand(-1, -1, before + length, -1), before, model.config)
    places = torch.arange(before + length, device=words.device)
    if kind in LEARNED_POSITIONS:
        positions = (places - before).clamp(min=0) + first_position(model.config)
    else:
        positions = places.masked_fill(places < zeros, 0)
    given = {"inputs_embeds": torch.cat([prefix.expand(rows, -1, -1).to(words.dtype), words], 1)}
    given |= {"attention_mask": masks, "position_ids": positions.expand(rows, -1), "use_cache": False}
    return model(**given).last_hidden_state


def first_position(config: Any) -> int:
    """The position of a text's first token; RoBERTa's comes after that of padding."""
    return config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta") else 0


def _of_layers(mask: Tensor, before: int, config: Any) -> dict[str, Tensor]:
    """Masks of a model whose layers are partly local: there too all read the prefix, and the prefix reads all."""
    places = torch.arange(mask.shape[-1], device=mask.device)
    near = (places[:, None] - places[None]).abs() <= config.sliding_window
    of_prefix = places < before
    local = mask & (near | of_prefix[:, None] | of_prefix[None])
    return {"full_attention": mask, "sliding_attention": local}
