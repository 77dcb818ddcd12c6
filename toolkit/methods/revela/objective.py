"""Revela (arXiv 2506.16552): the retriever's similarities weight what a language model reads of the other passages.

One next-token loss trains both; the language model is thrown away afterwards.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.collectives import gather, gather_with_grad, pool_mean, rank, sum_over_ranks
from toolkit.data.tokens import Tokens
from toolkit.losses.language import num_predicted
from toolkit.methods.objective import Loss, Objective
from toolkit.methods.revela.inbatch_attention import FirstPass, InBatchLanguageModel
from toolkit.methods.revela.keys import NearDuplicates, RevelaObjective, TemperatureDecay
from toolkit.methods.revela.near_duplicates import near_duplicates
from toolkit.methods.revela.pool_memory import share_pool
from toolkit.methods.revela.read_pairs import keep
from toolkit.methods.revela.rows import RevelaBatch
from toolkit.models.backbone import DTYPES
from toolkit.models.encoder import Encoder
from toolkit.recipe.training import Batch
from toolkit.slicing import in_slices, padding, plan_slices

LEARNING_ROW = 1e-3  # a row learns if sum_j w_ij (1 - w_ij), the trace of its softmax's Jacobian, is above this


class Revela(Objective):
    """Mean next-token loss over a pool, each passage read with the others weighted by the retriever."""

    def __init__(
        self,
        encoder: Encoder,
        language_model: InBatchLanguageModel,
        settings: RevelaObjective,
        batch: Batch,
        near_duplicates: NearDuplicates | None,
        steps: int,
    ) -> None:
        """steps: optimizer steps of the stage, over which a temperature decays."""
        super().__init__()
        self.encoder = encoder
        self.language_model = language_model
        self.settings = settings
        self.span = batch.span
        self.batch = batch
        self.near_duplicates = near_duplicates
        self.steps = steps
        self.step = 0  # optimizer steps taken

    @property
    def temperature(self) -> float:
        """tau of the current optimizer step: constant, or from start at the first to end at the last."""
        tau = self.settings.temperature
        if not isinstance(tau, TemperatureDecay):
            return tau
        return tau.start * (tau.end / tau.start) ** (self.step / (self.steps - 1))

    def after_step(self, applied: bool) -> None:
        self.step += 1

    def extra_state(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self.step)} if isinstance(self.settings.temperature, TemperatureDecay) else {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self.step = int(state["step"])

    def forward(self, batch: RevelaBatch) -> Loss:
        forward = self.batch.forward_rows, self.batch.forward_tokens
        slices = [plan_slices(side.attention_mask, *forward) for side in (batch.query, batch.passage, batch.text)]
        of_query, of_passage, of_text = slices
        query = in_slices(self.encoder, of_query, batch.query)
        passage = in_slices(self.encoder, of_passage, batch.passage)
        duplicates = self.duplicates(batch.signature)
        weights = self.weights(query, gather_with_grad(passage) if self.span == "world" else passage, duplicates)
        kept = self._keep(weights.detach())
        length = batch.text.input_ids.shape[1]
        keys_values, plain = in_slices(lambda text: self._first_pass(text, length), of_text, batch.text)
        keys_values = keys_values.detach() if self.settings.detach_kv else keys_values
        memory, traffic = share_pool(keys_values, batch.text.attention_mask.sum(1), kept.any(0), self.span)
        del keys_values  # the memory has them
        second_pass = partial(self.language_model.row_nll, memory=memory)
        in_batch = in_slices(second_pass, of_text, batch.text, weights, kept)
        tokens = num_predicted(batch.text.attention_mask)
        nll = in_batch.sum() + plain.sum() if self.settings.dual_loss else in_batch.sum()
        parts = self._parts(weights.detach(), kept, batch.document, duplicates)
        for name, row_sums in {"in_batch_nll": in_batch, "plain_nll": plain, "gain": plain - in_batch}.items():
            parts[name] = (row_sums.detach().sum(), tokens)
        parts["padding"] = padding(slices, tokens.device)
        for name, num_bytes in traffic._asdict().items():
            parts[f"keys_values_mib_{name}"] = (
                tokens.new_tensor(num_bytes / 2**20, dtype=torch.float64),
                tokens.new_ones(()),
            )
        return Loss(pool_mean(nll, tokens, self.span), parts)

    def _first_pass(self, text: Tokens, length: int) -> FirstPass:
        """Keys and values of a slice, as long as those of the other slices."""
        found = self.language_model.keys_values(text, self.settings.dual_loss)
        missing = length - found.keys_values.shape[-2]
        return found._replace(keys_values=F.pad(found.keys_values, (0, 0, 0, missing))) if missing else found

    def duplicates(self, signature: Tensor) -> Tensor | None:
        """Pairs that may not read one another, each row and itself among them: bool [rows, S]; None if all may."""
        if self.near_duplicates is None:
            return None
        pool = gather(signature) if self.span == "world" else signature
        return near_duplicates(signature, pool, self.near_duplicates.threshold)

    def weights(self, query: Tensor, passage: Tensor, duplicates: Tensor | None = None) -> Tensor:
        """w = softmax over the *other* passages of q_i . p_j / tau, near-duplicates left out: [rows, S].

        All in the recipe's similarity_dtype: at tau = 1e-4 the number format decides which rows have ties, and so a
        gradient. query [rows, dim] are this rank's; passage [S, dim] are the whole pool's. A row with nothing left to
        read has weight zero, and no gradient.
        """
        dtype = DTYPES[self.settings.similarity_dtype]
        similarity = query.to(dtype) @ passage.to(dtype).T
        own = torch.arange(len(query), device=query.device) + self._first_row(len(query))
        masked = F.one_hot(own, len(passage)).bool()
        if duplicates is not None:
            masked = masked | duplicates
        alone = masked.all(-1, keepdim=True)  # its softmax would be over nothing
        scores = (similarity / self.temperature).masked_fill(masked & ~alone, float("-inf"))
        return scores.softmax(-1).masked_fill(alone, 0)

    def _keep(self, weights: Tensor) -> Tensor:
        """Which pairs are read, bool [rows, S].

        Raises:
            ValueError: on all ranks, if their rows lose more weight on average than the recipe allows.
        """
        kept = keep(weights, self.settings.min_weight, self.settings.max_sources)
        if self.settings.min_weight > 0 or self.settings.max_sources is not None:
            lost = _dropped(weights.double(), kept)
            dropped, rows = sum_over_ranks(torch.stack([lost.sum(), torch.ones_like(lost).sum()])).tolist()
            if dropped / rows > self.settings.max_dropped_mass:
                raise ValueError(
                    f"objective.max_dropped_mass: the rows lost {dropped / rows:.3g} of their weight on average, "
                    f"above {self.settings.max_dropped_mass:g}; lower min_weight or the temperature, raise "
                    "max_sources, or allow more"
                )
        return kept

    def _first_row(self, rows: int) -> int:
        return rank() * rows if self.span == "world" else 0

    def _parts(
        self, weights: Tensor, kept: Tensor, document: Tensor, duplicates: Tensor | None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Row entropy (nats), weight on the same document, whether a row learns; what is read and what is masked."""
        weights = weights.float()
        documents = gather(document) if self.span == "world" else document
        same = (document[:, None] == documents[None]).float()
        rows = torch.tensor(float(len(weights)), device=weights.device)
        parts = {
            "temperature": (torch.full_like(rows, self.temperature), torch.ones_like(rows)),
            "row_entropy": (torch.special.entr(weights).sum(), rows),
            "weight_same_document": ((weights * same).sum(), rows),
            "kept_sources": (kept.sum().float(), rows),
            "dropped_mass": (_dropped(weights, kept).sum(), rows),
            "rows_with_gradient": (((weights.sum(1) - weights.square().sum(1)) > LEARNING_ROW).float().sum(), rows),
        }
        if duplicates is not None:  # a row is its own duplicate
            parts["near_duplicates"] = (duplicates.sum() - rows, rows * (duplicates.shape[1] - 1))
        return parts


def _dropped(weights: Tensor, kept: Tensor) -> Tensor:
    """Weight of each row on pairs that are not read: [rows]."""
    return weights.masked_fill(kept, 0).sum(1)
