"""What is finished, on disk: a journal with a line for each finished item, which no kill can halve or double.

Called by every kind of generation. The journal lies in <output>/.journal/: run.json says what it was begun with,
part_<rank>.jsonl holds what that rank has finished, .lock the process that works there.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.files import replace_text, sync
from toolkit.ranks.lock import locked
from toolkit.recipe.errors import RecipeError, one_line

JOURNAL = ".journal"
_RUN = "run.json"


class Place(NamedTuple):
    """Where the line of an item begins."""

    part: Path
    offset: int
    kept: bool


@contextmanager
def held(output: Path) -> Iterator[None]:
    """The folder for this process alone; it is made if it is not there.

    Raises:
        RecipeError: if another process holds it, it cannot be written, or it holds something else.
    """
    try:
        others = [path.name for path in output.iterdir()] if output.is_dir() else []
        if others and JOURNAL not in others:
            raise RecipeError(
                f"{output}: is there already, without what a generation goes on from; choose another --output"
            )
        (output / JOURNAL).mkdir(parents=True, exist_ok=True)
        lock = locked(output / JOURNAL)
    except OSError as error:
        raise RecipeError(f"{output}: cannot be written ({error.strerror}); choose another --output") from None
    with lock:
        yield


def begun_with(output: Path) -> dict[str, Any] | None:
    """What `write_run` kept of the generation in this folder; None if there is none yet.

    Raises:
        RecipeError: if the file is damaged.
    """
    path = output / JOURNAL / _RUN
    if not path.is_file():
        if not is_empty(output):
            raise RecipeError(f"{path}: is gone, though something is finished; put it back, or choose another --output")
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{path}: is damaged ({error}); choose another --output") from None
    if not isinstance(found, dict) or "begun_with" not in found:
        raise RecipeError(f"{path}: is damaged (it does not say begun_with); choose another --output")
    return found


def check_same(output: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """RecipeError that names everything in which this generation is not the one that the folder holds."""
    differing = [key for key in wanted if key not in found or found[key] != wanted[key]]
    if differing:
        named = ", ".join(f"{key} {_short(found.get(key))}, now {_short(wanted[key])}" for key in differing)
        raise RecipeError(
            f"{output}: was begun with {named}; go on with what it was begun with, or choose another --output"
        )


def _short(value: Any) -> str:
    return one_line(value if isinstance(value, str) else json.dumps(value), 60)


def write_run(output: Path, run: dict[str, Any]) -> None:
    """Keep what the generation was begun with."""
    with writing(output):
        replace_text(output / JOURNAL / _RUN, json.dumps(run, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turns what the disk refuses, as when it is full, into a RecipeError with the fix."""
    try:
        yield
    except OSError as error:
        fix = "what is finished is kept; mend that, and the same command goes on"
        raise RecipeError(f"{place}: cannot be written ({error.strerror}); {fix}") from None


class Part:
    """The file to which one rank appends what it has finished; a line is on the disk when `append` returns."""

    def __init__(self, output: Path, number: int) -> None:
        self._path = output / JOURNAL / f"part_{number:05d}.jsonl"
        with writing(self._path):
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            sync(self._path.parent)

    def append(self, record: dict[str, Any]) -> None:
        """Raises RecipeError if it cannot be written; what is left of the line then is cut off at the next start."""
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        with writing(self._path):
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


def parts(output: Path) -> list[Path]:
    return sorted((output / JOURNAL).glob("part_*.jsonl"))


def mend(output: Path) -> None:
    """Cut off what a kill left of a line at the end of a part. For the one process that holds the folder."""
    for path in parts(output):
        whole = _whole_bytes(path)
        if whole < path.stat().st_size:
            os.truncate(path, whole)
            sync(path)


def _whole_bytes(path: Path) -> int:
    """Bytes up to the end of the last line that is whole."""
    end = last = 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                last, end = end, end + len(line)
        if end > 0:
            file.seek(last)
            if _parsed(file.read(end - last)) is None:  # its blocks did not all reach the disk
                return last
    return end


def is_empty(output: Path) -> bool:
    """Whether nothing is finished yet, once the parts are mended."""
    return all(path.stat().st_size == 0 for path in parts(output))


def finished(output: Path) -> dict[str, Place]:
    """Id -> the place of its line, of all parts.

    Raises:
        RecipeError: for a line that is damaged, or an item that stands there twice.
    """
    found: dict[str, Place] = {}
    for path in parts(output):
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                record = _parsed(line)
                if record is None or record["id"] in found:
                    what = "is damaged" if record is None else f"holds {one_line(repr(record['id']), 60)} a second time"
                    raise RecipeError(f"{path}: line {number} {what}; delete the line, and it is asked for again")
                found[record["id"]] = Place(path, offset, record["kept"])
                offset += len(line)
    return found


def records(places: Iterable[Place]) -> Iterator[dict[str, Any]]:
    """The lines at these places, in their order; holds one at a time."""
    files: dict[Path, Any] = {}
    try:
        for part, offset, _ in places:
            if part not in files:
                files[part] = part.open("rb")
            files[part].seek(offset)
            yield json.loads(files[part].readline())
    finally:
        for file in files.values():
            file.close()


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None if it holds none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    there = isinstance(record, dict) and isinstance(record.get("id"), str) and isinstance(record.get("kept"), bool)
    return record if there else None
