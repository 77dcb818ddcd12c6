"""A retriever in two stages: the first makes vectors of context documents, the second reads a text together with them.

Called by training, export and evaluation. Both stages are one module, so that DeepSpeed sees all weights.
Legend of shapes: J context vectors, w their width, P vectors of a prefix, d the backbone's width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from toolkit.data.tokens import Tokens
from toolkit.models.backbone import CAUSAL_TYPES
from toolkit.models.both_ways import both_ways_states, without_own_embeddings
from toolkit.models.encoder import Encoder
from toolkit.models.lengths import LEARNED_POSITIONS
from toolkit.models.pooling import pool
from toolkit.models.shared_prefix import PREFIXED, joined_states, keys_values, text_states
from toolkit.models.two_adapters import FIRST, through
from toolkit.recipe.context import ContextSettings

NULL_SIZE = 0.01  # standard deviation of the null vector at the beginning


class ContextualEncoder(Encoder):
    """Tokens and context vectors -> vectors [rows, d], unit length if `normalize` (fp32; fp64 for an fp64 backbone).

    A text without context is read with J null vectors.
    """

    def __init__(
        self,
        backbone: Any,
        first_backbone: Any | None,
        settings: ContextSettings,
        pooling: str,
        normalize: bool,
        *,
        instruction_end: int | None = None,
        share_prefix: bool = True,
    ) -> None:
        """Heads, soft prompts and the null vector begin at random.

        Args:
            backbone: of the second stage.
            first_backbone: of the first stage; None: it is the second's, through its other adapter.
            settings: how texts and context go together.
            pooling, normalize: as Encoder.
            instruction_end: id of the colon, for pool after_instruction.
            share_prefix: in a causal model, run the prefix once for all texts; the vectors are the same either way.

        Raises:
            ValueError: for settings that do not fit the backbones.
        """
        super().__init__(backbone, pooling, normalize)
        check_form(settings, backbone.config, pooling)
        self.first_backbone = first_backbone
        self.settings = settings
        self.instruction_end = instruction_end
        self.causal_text = settings.form == "projected" and backbone.config.model_type in CAUSAL_TYPES
        self.share_prefix = share_prefix and self.causal_text
        if self.causal_text:
            plain(backbone).set_attn_implementation(PREFIXED)
        deep = (backbone if first_backbone is None else first_backbone).config.hidden_size
        width, dim = settings.width or deep, backbone.config.hidden_size
        if settings.form == "tokens" and width != dim:
            raise ValueError(
                f"context vectors of width {width} cannot enter a backbone of width {dim} as token embeddings; set "
                f'context.width to {dim}, or its form to "projected"'
            )
        self.width, self.dim = width, dim
        self.first_head = nn.Sequential(nn.Linear(deep, deep), nn.GELU(), nn.Linear(deep, width))
        soft = nn.Linear(width, settings.soft_prompts * width)
        self.prompts = nn.Sequential(nn.Linear(width, width), nn.ReLU(), soft)
        self.null = nn.Embedding(1, width) if settings.null_probability > 0 else None
        self.projector = nn.Linear(width, dim) if settings.form == "projected" else None
        head = settings.head != "none"
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)) if head else None
        if self.null is not None:
            nn.init.normal_(self.null.weight, std=NULL_SIZE)
        self.embedding_norm = mean_norm(backbone) if self.projector is not None else 1.0

    # ----------------------------------------------------------------------- first stage

    def first(self, tokens: Tokens, length: int | None = None) -> Tensor:
        """Vectors of context documents [documents * t, w], those of a document side by side.

        length: tokens over which a document's t vectors share it out; None: as long as these tokens are padded. It must
        be the same for all documents of a context, in whatever slices they run.
        """
        given = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask, "use_cache": False}
        if self.first_backbone is None:
            with through(self.backbone, FIRST):  # pyright: ignore[reportArgumentType]
                states = plain(self.backbone)(**given).last_hidden_state
        else:
            states = plain(self.first_backbone)(**given).last_hidden_state
        whole = tokens.input_ids.shape[1] if length is None else length
        pooled = pool_parts(states, tokens.attention_mask, self.settings.vectors_per_document, whole)
        return self.first_head(pooled.to(states.dtype))

    # ----------------------------------------------------------------------- second stage

    def prefix(self, context: Tensor | None = None, null: Tensor | None = None) -> Tensor:
        """What every text is read after: [..., P, d], or keys and values [layers, 2, G, P, head] of a causal model.

        Args:
            context: [..., J or more, w], of which the first J are read; None: null vectors.
            null: bool [..., J], places that the null vector takes.

        Raises:
            ValueError: if there are fewer than J.
        """
        size, weight = self.settings.size, next(self.prompts.parameters())
        nothing = self.null_vector(weight)
        given = nothing.expand(size, -1) if context is None else context.to(weight.dtype)
        if given.shape[-2] < size:
            raise ValueError(f"a text is read with {size} context vectors; found {given.shape[-2]}")
        given = given[..., :size, :]
        if null is not None:
            given = torch.where(null[..., None], nothing, given)
        soft = self.prompts(torch.ones(self.width, dtype=weight.dtype, device=weight.device))
        soft = soft.view(self.settings.soft_prompts, -1).expand(*given.shape[:-2], -1, -1)
        joined = torch.cat([given, soft], -2)
        if self.projector is not None:
            joined = F.normalize(self.projector(joined), dim=-1) * self.embedding_norm
        elif self.settings.form == "flattened":
            joined = flattened(joined, self.dim)
        else:
            joined = without_own_embeddings(plain(self.backbone), joined)
        return keys_values(plain(self.backbone), joined) if self.share_prefix else joined

    def null_vector(self, like: Tensor) -> Tensor:
        """The learned null vector [1, w], or zeros where none is learned."""
        if self.null is None:
            return torch.zeros(1, self.width, dtype=like.dtype, device=like.device)
        return self.null(torch.zeros(1, dtype=torch.int64, device=like.device))

    def states(self, tokens: Tokens, prefix: Tensor) -> Tensor:
        """States of a prefix and the texts after it [rows, P + length, d]; of the texts alone in a causal model."""
        model = plain(self.backbone)
        words = model.get_input_embeddings()(tokens.input_ids)
        if self.causal_text:
            return (text_states if self.share_prefix else joined_states)(model, words, prefix)
        zeros = self.settings.size if self.settings.positions == "none" else 0
        return both_ways_states(model, words, tokens.attention_mask, prefix, zeros)

    def text(self, tokens: Tokens, prefix: Tensor) -> Tensor:
        """Vectors [rows, d] of texts that are read after a prefix, of `prefix`."""
        states = self.states(tokens, prefix)
        mask, before = tokens.attention_mask, states.shape[1] - tokens.input_ids.shape[1]
        if self.settings.pool == "all":
            mask = torch.cat([mask.new_ones(len(mask), before), mask], 1)
        else:
            states = states[:, before:]
        if self.settings.pool == "after_instruction":
            assert self.instruction_end is not None
            mask = after_instruction(tokens, self.instruction_end)
        if self.settings.position_weights:
            mask = mask * mask.cumsum(1)
        vectors = pool(states, mask, self.pooling)
        if self.head is not None:
            out = self.head(vectors.to(states.dtype)).to(vectors.dtype)
            vectors = vectors + out if self.settings.head == "residual" else out
        vectors = vectors[:, : self.truncate_dim]
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    def forward(self, tokens: Tokens, context: Tensor | None = None) -> Tensor:
        """Vectors [rows, d] of texts with a context, of `first`; None: with null vectors."""
        return self.text(tokens, self.prefix(context))


def plain(backbone: Any) -> Any:
    """The transformers model, its adapters in place."""
    return backbone.get_base_model() if isinstance(backbone, PeftModel) else backbone


def mean_norm(backbone: Any) -> float:
    """The mean norm of a model's token embeddings, those of zeros left out."""
    weight = plain(backbone).get_input_embeddings().weight.detach()
    norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))
    return float(norms[norms > 0].mean())


