"""A retriever in two stages with a context that every text is read with, and the file in which its vectors lie.

Called by export, evaluation, mining and the module for sentence-transformers.
"""

import hashlib
import json
import threading
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from toolkit.data.tokens import Tokens
from toolkit.models.contextual import ContextualEncoder
from toolkit.models.encoder import Encoder
from toolkit.models.retriever import Retriever
from toolkit.recipe.errors import RecipeError, one_line

KEPT = Path("context", "vectors.safetensors")
"""Below an export: the context that it is read with unless another is set."""
_ABOUT = ("model", "documents", "drawn_from", "of", "seed", "digest")


class Context(NamedTuple):
    """The vectors that every text is read with, and where they come from."""

    vectors: np.ndarray  # fp32 [J, w]
    about: dict[str, Any]  # the keys of _ABOUT

    @property
    def digest(self) -> str:
        """16 hex digits of the vectors."""
        return self.about["digest"]


def make_context(
    vectors: np.ndarray, model: str, documents: int, drawn_from: int, of: str, seed: int | None
) -> Context:
    """A context of vectors [J, w]; the rest says where they come from."""
    digest = hashlib.sha256(np.ascontiguousarray(vectors, "<f4").tobytes()).hexdigest()[:16]
    about: dict[str, Any] = dict(zip(_ABOUT, (model, documents, drawn_from, of, seed, digest), strict=True))
    return Context(vectors, about)


class InContext(Encoder):
    """A contextual encoder that reads every text with one context: tokens -> vectors, as Encoder.

    What stands before the texts is made once, of the weights as they are then.
    """

    context: Tensor
    prefix: Tensor

    def __init__(self, encoder: ContextualEncoder, context: Context) -> None:
        super().__init__(encoder.backbone, encoder.pooling, encoder.normalize, encoder.truncate_dim)
        self.contextual = encoder
        self.kept, self.digest = context, context.digest
        weight = next(encoder.parameters())
        self.register_buffer("context", torch.from_numpy(context.vectors).to(weight.device))
        with torch.no_grad():
            self.register_buffer("prefix", encoder.prefix(self.context), persistent=False)
        self.eval()

    def changed(self, pooling: str, normalize: bool, truncate_dim: int | None) -> Self:
        return type(self)(self.contextual.changed(pooling, normalize, truncate_dim), self.kept)

    def forward(self, tokens: Tokens) -> Tensor:
        return self.contextual.text(tokens, self.prefix)


class FirstStage(Encoder):
    """The first stage alone: tokens of context documents -> their vectors side by side [rows, t * w]."""

    def __init__(self, encoder: ContextualEncoder, length: int) -> None:
        """length: tokens over which a document's t vectors share it out, as ContextualEncoder.first."""
        backbone = encoder.backbone if encoder.first_backbone is None else encoder.first_backbone
        super().__init__(backbone, "mean", normalize=False)
        self.contextual, self.length = encoder, length
        self._one_at_a_time = threading.Lock()  # the second stage's adapter is set aside meanwhile
        self.eval()

    def forward(self, tokens: Tokens) -> Tensor:
        with self._one_at_a_time:
            vectors = self.contextual.first(tokens, self.length)
        return vectors.view(len(tokens.input_ids), -1)


def contextual_of(encoder: Encoder) -> ContextualEncoder | None:
    """The encoder in two stages that an encoder is, or that reads with a context in it; None for any other."""
    if isinstance(encoder, InContext):
        return encoder.contextual
    return encoder if isinstance(encoder, ContextualEncoder) else None


def without_context(retriever: Retriever) -> Retriever:
    """A retriever whose texts are read with null vectors, if it reads with a context at all."""
    contextual = contextual_of(retriever.encoder)
    return retriever if contextual is None else retriever._replace(encoder=contextual)


def in_context(retriever: Retriever, context: Context) -> Retriever:
    """A contextual retriever that reads every text, query or passage, with a context; the weights are shared.

    Raises:
        ValueError: for vectors that are not of its size.
    """
    contextual = contextual_of(retriever.encoder)
    assert contextual is not None
    wanted = (contextual.settings.size, contextual.width)
    if context.vectors.shape != wanted:
        raise ValueError(f"a context of {list(context.vectors.shape)} vectors, where the model reads {list(wanted)}")
    return retriever._replace(encoder=InContext(contextual, context))


# --------------------------------------------------------------------------- the file


def write_vectors(path: Path, context: Context) -> None:
    """Write a context to a .safetensors file, which says in itself what it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.writing")
    save_file(
        {"vectors": np.ascontiguousarray(context.vectors, np.float32)}, work, {"about": json.dumps(context.about)}
    )
    work.replace(path)


def read_vectors(path: Path, retriever: Retriever) -> Context:
    """The context that a file holds.

    Raises:
        RecipeError: if it is none, is damaged, or was made by another model than this retriever.
    """
    at = one_line(path)
    try:
        with safe_open(path, "numpy") as file:
            about, vectors = json.loads((file.metadata() or {})["about"]), file.get_tensor("vectors")
        found = make_context(vectors, *(about[key] for key in _ABOUT[:-1]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:100]
        raise RecipeError(f"{at}: holds no context ({reason}); name one that an evaluation has written") from None
    assert retriever.first is not None
    if about["model"] != retriever.first.identity:
        raise RecipeError(
            f"{at}: is the context of another model ({about['model']}, this is {retriever.first.identity}); embed its "
            "documents with this one"
        )
    if about["digest"] != found.digest:
        raise RecipeError(f"{at}: differs from its digest; embed its documents again")
    contextual = contextual_of(retriever.encoder)
    assert contextual is not None
    wanted = [contextual.settings.size, contextual.width]
    if list(found.vectors.shape) != wanted:
        raise RecipeError(f"{at}: holds vectors {list(found.vectors.shape)}, the model reads {wanted}")
    return found
