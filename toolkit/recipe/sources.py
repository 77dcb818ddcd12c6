"""Where training data comes from: datasets of the hub, folders, and the embedded corpus; whatever their rows are."""

from typing import Any

from pydantic import Discriminator, Field

from toolkit.recipe.errors import one_line
from toolkit.recipe.section import Section, Text


class HubSource(Section):
    hub: Text = Field(description="Dataset id on the hub.")
    config: Text | None = Field(None, description="Configuration of the dataset; null: the default one.")
    split: Text = Field("train", description="Split of the dataset.")


class FolderSource(Section):
    folder: Text = Field(
        description="Folder (or file) with .jsonl, .jsonl.gz or .parquet, also a dataset's as downloaded from the hub."
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


class StdlibSource(Section):
    """The embedded corpus: this Python's own standard library."""

    stdlib: str


Source = HubSource | FolderSource | StdlibSource


def source_kind(value: Any) -> str | None:
    """Which kind of source a value is: hub, folder or stdlib; the discriminator of the unions of sources."""
    if isinstance(value, dict):
        known = [kind for kind in ("hub", "folder", "stdlib") if kind in value]
        return known[0] if len(known) == 1 else None
    kinds = {"hub": HubSource, "folder": FolderSource, "stdlib": StdlibSource}
    return next((kind for kind, section in kinds.items() if isinstance(value, section)), None)


def kind_of_source(stdlib: str) -> Discriminator:
    """Discriminator of a union whose parts are tagged hub, folder and stdlib; `stdlib` is what the last may be."""
    fix = f'write {{"hub": "<dataset id>"}}, {{"folder": "<path>"}} or {{"stdlib": "{stdlib}"}}'
    return Discriminator(source_kind, custom_error_type="source_kind", custom_error_message=fix)


def source_name(source: Source) -> str:
    """Kind and name of a source, e.g. "hub: owner/name"."""
    match source:
        case HubSource():
            return one_line(f"hub: {source.hub}")
        case FolderSource():
            return one_line(f"folder: {source.folder}")
        case StdlibSource():
            return f"stdlib: {source.stdlib}"
