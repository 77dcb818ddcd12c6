"""The whole recipe schema: what a user writes, checked before anything else is imported.

Called by the launcher and by everything that reads settings. Imports pydantic and nothing heavier, never torch.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from toolkit.recipe_errors import RecipeError, explain, one_line, override, read_json


class Section(BaseModel):
    """Base of every recipe section: frozen, strict types, finite numbers, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Text = Annotated[str, Field(min_length=1)]


# --------------------------------------------------------------------------- where a model comes from


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


Length = Annotated[int, Field(ge=2)]


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


# --------------------------------------------------------------------------- objectives


class LanguageModelObjective(Section):
    """Next-token prediction with all parameters; writes export/ (the encoder) and export/lm/ (with its head)."""

    name: Literal["language_model"]
    max_tokens: Annotated[int, Field(ge=2)] = Field(description="Longest passage in tokens.")


class RevelaLanguageModel(Section):
    """The language model that reads the other passages of the pool; thrown away after training."""

    start: Start = Field(description="previous: the export/lm of the stage before.")
    lora: Lora | None = Field(description="Adapters on the language model; null trains all its parameters.")
    max_tokens: Annotated[int, Field(ge=2)] = Field(description="Longest passage in tokens, as the model reads it.")


class TemperatureDecay(Section):
    """Geometric decay: start * (end / start) ** (t / (steps - 1)) at the optimizer steps t = 0 .. steps - 1."""

    start: Annotated[float, Field(gt=0)] = Field(description="tau of the stage's first optimizer step.")
    end: Annotated[float, Field(gt=0)] = Field(description="tau of its last; at most start.")


def _temperature_kind(value: Any) -> str | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "constant"
    return "decay" if isinstance(value, dict | TemperatureDecay) else None


Temperature = Annotated[
    Annotated[Annotated[float, Field(gt=0)], Tag("constant")] | Annotated[TemperatureDecay, Tag("decay")],
    Discriminator(
        _temperature_kind,
        custom_error_type="temperature_kind",
        custom_error_message='write a number, or {"start": ..., "end": ...} for a geometric decay',
    ),
]


class RevelaObjective(Section):
    """Revela (arXiv 2506.16552): a retriever learns from next-token prediction through in-batch attention."""

    name: Literal["revela"]
    temperature: Temperature = Field(
        description="tau of the softmax over similarities, constant or decaying; the paper uses 1e-4 with bf16 "
        "similarities."
    )
    similarity_dtype: Literal["fp32", "bf16", "fp64"] = Field(
        "fp32", description="Number format of similarities, weights and their softmax."
    )
    v_norm: bool = Field(
        description="Divide the in-batch term by the attended value norms (paper: on for text, off for code)."
    )
    half_query: bool = Field(description="The query side is the first half of the passage's tokens.")
    dual_loss: bool = Field(description="Add the plain next-token loss of pass 1 with weight 1.")
    detach_kv: bool = Field(description="Stop gradients through the cached keys and values (same retriever gradient).")
    min_weight: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Passages of at most this weight are not read: time and memory follow the pairs that are. 0 leaves "
        "out zeros alone and is exact; above it, a similarity loses a gradient of at most this over the temperature.",
    )
    max_sources: Positive | None = Field(
        None, description="Most passages that a row reads, by weight; null: any number."
    )
    max_dropped_mass: Annotated[float, Field(gt=0, le=1)] = Field(
        0.01,
        description="The run stops if the rows that are run together lose more of their weight than this on average.",
    )
    language_model: RevelaLanguageModel


Direction = Literal["query_to_document", "document_to_query", "query_to_query", "document_to_document"]


class ContrastiveObjective(Section):
    """InfoNCE over (query, positives, hard negatives) rows: every other document of the pool is a negative."""

    name: Literal["contrastive"]
    temperature: Annotated[float, Field(gt=0)] = Field(description="Scores are divided by it (starting value).")
    learn_temperature: bool = Field(False, description="Train the temperature too (one scalar, at least 0.01).")
    directions: Annotated[list[Direction], Field(min_length=1)] = Field(
        ["query_to_document"],
        description="Rows of the first kind against columns of the other.",
    )
    partition: Literal["separate", "joint"] = Field(
        "separate",
        description="Several directions: the mean of one loss each, or one joint sum of negatives (GTE, 2308.03281).",
    )
    false_negative_margin: float | None = Field(
        None, description="Leave out negatives that score above the own positive plus this; null: none."
    )
    false_negative_threshold: float | None = Field(
        None, description="Leave out negatives that score above this; null: none."
    )
    matryoshka: Annotated[list[Positive], Field(min_length=1)] | None = Field(
        None,
        description="Mean of the loss over these leading dimensions (2205.13147), the model's width among them; "
        "null: all dimensions only.",
    )