def check_form(settings: ContextSettings, config: Any, pooling: str) -> None:
    """Raise ValueError, with the key below the section, for settings that do not fit a second stage's backbone."""
    causal, at = config.model_type in CAUSAL_TYPES, "context"
    consecutive = settings.positions == "consecutive"
    if settings.size % settings.vectors_per_document:
        raise ValueError(
            f"{at}.vectors_per_document: {settings.vectors_per_document} vectors a document do not make up "
            f"{settings.size}; change it, or size"
        )
    if config.model_type == "t5":
        raise ValueError(f"{at}: t5 gives no token a position of its own; it can be the first stage alone")
    if causal and settings.form == "tokens":
        raise ValueError(f'{at}.form: tokens is for encoders, and {config.model_type} is causal; write "projected"')
    if settings.form == "flattened" and not causal:
        raise ValueError(f'{at}.form: flattened is for causal models, not {config.model_type}; write "tokens"')
    if settings.form == "flattened" and not consecutive:
        raise ValueError(f'{at}.positions: flattened vectors stand at consecutive positions; write "consecutive"')
    if consecutive and config.model_type in LEARNED_POSITIONS:
        raise ValueError(f'{at}.positions: {config.model_type} has positions for a text alone; write "none"')
    if causal and settings.form == "projected":
        _check_causal_text(settings, config, at)
    if pooling != "mean" and (settings.pool == "after_instruction" or settings.position_weights):
        key = "pool after_instruction" if settings.pool == "after_instruction" else "position_weights"
        raise ValueError(f"{at}: {key} goes with encoder.pooling mean, not {pooling}; change one of them")
    if settings.pool == "all" and pooling == "cls":
        raise ValueError(f'{at}.pool: all with encoder.pooling cls would be a context vector; write "text"')


