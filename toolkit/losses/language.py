"""Next-token loss per row."""

import torch
import torch.nn.functional as F
from torch import Tensor


def row_nll(logits: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Negative log-likelihood of every row's tokens after the first, summed: [rows] in fp32 (fp64 for fp64 logits).

    Shapes: logits [rows, length, vocabulary]; input_ids and right-padded attention_mask [rows, length]. Padding is left
    out by the mask, so a padding id that equals a real token's costs nothing.
    """
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    labels = input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, -100)
    return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none").sum(1)


def num_predicted(attention_mask: Tensor) -> Tensor:
    """Number of tokens that `row_nll` predicts, over all rows (a scalar)."""
    return attention_mask[:, 1:].sum()