class MomentumQueue(Section):
    """Negatives of earlier steps (MoCo, 1911.05722), encoded by a slow copy of the retriever."""

    size: Positive = Field(description="Keys held; a multiple of the keys of a step (views x rows of a step).")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        description="Share of the slow copy kept at every step, in fp32."
    )
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="Number format of the stored keys; scores are fp32.")


class ReContrieverObjective(Section):
    """ReContriever (2306.03166): crops of one text as pairs, each weighted by its estimated relevance.

    One view and relevance none make it MoCo with a queue and Contriever with in-batch negatives without.
    """

    name: Literal["recontriever"]
    temperature: Annotated[float, Field(gt=0)] = Field(description="Scores are divided by it.")
    views: Positive = Field(description="Keys per query, all crops of its own text (the paper's K = 4).")
    relevance: Literal["linear", "softmax", "none"] = Field(
        description="Weight of a view: its share of the text's raw scores (paper), their softmax, or 1 / views."
    )
    relevance_temperature: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Temperature of the softmax weights; needed by softmax alone."
    )
    clamp_negative: bool = Field(False, description="Linear weights: count scores below zero as zero.")
    queue: MomentumQueue | None = Field(
        description="Negatives from a queue and a momentum encoder; null: the pool's other keys, with gradient."
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Mass spread over all keys.")


Objective = Annotated[
    LanguageModelObjective | RevelaObjective | ContrastiveObjective | ReContrieverObjective, Field(discriminator="name")
]


# --------------------------------------------------------------------------- data


class Fields(Section):
    """Column names of a source."""

    text: Text = Field("text", description="Column with the text (groups: the list of texts; pairs: key in passages).")
    title: Text | None = Field(
        None, description="Column put before the text; null: none (pairs: title, if there is one)."
    )
    document: Text | None = Field(
        None, description="For format passages: consecutive rows with equal values here are one document."
    )
    query: Text | None = Field(
        None, description="For format pairs; null: query (as Tevatron) or anchor (as sentence-transformers)."
    )
    positive: Text | None = Field(
        None,
        description="For format pairs: text, or a list of texts or passages; null: positive_passages, positive, "
        "positives or pos.",
    )
    negatives: list[Text] | None = Field(
        None,
        description="For format pairs; null: negative_passages, negatives, neg, or all of negative, negative_1, ...",
    )
    weight: Text | None = Field(None, description="For format pairs: column with the row's weight; null: 1 each.")


class SourceSettings(Section):
    """What every kind of source has."""

    weight: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Share of this source in the rows (pairs); null in all sources: by size."
    )
    limit: Positive | None = Field(
        None,
        description="Only so many rows (pairs), drawn by the recipe's seed; a larger limit holds a smaller one.",
    )
    query_prefix: str | None = Field(None, description="For this source (pairs), instead of encoder.query_prefix.")
    passage_prefix: str | None = Field(None, description="For this source (pairs), instead of encoder.passage_prefix.")


class HubSource(SourceSettings):
    hub: Text = Field(description="Dataset id on the hub.")
    config: Text | None = Field(None, description="Configuration of the dataset; null: the default one.")
    split: Text = Field("train", description="Split of the dataset.")
    format: Literal["documents", "passages", "groups", "pairs"] = Field(
        "documents",
        description="documents: cut here; passages: one per row; groups: a list of texts per row; pairs: a query with "
        "positives and negatives per row.",
    )
    fields: Fields = Fields()  # pyright: ignore[reportCallIssue]


class FolderSource(SourceSettings):
    folder: Text = Field(
        description="Folder (or file) with .jsonl, .jsonl.gz or .parquet, also a dataset's as downloaded from the hub."
    )
    format: Literal["documents", "passages", "groups", "pairs", "beir"] = Field(
        "documents", description="As for hub sources; beir: the judged queries of a folder in BEIR layout as pairs."
    )
    config: Text | None = Field(
        None, description="Configuration of a folder whose README.md lists some (configs); null: the default one."
    )
    split: Text | None = Field(
        None,
        description="Reads the files of this split alone, by the README.md of a dataset as downloaded or by names such "
        "as train.jsonl or data/test-00000-of-00001.parquet; null: all files, which may then be of one split only. "
        "For format beir: reads qrels/<split>.tsv; null: train.",
    )
    fields: Fields = Fields()  # pyright: ignore[reportCallIssue]


