"""Revela (arXiv 2506.16552): the retriever's similarities weight what a language model reads of the other passages.

One next-token loss trains both; the language model is thrown away afterwards.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.collectives import gather, gather_with_grad, max_over_ranks, pool_mean, rank
from toolkit.data.spans import RevelaBatch
from toolkit.data.tokens import Tokens
from toolkit.losses.language import num_predicted
from toolkit.models.backbone import DTYPES, adapted, check_window, load_causal_lm, load_encoder_backbone, read_config
from toolkit.models.encoder import Encoder
from toolkit.models.inbatch_attention import INBATCH_ATTENTION, FirstPass, InBatchLanguageModel, PoolMemory
from toolkit.objectives import Loss, Objective
from toolkit.objectives.language_model import logit_chunks, recompute_layers
from toolkit.recipe import Batch, RevelaObjective, Stage, TemperatureDecay
from toolkit.slicing import in_slices, padding, plan_slices

LEARNING_ROW = 1e-3  # a row learns if 1 - sum_j w_ij^2, the trace of its softmax's Jacobian, is above this


class Revela(Objective):
    """Mean next-token loss over a pool, each passage read with the others weighted by the retriever."""

    def __init__(
        self,
        encoder: Encoder,
        language_model: InBatchLanguageModel,
        settings: RevelaObjective,
        batch: Batch,
        steps: int = 1,
    ) -> None:
        """steps: optimizer steps of the stage, over which a temperature decays."""
        super().__init__()
        self.encoder = encoder
        self.language_model = language_model
        self.settings = settings
        self.span = batch.span
        self.batch = batch
        self.steps = steps
        self.step = 0  # optimizer steps taken

    @property
    def temperature(self) -> float:
        """tau of the current optimizer step: constant, or from start at the first to end at the last."""
        tau = self.settings.temperature
        if not isinstance(tau, TemperatureDecay):
            return tau
        return tau.start * (tau.end / tau.start) ** (self.step / (self.steps - 1))

    def after_step(self) -> None:
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
        weights = self.weights(query, gather_with_grad(passage) if self.span == "world" else passage)
        length = batch.text.input_ids.shape[1]
        keys_values, plain = in_slices(lambda text: self._first_pass(text, length), of_text, batch.text)
        memory = self.memory(keys_values, batch.text.attention_mask)
        in_batch = in_slices(lambda text, w: self.language_model.row_nll(text, w, memory), of_text, batch.text, weights)
        tokens = num_predicted(batch.text.attention_mask)
        nll = in_batch.sum() + plain.sum() if self.settings.dual_loss else in_batch.sum()
        parts = self._parts(weights.detach(), batch.document)
        for name, row_sums in {"in_batch_nll": in_batch, "plain_nll": plain, "gain": plain - in_batch}.items():
            parts[name] = (row_sums.detach().sum(), tokens)
        parts["padding"] = padding(slices, tokens.device)
        return Loss(pool_mean(nll, tokens, self.span), parts)

    def _first_pass(self, text: Tokens, length: int) -> FirstPass:
        """Keys and values of a slice, as long as those of the other slices."""
        found = self.language_model.keys_values(text, self.settings.dual_loss)
        missing = length - found.keys_values.shape[-2]
        return found._replace(keys_values=F.pad(found.keys_values, (0, 0, 0, missing)))

    def weights(self, query: Tensor, passage: Tensor) -> Tensor:
        """w = softmax over the *other* passages of q_i . p_j / tau: [rows, S].

        All in the recipe's similarity_dtype: at tau = 1e-4 the number format decides which rows have ties, and so a
        gradient. query [rows, dim] are this rank's; passage [S, dim] are the whole pool's.
        """
        dtype = DTYPES[self.settings.similarity_dtype]
        similarity = query.to(dtype) @ passage.to(dtype).T
        own = torch.arange(len(query), device=query.device) + self._first_row(len(query))
        itself = F.one_hot(own, len(passage)).bool()
        return (similarity / self.temperature).masked_fill(itself, float("-inf")).softmax(-1)

    def memory(self, keys_values: Tensor, attention_mask: Tensor) -> PoolMemory:
        """Keys and values of the whole pool [S, 2, layers, G, L, d]; gathered once for all layers."""
        lengths = attention_mask.sum(1)
        if self.settings.detach_kv:
            keys_values = keys_values.detach()
        if self.span == "world":
            length = max_over_ranks(keys_values.shape[-2], keys_values.device)
            keys_values = F.pad(keys_values, (0, 0, 0, length - keys_values.shape[-2]))
            keys_values, lengths = gather_with_grad(keys_values), gather(lengths)
        return PoolMemory(keys_values, tuple(lengths.tolist()))

    def _first_row(self, rows: int) -> int:
        return rank() * rows if self.span == "world" else 0

    def _parts(self, weights: Tensor, document: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Row entropy (nats), weight on passages of the same document, and whether a row learns at all."""
        weights = weights.float()
        documents = gather(document) if self.span == "world" else document
        same = (document[:, None] == documents[None]).float()
        rows = torch.tensor(float(len(weights)), device=weights.device)
        return {
            "temperature": (torch.full_like(rows, self.temperature), torch.ones_like(rows)),
            "row_entropy": (torch.special.entr(weights).sum(), rows),
            "weight_same_document": ((weights * same).sum(), rows),
            "rows_with_gradient": ((1 - weights.square().sum(1) > LEARNING_ROW).float().sum(), rows),
        }


def build_revela(
    stage: Stage,
    settings: RevelaObjective,
    seed: int,
    device: torch.device | str,
    folder: Path,
    adapter: Path | None,
    lm_folder: Path,
) -> Revela:
    """The objective of a `revela` stage, in training mode; `adapter` is continued, else a new one is made."""
    dtype = DTYPES[stage.precision]
    lm_config, max_tokens = read_config(lm_folder), settings.language_model.max_tokens
    check_window(lm_config, max_tokens)
    backbone = adapted(load_encoder_backbone(folder, dtype, device), stage.lora, adapter, False, seed)
    causal_lm = load_causal_lm(lm_folder, dtype, INBATCH_ATTENTION, device)
    causal_lm = adapted(causal_lm, settings.language_model.lora, None, True, seed + 1)
    for model in (backbone, causal_lm):
        model.train()
        if stage.activation_checkpointing:
            recompute_layers(model)
    return Revela(
        Encoder(backbone, stage.encoder.pooling, stage.encoder.normalize),
        InBatchLanguageModel(causal_lm, settings.v_norm, logit_chunks(stage, max_tokens, lm_config.vocab_size)),
        settings,
        stage.batch,
        stage.optim.steps,
    )
