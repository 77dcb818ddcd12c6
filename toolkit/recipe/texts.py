"""Data sections of texts: sources of documents, passages or groups of passages, and how documents are cut and dealt.

Methods that read passages take PassagesData into their keys, methods that cut texts in other ways TextsData.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, Tag

from toolkit.recipe.search import CODE_HAS_NO_LANGUAGE, Bm25Neighbours, Neighbours
from toolkit.recipe.section import FaultyRows, Positive, Section, Text
from toolkit.recipe.sources import FolderSource, HubSource, StdlibSource, kind_of_source


class TextFields(Section):
    """Column names of a source of texts."""

    text: Text = Field("text", description="Column with the text (groups: the list of texts).")
    title: Text | None = Field(None, description="Column put before the text; null: none.")
    document: Text | None = Field(
        None, description="For format passages: consecutive rows with equal values here are one document."
    )


TextFormat = Annotated[
    Literal["documents", "passages", "groups"],
    Field(description="documents: cut here; passages: one per row; groups: a list of texts per row."),
]


class HubTexts(HubSource):
    format: TextFormat = "documents"
    fields: TextFields = TextFields()  # pyright: ignore[reportCallIssue]


class FolderTexts(FolderSource):
    format: TextFormat = "documents"
    fields: TextFields = TextFields()  # pyright: ignore[reportCallIssue]


class StdlibTexts(StdlibSource):
    stdlib: Literal["files"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        description="The embedded corpus: files of this Python's standard library without dev and test docstrings."
    )


TextSource = Annotated[
    Annotated[HubTexts, Tag("hub")] | Annotated[FolderTexts, Tag("folder")] | Annotated[StdlibTexts, Tag("stdlib")],
    kind_of_source("files"),
]


class Passages(Section):
    """How documents are cut: whole units, as many as fit."""

    unit: Literal["sentences", "lines"] = Field(description="Never cut inside a sentence (prose) or a line (code).")
    max_words: Positive = Field(description="Longest passage in words separated by white space.")


class TextsData(Section):
    sources: Annotated[list[TextSource], Field(min_length=1)] = Field(description="Read one after another.")
    faulty_rows: FaultyRows = "refuse"


class PassagesData(TextsData):
    """Passages: documents cut, passages as they are, or groups of passages."""

    passages: Passages | None = Field(None, description="How documents are cut; needed by sources of that format.")
    interleave: Positive | None = Field(
        None, description="Documents whose passages are dealt in turn; needed unless the sources are groups."
    )
    neighbours: Neighbours | None = Field(
        None,
        description="Documents dealt in turn are bundles of `interleave` neighbours, the same in every epoch; null: "
        "drawn at random.",
    )


# The fields that each format reads.
READ_FIELDS = {
    "documents": {"text", "title"},
    "passages": {"text", "title", "document"},
    "groups": {"text"},
}


def formats(data: TextsData) -> set[str]:
    """The formats of a section's sources; files of the embedded corpus are documents."""
    return {"documents" if isinstance(source, StdlibTexts) else source.format for source in data.sources}


def check_text_fields(at: str, data: TextsData) -> Iterator[tuple[str, str]]:
    """(path, problem and fix) of columns that a source's format does not read."""
    for number, source in enumerate(data.sources):
        if isinstance(source, StdlibTexts):
            continue
        for key, field in TextFields.model_fields.items():
            if key not in READ_FIELDS[source.format] and getattr(source.fields, key) != field.default:
                yield f"{at}.sources.{number}.fields.{key}", f"is not read with format {source.format}; remove the key"


def check_passages(at: str, data: PassagesData) -> Iterator[tuple[str, str]]:
    """(path, problem and fix) of what does not fit together in a section of passages."""
    found = formats(data)
    if "groups" in found and len(found) > 1:
        yield f"{at}.sources", "groups do not mix with documents or passages; use one kind in a stage"
        return
    grouped = "groups" in found
    if "documents" in found and data.passages is None:
        yield f"{at}.passages", 'missing; documents need {"unit": ..., "max_words": ...}'
    if "documents" not in found and data.passages is not None:
        yield f"{at}.passages", "only documents are cut; remove the key"
    if grouped and data.interleave is not None:
        yield f"{at}.interleave", "groups are read as they are; remove the key"
    if not grouped and data.interleave is None:
        yield f"{at}.interleave", "missing; say how many documents are dealt in turn"
    if grouped and data.neighbours is not None:
        yield f"{at}.neighbours", "only documents whose passages are dealt (interleave) have neighbours; remove the key"
    elif data.neighbours is not None and data.interleave == 1:
        yield f"{at}.interleave", "a bundle of neighbours has two documents or more; raise it, or remove neighbours"
    if isinstance(data.neighbours, Bm25Neighbours) and data.neighbours.text == "code" and data.neighbours.language:
        yield f"{at}.neighbours.language", CODE_HAS_NO_LANGUAGE
    yield from check_text_fields(at, data)