class StdlibSource(SourceSettings):
    stdlib: Literal["files", "docstrings", "names"] = Field(
        description="The embedded corpus: files of this Python's standard library without dev and test docstrings; or "
        "as pairs the training docstrings with their code, or names of functions and classes with theirs."
    )


def _source_kind(value: Any) -> str | None:
    if isinstance(value, dict):
        known = [kind for kind in ("hub", "folder", "stdlib") if kind in value]
        return known[0] if len(known) == 1 else None
    return {HubSource: "hub", FolderSource: "folder", StdlibSource: "stdlib"}.get(type(value))


Source = Annotated[
    Annotated[HubSource, Tag("hub")] | Annotated[FolderSource, Tag("folder")] | Annotated[StdlibSource, Tag("stdlib")],
    Discriminator(
        _source_kind,
        custom_error_type="source_kind",
        custom_error_message='write {"hub": "<dataset id>"}, {"folder": "<path>"} or {"stdlib": "files"}',
    ),
]


def source_name(source: HubSource | FolderSource | StdlibSource) -> str:
    """Kind and name of a source, e.g. "hub: owner/name"."""
    match source:
        case HubSource():
            return one_line(f"hub: {source.hub}")
        case FolderSource():
            return one_line(f"folder: {source.folder}")
        case StdlibSource():
            return f"stdlib: {source.stdlib}"


class Passages(Section):
    """How documents are cut: whole units, as many as fit."""

    unit: Literal["sentences", "lines"] = Field(description="Never cut inside a sentence (prose) or a line (code).")
    max_words: Positive = Field(description="Longest passage in words separated by white space (Revela: 120).")


class Crops(Section):
    """Random pieces of a chunk of text, as query and keys (Contriever, 2112.09118)."""

    chunk_tokens: Annotated[int, Field(ge=4)] = Field(description="Tokens of text that query and keys are cut from.")
    min_ratio: Annotated[float, Field(gt=0, le=1)] = Field(description="Shortest crop as a share of the chunk.")
    max_ratio: Annotated[float, Field(gt=0, le=1)] = Field(description="Longest crop as a share of the chunk.")
    delete: Annotated[float, Field(ge=0, lt=1)] = Field(description="Each token of a crop is left out so often.")
    across_documents: bool = Field(
        False, description="Chunks of one endless stream of all text (paper) instead of chunks of one document each."
    )


Bm25Text = Annotated[
    Literal["prose", "code"],
    Field(description="prose: words of a language; code: names split at underscores and case."),
]
# none, ngrams, and PyStemmer's algorithms.
_Language = Literal[
    "none", "ngrams", "arabic", "armenian", "basque", "catalan", "czech", "danish", "dutch", "dutch_porter", "english",
    "esperanto", "estonian", "finnish", "french", "german", "greek", "hindi", "hungarian", "indonesian", "irish",
    "italian", "lithuanian", "nepali", "norwegian", "persian", "polish", "porter", "portuguese", "romanian", "russian",
    "serbian", "sesotho", "spanish", "swedish", "tamil", "turkish", "yiddish",
]  # fmt: skip
Bm25Language = Annotated[
    _Language | None,
    Field(
        description="Language of prose: words stemmed as PyStemmer's algorithm of this name does, stop words left out "
        "where bm25s has a list; none: words as they are; ngrams: pairs of characters of Chinese, Japanese, Korean, "
        "Thai, Lao, Khmer and Burmese, whole words else. null: found by script and function words, per collection; "
        "English for Latin script unless another language is certain."
    ),
]


class Bm25Neighbours(Section):
    """Neighbours share rare words: BM25 between the first 256 words of documents."""

    by: Literal["bm25"]
    text: Bm25Text
    language: Bm25Language = None


class EmbeddingNeighbours(Section):
    """Neighbours have similar first passages, embedded by the retriever that the stage starts from."""

    by: Literal["embeddings"]


Neighbours = Annotated[Bm25Neighbours | EmbeddingNeighbours, Field(discriminator="by")]


