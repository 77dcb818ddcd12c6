"""How a text is read together with vectors of context documents; travels with the export of such a retriever."""

from typing import Annotated, Literal

from pydantic import Field

from toolkit.recipe.section import Length, Positive, Section


class ContextSettings(Section):
    """The context of a text: how many vectors, of which documents, and how they enter the backbone."""

    size: Positive = Field(description="Context vectors that every text is read with (J), of size / t documents.")
    vectors_per_document: Positive = Field(1, description="Vectors of a context document (t); divides size.")
    max_tokens: Length = Field(description="Longest context document in tokens, as the first stage reads it.")
    width: Positive | None = Field(None, description="Numbers of a context vector; null: the first stage's width.")
    soft_prompts: Positive = Field(8, description="Learned vectors between the context and the text.")
    form: Literal["tokens", "projected", "flattened"] = Field(
        description="How context vectors enter. tokens: as token embeddings (encoders; needs the retriever's width). "
        "projected: through a linear layer, with the norm of an average token embedding; in a causal model the text "
        "stays causal and the context is the same for every text. flattened: their numbers cut anew into vectors of "
        "the retriever's width, all read both ways (the reference's, causal models)."
    )
    positions: Literal["none", "consecutive"] = Field(
        "none",
        description="none: context vectors have no order. consecutive: the position of their place (rotary models).",
    )
    null_probability: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="In training each context vector is replaced by one learned null vector with this probability. "
        "0: there is none, and a text without context is read with zeros.",
    )
    pool: Literal["text", "after_instruction", "all"] = Field(
        "text",
        description="Tokens that pooling mean averages. after_instruction: those of the text after its first colon, if "
        "there is one; all: the context and soft prompts too.",
    )
    position_weights: bool = Field(False, description="Pooling mean weights tokens by their place: 1, 2, 3, ...")
    head: Literal["residual", "plain", "none"] = Field(
        description="Linear, ReLU, Linear on the pooled vector. residual: added to it; plain: in its place; none: no "
        "head."
    )
