"""Files and folders that are there whole or not at all, and paths as users write them. Called by whatever has some."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def expanded(name: str | Path) -> Path:
    """A path with ~ and ~user written out; where there is no such user it stays as it is, and names nothing."""
    return Path(os.path.expanduser(name))


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that readers see the old or the new one, never a part."""
    work = path.with_name(f".{path.name}.writing")
    work.write_text(text, encoding="utf-8")
    os.replace(work, path)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `folder` when the block ends well."""
    work = folder.with_name(f".{folder.name}.writing")
    old = folder.with_name(f".{folder.name}.old")
    for leftover in (work, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    work.mkdir(parents=True)
    yield work
    if folder.exists():
        os.rename(folder, old)
    os.rename(work, folder)
    if old.exists():
        shutil.rmtree(old)


def aside(path: Path) -> Path:
    """A hidden name beside `path` that no other run has."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


@contextmanager
def placing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that becomes `folder` when the block ends well, unless another run was first; else it goes.

    A process that is killed leaves it as `.<name>.<32 hex digits>`, for the user to delete.
    """
    work = aside(folder)
    work.mkdir(parents=True)
    try:
        yield work
        try:
            os.rename(work, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)  # gone already, if it was renamed