class NearDuplicates(Section):
    """Passages of a pool that share most n-grams of tokens do not read one another (no copying)."""

    ngram: Positive = Field(description="Tokens of the language model in an n-gram.")
    threshold: Annotated[float, Field(gt=0, le=1)] = Field(
        description="Least share of common n-grams (Jaccard), estimated from 128 hashes: standard error up to 0.044."
    )


class MineSettings(Section):
    """Which of the passages that a search finds for a row's query become its hard negatives."""

    ranks: Annotated[list[Positive], Field(min_length=2, max_length=2)] = Field(
        description="First and last rank that negatives come from; known positives of the query have none."
    )
    negatives: Positive = Field(
        description="Hard negatives of a row, its own included; drawn at random from those ranks by the seed."
    )
    max_share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Leave out passages that score above this share of the positive's score (NV-Retriever, 2407.15831: "
        "0.95); null: none.",
    )
    margin: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Leave out passages that score less than this below the positive's score; null: none.",
    )
    positive: Literal["lowest", "mean", "highest"] = Field(
        "highest",
        description="Which of a row's positives max_share and margin count from. NV-Retriever (2407.15831) sets its "
        "limit for a pair of query and positive; of a row's pairs together all passages are allowed that its highest "
        "positive allows. lowest, as sentence-transformers and NeMo take it for a query: no negative scores above any "
        "positive, but one that scores low takes all negatives from its row.",
    )
    max_score: float | None = Field(None, description="Leave out passages that score above this; null: none.")


class Bm25Mine(MineSettings):
    """Hard negatives by BM25, each source searched for itself, before the stage trains."""

    by: Literal["bm25"]
    text: Bm25Text
    language: Bm25Language = None


class RetrieverMine(MineSettings):
    """Hard negatives by the export of the stage before, each source searched for itself, before the stage trains."""

    by: Literal["previous"]


Mine = Annotated[Bm25Mine | RetrieverMine, Field(discriminator="by")]


class Data(Section):
    sources: Annotated[list[Source], Field(min_length=1)] = Field(
        description="Read one after another; pairs of several sources are mixed."
    )
    passages: Passages | None = Field(None, description="Needed by sources of format documents, unless cropped.")
    interleave: Positive | None = Field(
        None, description="Documents whose passages are dealt in turn; needed for passages."
    )
    neighbours: Neighbours | None = Field(
        None,
        description="Documents dealt in turn are bundles of `interleave` neighbours, the same in every epoch; null: "
        "drawn at random.",
    )
    near_duplicates: NearDuplicates | None = Field(
        None, description="Pairs of a pool that are masked (revela); null: none."
    )
    crops: Crops | None = Field(None, description="Needed by recontriever.")
    positives: Positive = Field(1, description="Positives of a row, drawn anew each epoch if it has more (pairs).")
    negatives: Natural = Field(0, description="Hard negatives of a row, drawn anew each epoch if it has more (pairs).")
    mix: Literal["rows", "pools"] | None = Field(
        None, description="Several sources of pairs: rows of all in every pool, or one source per pool."
    )
    mine: Mine | None = Field(None, description="Search for hard negatives of the rows (pairs); null: their own alone.")
    faulty_rows: Literal["refuse", "skip"] = Field(
        "refuse",
        description="Rows that cannot be used (no JSON, no UTF-8, columns missing or of another kind, an id met "
        "before): refuse: the first is an error; skip: they are left out, counted by kind, and said. Files that cannot "
        "be read on, and sources without one row of use, are errors in either case.",
    )


# --------------------------------------------------------------------------- batch, optimizer, engine


class Batch(Section):
    pool: Annotated[int, Field(ge=2)] = Field(
        description="Rows compared with one another: passages, pairs, or texts with their crops."
    )
    span: Literal["rank", "world"] = Field(description="rank: a pool on one rank; world: spread over all ranks.")
    pools_per_step: Positive = Field(description="Pools per optimizer step, over all ranks.")
    forward_rows: Positive | None = Field(
        None, description="Texts per slice of gradient caching; null keeps all activations. Never changes the result."
    )
    forward_tokens: Positive | None = Field(
        None, description="Instead of forward_rows: padded tokens per slice, of texts sorted by length."
    )


