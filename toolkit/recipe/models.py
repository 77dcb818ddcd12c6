"""The models of a stage: where they come from, their adapters, and how a text becomes a vector."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from toolkit.recipe.section import Length, Positive, Section, Text


class HubStart(Section):
    hub: Text = Field(description="Model id on the hub, e.g. meta-llama/Llama-3.2-1B.")


class FolderStart(Section):
    folder: Text = Field(description="Folder with config.json, safetensors weights and a tokenizer.")


class BuildTokenizer(Section):
    """Byte-level BPE, trained on the stage's own training text."""

    vocab_size: Annotated[int, Field(ge=300)] = Field(description="Number of tokens, the two special ones included.")
    pieces: Literal["text", "identifiers", "words"] = Field(
        description="What is never merged across: text: words and white space as in GPT-2; identifiers: also "
        "underscores, changes of case and digits (source code); words: letters and digits alone, in lower case, split "
        "at changes of case (marks and white space are dropped: texts cannot be had back)."
    )


class BuildModel(Section):
    """A Llama-type model with random weights."""

    hidden_size: Positive = Field(description="Width of the residual stream.")
    layers: Positive = Field(description="Number of layers.")
    heads: Positive = Field(description="Number of query heads; divides hidden_size.")
    kv_heads: Positive = Field(description="Number of key and value heads; divides heads.")
    intermediate_size: Positive = Field(description="Width of the feed-forward layer.")
    max_tokens: Positive = Field(description="Longest input in tokens (max_position_embeddings).")
    tie_embeddings: bool = Field(description="Share input embedding and output head.")
    zero_residual: bool = Field(
        False, description="Start attention and feed-forward without effect: the model begins as its embeddings alone."
    )
    tokenizer: BuildTokenizer


class BuildStart(Section):
    build: BuildModel


def _start_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "previous" if value == "previous" else None
    if isinstance(value, dict):
        known = [kind for kind in ("hub", "folder", "build") if kind in value]
        return known[0] if len(known) == 1 else None
    return {HubStart: "hub", FolderStart: "folder", BuildStart: "build"}.get(type(value))


START_FIX = 'write "previous", {"hub": "<model id>"}, {"folder": "<path>"} or {"build": {...}}'
Start = Annotated[
    Annotated[Literal["previous"], Tag("previous")]
    | Annotated[HubStart, Tag("hub")]
    | Annotated[FolderStart, Tag("folder")]
    | Annotated[BuildStart, Tag("build")],
    Discriminator(_start_kind, custom_error_type="start_kind", custom_error_message=START_FIX),
]


class Lora(Section):
    """Low-rank adapters (Hu et al. 2022, arXiv 2106.09685)."""

    rank: Positive = Field(description="Rank r of the update.")
    alpha: Annotated[float, Field(gt=0)] = Field(description="The update is scaled by alpha / rank.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(description="Dropout on the adapter's input.")
    targets: Annotated[list[Text], Field(min_length=1)] = Field(
        description="Names of the linear modules that get an adapter, e.g. q_proj."
    )


Pooling = Literal["eos", "mean", "cls"]


class EncoderSettings(Section):
    """How a text becomes one vector; travels with the export. The keys mean what they do in EncoderKeys."""

    pooling: Pooling
    normalize: bool
    append_eos: bool | None = None
    query_prefix: str
    passage_prefix: str
    max_tokens: Length
    eval_max_tokens: Length
    truncate_dim: Positive | None = None  # first dimensions that are kept; of models that others made


class EncoderKeys(Section):
    """How a text becomes one vector. What is left out is as the start model names it.

    A sentence-transformers model names it in its folder, an export of this toolkit too; for start previous it is the
    setting of the stage before. A model that names none, as a plain language model, needs all keys but append_eos.
    """

    pooling: Pooling | None = Field(
        None, description="eos: state of the last token; mean: mean over real tokens; cls: state of the first token."
    )
    normalize: bool | None = Field(None, description="Scale vectors to unit length.")
    append_eos: bool | None = Field(
        None,
        description="null: the special tokens that the tokenizer puts around a text by itself (for pooling eos of a "
        "model that names no pooling: true). true: the end token too where it puts nothing after the text. false: "
        "nothing after the text.",
    )
    query_prefix: str | None = Field(None, description="Put before every query, spaces included.")
    passage_prefix: str | None = Field(None, description="Put before every passage, spaces included.")
    max_tokens: Length | None = Field(
        None, description="Longest input in tokens when training, prefix and special tokens included."
    )
    eval_max_tokens: Length | None = Field(None, description="Longest input in tokens in evaluation and in the export.")
