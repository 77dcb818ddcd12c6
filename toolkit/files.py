"""Files and folders that are there whole or not at all, and paths as users write them. Called by whatever has some."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def expanded(name: str | Path) -> Path:
    """A path with ~ and ~user written out; where there is no such user it stays as it is, and names nothing."""
    return Path(os.path.expanduser(name))


def sha256(path: Path) -> str:
    """64 hex digits of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk: a machine that goes down then loses nothing."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def usual_mode(path: Path) -> None:
    """Let those read and write a file who may do so in its folder, as the umask says: safetensors writes mode 0600."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def _sync_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            usual_mode(path)
        sync(path)
    sync(folder)


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that readers see the old or the new one, never a part; also after a power failure."""
    work = path.with_name(f".{path.name}.writing")
    work.write_text(text, encoding="utf-8")
    sync(work)
    os.replace(work, path)
    sync(path.parent)


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
    _sync_all(work)
    if folder.exists():
        os.rename(folder, old)
    os.rename(work, folder)
    sync(folder.parent)
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
        _sync_all(work)
        try:
            os.rename(work, folder)
            sync(folder.parent)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)  # gone already, if it was renamed