class Optim(Section):
    """AdamW (decoupled weight decay)."""

    lr: Annotated[float, Field(gt=0)] = Field(description="Peak learning rate.")
    warmup_steps: Natural = Field(description="Optimizer steps until the peak.")
    warmup: Literal["linear", "linear_from_zero", "log"] = Field(
        description="Shape: linear (first step above 0), linear_from_zero (as Contriever), log (DeepSpeed's WarmupLR)."
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(description="After warm-up; linear and cosine end at 0.")
    steps: Positive = Field(description="Optimizer steps of the stage.")
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.999], description="Adam betas."
    )
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="Adam epsilon.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Decoupled weight decay.")
    clip: Annotated[float, Field(ge=0)] = Field(1.0, description="Largest gradient norm; 0 turns clipping off.")


class NvmeOffload(Section):
    nvme: Text = Field(description="Folder on a local NVMe disk.")


def _offload_kind(value: Any) -> str | None:
    if value == "cpu":
        return "cpu"
    return "nvme" if isinstance(value, NvmeOffload) or (isinstance(value, dict) and "nvme" in value) else None


Offload = Annotated[
    Annotated[Literal["cpu"], Tag("cpu")] | Annotated[NvmeOffload, Tag("nvme")],
    Discriminator(
        _offload_kind, custom_error_type="offload_kind", custom_error_message='write "cpu", {"nvme": "<path>"} or null'
    ),
]


class Zero(Section):
    stage: Literal[0, 1, 2, 3] = Field(
        description="What is sharded: 1 optimizer states, 2 + gradients, 3 + parameters."
    )
    offload_optimizer: Offload | None = Field(None, description="Optimizer states to cpu memory, or NVMe (stage 3).")
    offload_param: Offload | None = Field(None, description="Parameters to cpu memory or NVMe (stage 3).")


class Save(Section):
    every: Positive = Field(description="Optimizer steps between checkpoints; the last step is always saved.")
    keep: Positive = Field(description="Newest checkpoints kept.")


class Guard(Section):
    """What ends a stage that has gone wrong; never changes the result of one that has not."""

    stall_minutes: Annotated[float, Field(gt=0)] = Field(
        10.0,
        description="The run ends if a rank makes no progress for so long (the first step, saves, export and "
        "evaluation are not counted).",
    )
    compare_weights_every: Positive = Field(
        100, description="Steps between comparisons of the weights that ranks hold in common (ZeRO 0 to 2)."
    )
    non_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="A loss or gradient that is not finite changes no weight, and its rows are written down; then the "
        "run stops, or goes on and counts (skipped_steps).",
    )


class StopIfWorse(Section):
    """The run stops after the stage, exit code 3, if it is worse than another system on any collection of its suites.

    Worse: the collection's main score is lower by more than `by`, and the difference is significant (paired
    randomisation test, p < 0.05 after Holm's correction over the collections).
    """

    than: Literal["bm25", "start", "previous"] = Field(
        description="bm25; start: the model before training that the stage goes back to; previous: the stage before."
    )
    by: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="A drop of at most this is let pass.")


class EvalSettings(Section):
    """How a retriever is evaluated where that differs from how it was trained; written into every result."""

    query_prefix: str | None = Field(None, description="Instead of encoder.query_prefix, spaces included.")
    passage_prefix: str | None = Field(None, description="Instead of encoder.passage_prefix, spaces included.")
    max_tokens: Annotated[int, Field(ge=2)] | None = Field(None, description="Instead of encoder.eval_max_tokens.")
    pooling: Pooling | None = Field(
        None, description="Instead of encoder.pooling; eos ends each text with the end token."
    )
    normalize: bool | None = Field(
        None, description="Instead of encoder.normalize; false: dot products of the vectors as they are."
    )
    prompts: dict[Text, str] = Field(
        {}, description="Name or type of an mteb task (e.g. Clustering) -> prefix of all its texts, on both sides."
    )
    identical_ids: Literal["task", "keep", "drop"] = Field(
        "task",
        description="Documents whose id equals the query's: kept or dropped as mteb's task says (folders: kept), or "
        "always.",
    )
    bm25_text: Literal["prose", "code"] | None = Field(
        None,
        description="How BM25 reads: words of a language, or names split at underscores and case. null: code for the "
        "embedded corpus, else prose.",
    )
    bm25_language: Bm25Language = None
    vectors_dtype: Literal["fp32", "fp16"] = Field(
        "fp32", description="Number format of the documents' vectors on disk; fp16 takes half of it."
    )


