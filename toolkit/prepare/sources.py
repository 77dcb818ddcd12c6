"""What a stage's sources hold, told by their content: the keys of the caches in <run>/../prepared.

Called on rank 0 by everything that prepares texts or pairs.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.data.faults import say_skipped
from toolkit.data.pair_records import content_hash, pair_fingerprint
from toolkit.files import aside, placing_folder
from toolkit.recipe.errors import RecipeError
from toolkit.recipe.sources import FolderSource, Source, source_name


class KnownSource(NamedTuple):
    """A source and what it held when it was looked at."""

    source: Source
    fingerprint: list[Any]
    content: str  # hash


def known_sources(sources: Iterable[Source], cache: Path) -> list[KnownSource]:
    """Sources of any format with their content hashes; makes the folder `cache` if need be.

    Hashes of files are remembered in `cache`, so that files whose names, sizes and times are as they were then are not
    read again.

    Raises:
        RecipeError: for files that are missing, cannot be read, or change while they are read; no access to the hub.
    """
    cache.mkdir(parents=True, exist_ok=True)
    found = [(source, pair_fingerprint(source)) for source in sources]
    return [KnownSource(*each, _content(*each, cache)) for each in found]


def check_unchanged(known: Iterable[KnownSource]) -> None:
    """Raise RecipeError if a source is not as it was when its content was taken; called once it has been read."""
    for source, fingerprint, _ in known:
        _check(source, fingerprint)


def prepared_folder(
    kind: str,
    sources: Iterable[Source],
    run: Path,
    key: Callable[[list[str]], str],
    write: Callable[[Path], str],
) -> Path:
    """The folder in <run>/../prepared that holds what is made of sources; made now if it is not there yet.

    Every run that uses it says which rows were left out.

    Args:
        kind: how its name begins.
        key: hash of each source's content -> the rest of its name.
        write: into an empty folder; returns what is printed once the folder is there.

    Raises:
        RecipeError: as `known_sources` and `write`, and for a source that changes meanwhile.
    """
    cache = run.parent / "prepared"
    known = known_sources(sources, cache)
    folder = cache / f"{kind}_{key([source.content for source in known])}"
    if not folder.is_dir():
        with placing_folder(folder) as work:
            said = write(work)
            check_unchanged(known)
        print(said, flush=True)
    say_skipped(folder)
    return folder


def _content(source: Source, fingerprint: list[Any], cache: Path) -> str:
    if not isinstance(source, FolderSource):
        return content_hash(source)
    key = hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()[:16]
    remembered = cache / f"content_{key}.json"
    if remembered.is_file():
        try:
            return json.loads(remembered.read_text(encoding="utf-8"))["content"]
        except (ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"{remembered}: is damaged ({error}); delete it, and it is made again") from None
    content = content_hash(source)
    _check(source, fingerprint)
    work = aside(remembered)
    work.write_text(json.dumps({"files": fingerprint, "content": content}) + "\n", encoding="utf-8")
    os.replace(work, remembered)
    return content


def _check(source: Source, fingerprint: list[Any]) -> None:
    if pair_fingerprint(source) != fingerprint:
        raise RecipeError(f"data.sources: {source_name(source)} changed while it was read; start again when it is done")
