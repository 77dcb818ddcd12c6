"""A causal model whose texts all read one prefix: its keys and values are computed once and enter every layer.

Called by the contextual encoder. Works on unmodified transformers models through the attention interface, with layers
recomputed or not. Legend of shapes: N texts, H query heads, G key/value heads, L length, P length of the prefix, d head
dimension.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

PREFIXED = "prefixed"  # the name under which `attn_implementation` finds it


class Kept:
    """Keys and values of a forward, layer by layer, until they are taken.

    A layer runs again when its activations are recomputed: what it found is in the graph already, and not kept.
    """

    def __init__(self) -> None:
        self._layers: dict[int, Tensor] | None = {}

    def put(self, layer: int, key: Tensor, value: Tensor) -> None:
        if self._layers is not None:
            self._layers[layer] = torch.stack([key, value], dim=1)

    def take(self) -> Tensor:
        """[N, layers, 2, G, L, d]."""
        assert self._layers is not None
        layers, self._layers = self._layers, None
        return torch.stack([layers[layer] for layer in sorted(layers)], dim=1)


def keys_values(model: Any, prefix: Tensor) -> Tensor:
    """Keys and values [layers, 2, G, P, d] of a prefix [P, width] that is read both ways, all of it at position 0."""
    length, kept = len(prefix), Kept()
    model(
        inputs_embeds=prefix[None],
        attention_mask=torch.ones(1, 1, length, length, dtype=torch.bool, device=prefix.device),
        position_ids=torch.zeros(1, length, dtype=torch.int64, device=prefix.device),
        use_cache=False,
        keep=kept,
    )
    return kept.take()[0]


def text_states(model: Any, words: Tensor, prefix_states: Tensor) -> Tensor:
    """States [N, L, width] of right-padded texts that read the whole prefix and the tokens before each.

    Args:
        words: [N, L, width], embeddings of the texts' tokens, the first at position 1.
        prefix_states: of `keys_values`.
    """
    length, prefix = words.shape[1], prefix_states.shape[-2]
    mask = causal_after_prefix(length, prefix, words.device)[prefix:]
    positions = torch.arange(1, length + 1, device=words.device)[None]
    return model(
        inputs_embeds=words,
        attention_mask=mask[None, None],
        position_ids=positions,
        use_cache=False,
        prefix_states=prefix_states,
    ).last_hidden_state


def joined_states(model: Any, words: Tensor, prefix: Tensor) -> Tensor:
    """The same states with the prefix [P, width] run anew beside every text; what `text_states` is compared with."""
    length, before = words.shape[1], len(prefix)
    mask = causal_after_prefix(length, before, words.device)
    positions = torch.arange(1 - before, length + 1, device=words.device).clamp(min=0)[None]
    joined = torch.cat([prefix.expand(len(words), -1, -1), words], 1)
    states = model(inputs_embeds=joined, attention_mask=mask[None, None], position_ids=positions, use_cache=False)
    return states.last_hidden_state[:, before:]


def causal_after_prefix(length: int, prefix: int, device: torch.device) -> Tensor:
    """Who reads whom, bool [P + L, P + L]: the prefix itself, a token the prefix, itself and the tokens before it.

    Padding on the right needs no mask: no real token reads it.
    """
    mask = torch.ones(prefix + length, prefix + length, dtype=torch.bool, device=device).tril()
    mask[:prefix, :prefix] = True
    return mask


def attention_with_prefix(
    module: Any,
    query: Tensor,  # [N, H, L, d]
    key: Tensor,  # [N, G, L, d]
    value: Tensor,  # [N, G, L, d]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    keep: Kept | None = None,
    prefix_states: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Self-attention that keeps its keys and values (`keep`), or puts those of a prefix before them."""
    if keep is not None:
        keep.put(module.layer_idx, key, value)
    if prefix_states is not None:
        before = prefix_states[module.layer_idx][:, None].expand(-1, len(key), -1, -1, -1)
        key, value = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
    repeats = query.shape[1] // key.shape[1]
    output = F.scaled_dot_product_attention(
        query,
        key.repeat_interleave(repeats, 1),
        value.repeat_interleave(repeats, 1),
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=attention_mask is None,
        scale=scaling,
    )
    return output.transpose(1, 2).contiguous(), None


# Both are needed: without the mask a model under this attention would silently get none.
AttentionInterface.register(PREFIXED, attention_with_prefix)
AttentionMaskInterface.register(PREFIXED, sdpa_mask)