class Eval(EvalSettings):
    suites: list[Text] = Field(
        description="Scored after the stage: quick, stage, beir, coir, bright, msmarco, stdlib:dev, stdlib:test, a "
        "folder (FOLDER, FOLDER:split, quick:FOLDER), an mteb task or benchmark, or NAME=FOLDER, its copy on disk."
    )
    stop_if_worse: StopIfWorse | None = Field(None, description="Halts the stages after this one; null: never.")


class Export(Section):
    merged: bool = Field(description="Also write export/merged/: full weights with the adapter added in.")


class Stage(Section):
    name: Name = Field(description="Folder name of the stage.")
    description: str = Field("", description="Free text.")
    start: Start = Field(description="The retriever's weights: previous stage, hub, folder or built here.")
    encoder: EncoderKeys = EncoderKeys()  # pyright: ignore[reportCallIssue]
    lora: Lora | None = Field(description="Adapters on the retriever; null trains all its parameters.")
    objective: Objective
    data: Data
    batch: Batch
    optim: Optim
    precision: Literal["bf16", "fp32"] = Field(
        description="Number format of weights and activations; optimizer in fp32."
    )
    activation_checkpointing: bool = Field(False, description="Recompute every layer in the backward pass.")
    zero: Zero
    save: Save
    guard: Guard = Guard()  # pyright: ignore[reportCallIssue]
    eval: Eval
    export: Export

    @property
    def encoder_settings(self) -> EncoderSettings:
        """The encoder section once it is complete (start_settings); a ValidationError (ValueError) before."""
        return EncoderSettings.model_validate(self.encoder.model_dump())


class Recipe(Section):
    name: Name = Field(description="Folder name of the run below runs/.")
    description: str = Field(description="What it is, source of every value, hardware, memory and hours.")
    seed: Natural = Field(description="Seed of weights, data order and dropout.")
    stages: Annotated[list[Stage], Field(min_length=1)]

    def digest(self, last: int | None = None) -> str:
        """16 hex digits of what decides the weights after stage `last` (all stages if None): seed and stages."""
        stages = self.stages if last is None else self.stages[: last + 1]
        kept = [
            stage.model_dump(mode="json", exclude={"description", "eval", "save", "guard", "export"})
            for stage in stages
        ]
        return hashlib.sha256(json.dumps([self.seed, kept]).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The resolved recipe, every default written out."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


# --------------------------------------------------------------------------- loading


def load_recipe(path: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: JSON file.
        overrides: `key.path=value` strings; the value is JSON, or a plain string when it is not valid JSON.

    Raises:
        RecipeError: with every problem found, one a line, path and fix each.
    """
    path = Path(path)
    raw = read_json(path)
    override(raw, overrides)
    try:
        recipe = Recipe.model_validate(raw)
        recipe.to_json().encode()
    except ValidationError as error:
        raise RecipeError("\n".join(one_line(f"{path}: {line}") for line in explain(Recipe, error))) from None
    except UnicodeEncodeError as error:
        broken = f"{error.object[error.start]!r} is half a character (a lone surrogate); write the whole one"
        raise RecipeError(one_line(f"{path}: {broken}")) from None
    from toolkit.recipe_checks import cross_checks  # here, since it imports the schema above

    problems = list(cross_checks(recipe))
    if problems:
        raise RecipeError("\n".join(one_line(f"{path}: {where}: {what}") for where, what in problems))
    return recipe


# --------------------------------------------------------------------------- derived numbers


def batch_numbers(stage: Stage, world_size: int) -> dict[str, int]:
    """What the batch keys mean on `world_size` ranks.

    Returns:
        rows_per_step_global, rows_per_forward_per_rank, accumulation_per_rank (forwards per optimizer step).

    Raises:
        RecipeError: if the pool or pools_per_step cannot be spread over that many ranks; lists those that fit.
    """
    batch = stage.batch
    spread, key = (batch.pool, "pool") if batch.span == "world" else (batch.pools_per_step, "pools_per_step")
    if spread % world_size:
        fits = [str(n) for n in range(1, spread + 1) if spread % n == 0]
        raise RecipeError(
            f"stage {stage.name}: {world_size} ranks do not divide batch.{key} = {spread} (span {batch.span}); "
            f"use {', '.join(fits)} ranks or change batch.{key}"
        )
    rows = batch.pool // world_size if batch.span == "world" else batch.pool
    return {
        "rows_per_step_global": batch.pool * batch.pools_per_step,
        "rows_per_forward_per_rank": rows,
        "accumulation_per_rank": batch.pools_per_step if batch.span == "world" else batch.pools_per_step // world_size,
    }
