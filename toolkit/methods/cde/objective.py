"""Contextual document embeddings (arXiv 2410.02525): queries and documents are read with one context of their pool."""

from functools import partial

import torch
from torch import Tensor

from toolkit.collectives import gather_with_grad
from toolkit.data.tokens import Tokens
from toolkit.methods.cde.keys import CdeObjective
from toolkit.methods.cde.rows import CdeBatch
from toolkit.methods.objective import Exported, Loss
from toolkit.methods.pair_loss import PairObjective
from toolkit.models.contextual import ContextualEncoder
from toolkit.recipe.training import Batch
from toolkit.slicing import Slices, in_slices, plan_slices


class Cde(PairObjective):
    """Mean loss over the pool's rows, whose texts all read the context that the ranks of the pool encoded together.

    Gradient caching in two stages: slices of texts read the context's vectors, which slices of documents made. One
    backward pass goes through both, so that every slice of either has its gradient.
    """

    encoder: ContextualEncoder

    def __init__(self, encoder: ContextualEncoder, settings: CdeObjective, batch: Batch, exported: Exported) -> None:
        super().__init__(encoder, settings, batch)
        self._exported = exported

    def exported(self) -> Exported:
        return self._exported

    def forward(self, batch: CdeBatch) -> Loss:
        context, of_context = self.context(batch.context)
        prefix = self.prefix(context, batch.null)
        query, of_queries = self.texts(batch.pairs.query, prefix)
        document, of_documents = self.texts(batch.pairs.document, prefix)
        total, parts = self.loss(query, document, batch.pairs, [of_context, of_queries, of_documents])
        size = torch.full_like(batch.repeated, self.encoder.settings.size // self.encoder.settings.vectors_per_document)
        return Loss(total, parts | {"context_repeated": (batch.repeated[0], size[0])})

    def context(self, documents: Tokens) -> tuple[Tensor, Slices]:
        """Vectors [J, width] of the pool's context, each rank's share gathered with its gradient."""
        slices = self.slices(documents)
        vectors = in_slices(partial(self._of_documents, documents.input_ids.shape[1]), slices, documents)
        if self.batch.span == "world":
            vectors = gather_with_grad(vectors)
        return vectors.flatten(0, 1)[: self.encoder.settings.size], slices

    def _of_documents(self, length: int, documents: Tokens) -> Tensor:
        """Vectors [documents, t, width]."""
        vectors = self.encoder.first(documents, length)
        return vectors.unflatten(0, (len(documents.input_ids), -1))

    def prefix(self, context: Tensor, null: Tensor) -> Tensor:
        """What every text is read after; a slice of its own where it is a pass through the whole model."""
        once = Slices([torch.zeros(1, dtype=torch.int64, device=context.device)], [0], 0, 0)
        slices = once if self.encoder.share_prefix and self._sliced else Slices(None, [0], 0, 0)
        return in_slices(lambda c, n: self.encoder.prefix(c[0], n[0])[None], slices, context[None], null[None])[0]

    def texts(self, tokens: Tokens, prefix: Tensor) -> tuple[Tensor, Slices]:
        """Vectors [rows, dim] of texts after a prefix, and the slices they ran in."""
        slices = self.slices(tokens)
        return in_slices(partial(self.encoder.text, prefix=prefix), slices, tokens), slices

    def slices(self, tokens: Tokens) -> Slices:
        return plan_slices(tokens.attention_mask, self.batch.forward_rows, self.batch.forward_tokens)

    @property
    def _sliced(self) -> bool:
        return self.batch.forward_rows is not None or self.batch.forward_tokens is not None

    def beside(self, batch: CdeBatch) -> dict[str, int]:
        """Vectors of the prefix that are run: once, or with every text."""
        settings = self.encoder.settings
        texts = len(batch.pairs.query.input_ids) + len(batch.pairs.document.input_ids)
        return {"prefix": (settings.size + settings.soft_prompts) * (1 if self.encoder.share_prefix else texts)}