def _check_causal_text(settings: ContextSettings, config: Any, at: str) -> None:
    if settings.positions == "consecutive":
        raise ValueError(f'{at}.positions: in a causal model a projected context has no order; write "none"')
    if config.to_dict().get("is_causal") is False:
        raise ValueError(
            f"{at}.form: the model's config says is_causal false, and projected needs a causal text; write "
            '"flattened", or take is_causal out'
        )
    if settings.pool == "all":
        raise ValueError(f'{at}.pool: all needs a text that is read both ways; write "text"')


def pool_parts(states: Tensor, attention_mask: Tensor, parts: int, length: int) -> Tensor:
    """Means over `parts` equal parts of each padded text, side by side: [rows * parts, d], summed in fp32 or more.

    A part without a token takes the sum of the whole text over its padded length (of a multiple of `parts`).
    """
    if parts == 1:
        return pool(states, attention_mask, "mean")
    whole = -(-length // parts) * parts
    dtype = torch.promote_types(states.dtype, torch.float32)
    mask = F.pad(attention_mask, (0, whole - attention_mask.shape[1])).to(dtype)
    states = F.pad(states.to(dtype), (0, 0, 0, whole - states.shape[1])) * mask[:, :, None]
    sums = states.view(len(states), parts, whole // parts, -1).sum(2)
    counts = mask.view(len(mask), parts, -1).sum(2)[:, :, None]
    means = torch.where(counts > 0, sums / (counts + 1e-9), sums.sum(1, keepdim=True) / whole)
    return means.flatten(0, 1)


def after_instruction(tokens: Tokens, end: int) -> Tensor:
    """The mask of tokens after the first `end` at a place above 0; the whole text's where none or nothing follows."""
    ids, mask = tokens
    is_end = (ids == end) & (mask > 0)
    is_end[:, 0] = False
    place = is_end.int().argmax(1, keepdim=True)
    after = mask * (torch.arange(ids.shape[1], device=ids.device)[None] > place)
    return torch.where(is_end.any(1, keepdim=True) & (after.sum(1, keepdim=True) > 0), after, mask)


def flattened(vectors: Tensor, width: int) -> Tensor:
    """The numbers of [..., n, w] in a row, filled with ones (by a whole vector where they fit): [..., m, width]."""
    numbers = vectors.flatten(-2)
    missing = width - numbers.shape[-1] % width
    return F.pad(numbers, (0, missing), value=1.0).unflatten(-1, (-1, width))
