"""Next-token prediction with all parameters: the pre-training that the methods start from."""

from torch import Tensor, nn

from toolkit.collectives import pool_mean
from toolkit.data.tokens import Tokens
from toolkit.losses.language import num_predicted, row_nll
from toolkit.methods.language_model.rows import LanguageModelBatch
from toolkit.methods.objective import Exported, Loss, Objective
from toolkit.models.encoder import Encoder
from toolkit.recipe.training import Batch
from toolkit.slicing import in_slices, padding, plan_slices


class LanguageModel(Objective):
    """Mean next-token loss over the tokens of a pool."""

    def __init__(self, causal_lm: nn.Module, pooling: str, normalize: bool, batch: Batch, logit_chunks: int) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.pooling = pooling
        self.normalize = normalize
        self.batch = batch
        self.logit_chunks = logit_chunks

    @property
    def encoder(self) -> Encoder:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The language model without its head; made on demand, so that no weight is registered twice."""
        return Encoder(self.causal_lm.model, self.pooling, self.normalize)  # pyright: ignore[reportArgumentType]

    def exported(self) -> Exported:
        return Exported("causal_lm.model.", ("causal_lm.", self.causal_lm))

    def forward(self, batch: LanguageModelBatch) -> Loss:
        mask = batch.text.attention_mask
        slices = plan_slices(mask, self.batch.forward_rows, self.batch.forward_tokens)
        nll = in_slices(self._row_nll, slices, batch.text).sum()
        tokens = num_predicted(mask)
        parts = {"plain_nll": (nll.detach(), tokens), "padding": padding([slices], tokens.device)}
        return Loss(pool_mean(nll, tokens, self.batch.span), parts)

    def _row_nll(self, text: Tokens) -> Tensor:
        states = self.causal_lm.model(**text._asdict(), use_cache=False).last_hidden_state  # pyright: ignore
        return row_nll(self.causal_lm.get_output_embeddings(), states, *text, self.logit_chunks)  # pyright: ignore
