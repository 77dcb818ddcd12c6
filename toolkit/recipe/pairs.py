"""The data section of pairs: rows of a query with its positives and hard negatives, which may be mined.

Methods that compare queries with documents take PairsData as their data section.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, Tag

from toolkit.recipe.clusters import Clusters, Packing
from toolkit.recipe.search import CODE_HAS_NO_LANGUAGE, Bm25Mine, Mine, MineSettings, RetrieverMine
from toolkit.recipe.section import FaultyRows, Natural, Positive, Section, Text
from toolkit.recipe.sources import FolderSource, HubSource, StdlibSource, kind_of_source
from toolkit.recipe.surrogate import Bm25Surrogate, PreviousSurrogate, Surrogate


class PairFields(Section):
    """Column names of a source of pairs."""

    query: Text | None = Field(None, description="null: query (as Tevatron) or anchor (as sentence-transformers).")
    positive: Text | None = Field(
        None,
        description="Text, or a list of texts or passages; null: positive_passages, positive, positives or pos.",
    )
    negatives: list[Text] | None = Field(
        None,
        description="null: negative_passages, negatives, neg, or all of negative, negative_1, ...",
    )
    weight: Text | None = Field(None, description="Column with the row's weight; null: 1 each.")
    text: Text = Field("text", description="Key of the text in passages that are objects.")
    title: Text | None = Field(None, description="Key in passages, put before the text; null: title, if there is one.")


class PairSettings(Section):
    """What every source of pairs has."""

    weight: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Share of this source in the rows; null in all sources: by size."
    )
    limit: Positive | None = Field(
        None, description="Only so many rows, drawn by the recipe's seed; a larger limit holds a smaller one."
    )
    query_prefix: str | None = Field(None, description="For this source, instead of encoder.query_prefix.")
    passage_prefix: str | None = Field(None, description="For this source, instead of encoder.passage_prefix.")


class HubPairs(HubSource, PairSettings):
    format: Literal["pairs"] = Field("pairs", description="A query with positives and negatives per row.")
    fields: PairFields = PairFields()  # pyright: ignore[reportCallIssue]


class FolderPairs(FolderSource, PairSettings):
    format: Literal["pairs", "beir"] = Field(
        "pairs", description="As for hub sources; beir: the judged queries of a folder in BEIR layout as pairs."
    )
    fields: PairFields = PairFields()  # pyright: ignore[reportCallIssue]


class StdlibPairs(StdlibSource, PairSettings):
    stdlib: Literal["docstrings", "names"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        description="The embedded corpus: the training docstrings of this Python's standard library with their code, "
        "or names of functions and classes with theirs."
    )


PairSource = HubPairs | FolderPairs | StdlibPairs
_PairSource = Annotated[
    Annotated[HubPairs, Tag("hub")] | Annotated[FolderPairs, Tag("folder")] | Annotated[StdlibPairs, Tag("stdlib")],
    kind_of_source("docstrings"),
]


class PairsData(Section):
    sources: Annotated[list[_PairSource], Field(min_length=1)] = Field(
        description="Read one after another; several are mixed."
    )
    positives: Positive = Field(1, description="Positives of a row, drawn anew each epoch if it has more.")
    negatives: Natural = Field(0, description="Hard negatives of a row, drawn anew each epoch if it has more.")
    mix: Literal["rows", "pools"] | None = Field(
        None, description="Several sources: rows of all in every pool, or one source per pool."
    )
    mine: Mine | None = Field(None, description="Search for hard negatives of the rows; null: their own alone.")
    clusters: Clusters | None = Field(None, description="Groups of rows that are near one another; for packing.")
    packing: Packing | None = Field(None, description="How pools are cut from the clusters; null: rows are shuffled.")
    faulty_rows: FaultyRows = "refuse"


def check_pairs(at: str, data: PairsData, first_stage: bool) -> Iterator[tuple[str, str]]:
    """(path, problem and fix) of what does not fit together in a section of pairs."""
    for number, source in enumerate(data.sources):
        if not isinstance(source, FolderPairs) or source.format != "beir":
            continue
        if source.config is not None:
            yield f"{at}.sources.{number}.config", "a folder in BEIR layout has none; remove the key"
        for key, field in PairFields.model_fields.items():
            if getattr(source.fields, key) != field.default:
                yield f"{at}.sources.{number}.fields.{key}", "is not read with format beir; remove the key"
    weighted = [source.weight is not None for source in data.sources]
    if data.packing is None and any(weighted) and not all(weighted):
        yield f"{at}.sources.{weighted.index(False)}.weight", "missing; give every source a weight, or none"
    if data.packing is not None:
        yield from _check_packing(at, data, data.packing)
    elif len(data.sources) > 1 and data.mix is None:
        yield f"{at}.mix", 'missing; write "rows" (all sources in every pool) or "pools" (one source per pool)'
    elif len(data.sources) == 1 and data.mix is not None:
        yield f"{at}.mix", "there is one source; remove the key"
    if data.clusters is not None:
        if data.packing is None:
            yield f"{at}.clusters", 'has no effect without packing; add "packing": {"walk": "greedy"}, or remove it'
        for key, problem in surrogate_problems(data.clusters.surrogate, first_stage):
            yield f"{at}.clusters.surrogate.{key}", problem
    if data.mine is not None:
        yield from _check_mine(at, data, data.mine, first_stage)


def _check_packing(at: str, data: PairsData, packing: Packing) -> Iterator[tuple[str, str]]:
    """Packing lays out all rows of all sources once an epoch, so shares and mixing mean nothing beside it."""
    if data.clusters is None:
        yield f"{at}.packing", "cuts pools from clusters; add data.clusters, or remove it"
    if data.mix is not None:
        yield f"{at}.mix", "has no effect with packing, which has data.packing.within; remove the key"
    for number, source in enumerate(data.sources):
        if source.weight is not None:
            fix = "remove it (limit lets a source give fewer rows)"
            yield f"{at}.sources.{number}.weight", f"packing takes every row of a source once an epoch; {fix}"
    if len(data.sources) > 1 and packing.within is None:
        yield f"{at}.packing.within", 'missing; write "all" (a pool may straddle two sources) or "source" (never)'
    if len(data.sources) == 1 and packing.within is not None:
        yield f"{at}.packing.within", "there is one source; remove the key"


def surrogate_problems(surrogate: Surrogate, first_stage: bool) -> Iterator[tuple[str, str]]:
    """(key, problem and fix) of what does not fit together in a surrogate."""
    if isinstance(surrogate, PreviousSurrogate) and first_stage:
        yield "by", 'there is no stage before the first; write "retriever" or "bm25"'
    if isinstance(surrogate, Bm25Surrogate) and surrogate.text == "code" and surrogate.language is not None:
        yield "language", CODE_HAS_NO_LANGUAGE


def _check_mine(at: str, data: PairsData, mine: Mine, first_stage: bool) -> Iterator[tuple[str, str]]:
    """Mined negatives come from somewhere and are used."""
    for key, problem in mine_problems(mine):
        yield f"{at}.mine.{key}", problem
    if isinstance(mine, RetrieverMine) and first_stage:
        yield f"{at}.mine.by", 'there is no stage before the first; write {"by": "bm25", "text": ...}'
    if not 0 < data.negatives <= mine.negatives:
        most = mine.negatives
        fix = f"set negatives to {'1' if most == 1 else f'1 or {most}' if most == 2 else f'1 to {most}'}"
        if data.negatives > most:
            fix += f", raise mine.negatives to {data.negatives}"
        yield f"{at}.negatives", f"{data.negatives}, but data.mine finds {most} a row; {fix}, or remove mine"


def mine_problems(mine: MineSettings) -> Iterator[tuple[str, str]]:
    """(key, problem and fix) of what does not fit together in the settings of mining."""
    first, last = mine.ranks
    if last - first + 1 < mine.negatives:
        held = max(0, last - first + 1)
        fix = f"set ranks to {first} and {first + mine.negatives - 1} or more" + (
            f", or negatives to {held}" * (held > 0)
        )
        yield (
            "ranks",
            f"{first} to {last} hold {held} passages, but negatives asks for {mine.negatives}; {fix}",
        )
    if mine.positive != "highest" and mine.max_share is None and mine.margin is None:
        yield "positive", "only max_share and margin count from it; set one of them, or leave positive out"
    if isinstance(mine, Bm25Mine) and mine.text == "code" and mine.language is not None:
        yield "language", CODE_HAS_NO_LANGUAGE
