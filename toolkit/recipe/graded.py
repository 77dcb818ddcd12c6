"""The data section of graded rows: queries whose passages have grades, put together from sources, a group of each.

Methods that learn from an order of passages take GradedData as their data section.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, Tag

from toolkit.recipe.pairs import PairFields
from toolkit.recipe.section import FaultyRows, Positive, Section, Text
from toolkit.recipe.sources import FolderSource, HubSource, StdlibSource, kind_of_source


class Pick(Section):
    """Some of a query's passages; one of the two keys."""

    first: Positive | None = Field(None, description="The first so many, in the order of the source.")
    random: Positive | None = Field(None, description="So many at random, drawn anew in each epoch.")


class GradedSettings(Section):
    """What every source of graded rows has; in this order: which grades, how many, and what grade they get."""

    at_least: float | None = Field(None, description="Only passages of this grade or a higher one; null: all.")
    below: float | None = Field(None, description="Only passages of a lower grade than this; null: all.")
    pick: Pick | None = Field(None, description="Only some of a query's passages; null: all.")
    grade: float | None = Field(None, description="The grade of all these passages; null: each its own.")


class HubGraded(HubSource, GradedSettings):
    format: Literal["graded", "pairs"] = Field(
        "graded", description="A query with graded passages per row; pairs: positives are of grade 1, negatives of 0."
    )
    fields: PairFields = PairFields()  # pyright: ignore[reportCallIssue]


class FolderGraded(FolderSource, GradedSettings):
    format: Literal["graded", "pairs", "beir"] = Field(
        "graded", description="As for hub sources; beir: the judged queries of a folder in BEIR layout."
    )
    fields: PairFields = PairFields()  # pyright: ignore[reportCallIssue]
    judgements: Text | None = Field(
        None,
        description="For format beir: another file of judgements for the same queries and passages, such as what BM25 "
        "found: .tsv as in qrels/, .jsonl of {qid, docid: [...], score: [...]}, or TREC's files; null: the split's.",
    )


class StdlibGraded(StdlibSource, GradedSettings):
    stdlib: Literal["graded"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        description="The embedded corpus: a training docstring with its function's code (grade 3), another one of the "
        "same class (2), of the same module (1) and of another module (0); three or four of them."
    )


GradedSource = HubGraded | FolderGraded | StdlibGraded
_GradedSource = Annotated[
    Annotated[HubGraded, Tag("hub")] | Annotated[FolderGraded, Tag("folder")] | Annotated[StdlibGraded, Tag("stdlib")],
    kind_of_source("graded"),
]


class Group(Section):
    """The passages of a row that a step reads."""

    size: Positive = Field(description="Passages of a row.")
    by: Literal["random", "most_relevant", "least_relevant", "first", "positive_first"] = Field(
        description="Which of a query's passages: random: drawn anew in each epoch; most_relevant and least_relevant: "
        "by grade, then by id; first: the first in the order of the sources; positive_first: one of the highest grade, "
        "which must be 1 or more, then passages of grades below 1, others in each epoch."
    )
    few: Literal["cycle", "refuse"] = Field(
        "refuse",
        description="Queries with fewer passages than a row has: cycle: they are repeated (of positive_first the "
        "negatives are drawn with replacement); refuse: such a row is faulty.",
    )


class GradedData(Section):
    sources: Annotated[list[_GradedSource], Field(min_length=1)] = Field(
        description="A query's passages are those of the first source, then those of the next."
    )
    join: Literal["query_id", "query_text"] | None = Field(
        None, description="By what rows are of the same query, within a source too; null: each row is its own query."
    )
    group: Group
    faulty_rows: FaultyRows = "refuse"


def check_graded(at: str, data: GradedData) -> Iterator[tuple[str, str]]:
    """(path, problem and fix) of what does not fit together in a section of graded rows."""
    for number, source in enumerate(data.sources):
        where = f"{at}.sources.{number}"
        yield from _check_passages(where, source)
        if isinstance(source, StdlibGraded):
            continue
        if isinstance(source, FolderGraded):
            yield from _check_folder(where, source)
        for key, field in PairFields.model_fields.items():
            if getattr(source.fields, key) == field.default:
                continue
            if source.format != "pairs":
                yield f"{where}.fields.{key}", f"is not read with format {source.format}; remove the key"
            elif key == "weight":
                yield f"{where}.fields.{key}", "graded rows have no weights; remove the key"
        if source.format == "pairs" and data.join == "query_id":
            yield f"{at}.join", f'{where} holds pairs, whose queries have no ids; set it to "query_text"'
    if len(data.sources) > 1 and data.join is None:
        yield f"{at}.join", 'missing; write "query_id" or "query_text", by which the sources\' rows are put together'


def _check_passages(at: str, source: GradedSource) -> Iterator[tuple[str, str]]:
    """The filter lets something through, and a pick says one thing."""
    if source.at_least is not None and source.below is not None and source.at_least >= source.below:
        yield f"{at}.below", f"no grade is at least {source.at_least:g} and below {source.below:g}; raise it"
    if source.pick is not None and (source.pick.first is None) == (source.pick.random is None):
        yield f"{at}.pick", 'write {"first": n} or {"random": n}'


def _check_folder(at: str, source: FolderGraded) -> Iterator[tuple[str, str]]:
    if source.format != "beir":
        if source.judgements is not None:
            yield f"{at}.judgements", f"is not read with format {source.format}; remove the key"
        return
    if source.config is not None:
        yield f"{at}.config", "a folder in BEIR layout has none; remove the key"
    if source.judgements is not None and source.split is not None:
        yield f"{at}.split", "judgements names the file to read; remove one of the two keys"
