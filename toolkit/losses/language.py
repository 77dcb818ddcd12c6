"""Next-token loss per row, its vocabulary logits made and forgotten chunk by chunk."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**27  # of a chunk: 512 MiB in fp32, about three times that while its gradient is made


def num_chunks(tokens: int, vocabulary: int) -> int:
    """Into how many chunks `row_nll` divides at most `tokens` tokens, so that none has more than MAX_LOGITS logits.

    Every chunk is a call of the head, and at ZeRO-3 ranks must make as many, so `tokens` is a bound that all share.
    """
    return math.ceil(tokens * vocabulary / MAX_LOGITS)


def row_nll(
    head: Callable[[Tensor], Tensor], states: Tensor, input_ids: Tensor, attention_mask: Tensor, chunks: int
) -> Tensor:
    """Negative log-likelihood of every row's tokens after the first, summed: [rows] in fp32 (fp64 for fp64 logits).

    The head sees only states that predict a token: neither padding nor the last of a row. Of more than one chunk each
    is recomputed in the backward pass, so that the logits of one live at a time; a chunk may be empty.

    Args:
        head: states [tokens, width] to logits [tokens, vocabulary]; called `chunks` times.
        states: [rows, length, width], the model's last.
        input_ids, attention_mask: [rows, length], right-padded.
        chunks: of `num_chunks`.
    """
    follows = F.pad(attention_mask[:, 1:], (0, 1)).flatten()  # whether a position has a next token
    at = follows.nonzero()[:, 0]
    labels = input_ids.flatten()[at + 1].tensor_split(chunks)
    parts = states.flatten(0, 1).index_select(0, at).tensor_split(chunks)
    if chunks == 1:
        nll = _token_nll(head, parts[0], labels[0])
    else:
        nll = torch.cat(
            [
                checkpoint(_token_nll, head, *pair, use_reentrant=False)  # random state kept: adapters have dropout
                for pair in zip(parts, labels, strict=True)
            ]
        )
    return nll.new_zeros(len(follows)).index_copy(0, at, nll).view(input_ids.shape).sum(1)


def _token_nll(head: Callable[[Tensor], Tensor], states: Tensor, labels: Tensor) -> Tensor:
    logits = head(states)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")


def num_predicted(attention_mask: Tensor) -> Tensor:
    """Number of tokens that `row_nll` predicts, over all rows (a scalar)."""
    return attention_mask[:, 1:].sum()
