"""Collections of one's own, whose revision is a digest of what they hold; and which split of a folder is meant.

Called by everything that reads a collection from a folder.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.tasks import Task
from toolkit.data.records import Collection
from toolkit.files import sha256
from toolkit.recipe.errors import RecipeError, one_line


def local_task(collection: Collection, task_name: str, split: str, code: bool = False) -> Task:
    """A collection of one's own; queries without judgements are left out, its revision is a digest of its content."""
    judged = {query: collection.queries[query] for query in collection.qrels}
    kept = collection._replace(queries=judged)
    return Task(kept, task_name, "default", split, content_digest(collection), ["eng-Latn"], code=code)


def with_revision(task: Task) -> Task:
    """A folder's collection whose revision tells what its queries may find, too, if anything limits that."""
    limits = {"excluded": task.excluded or {}, "candidates": task.candidates or {}}
    if task.excluded is None and task.candidates is None:
        return task
    return task._replace(revision=content_digest(task.collection, {"answers": task.answers or {}}, limits))


def content_digest(*parts: Mapping[str, Any] | Collection) -> str:
    """16 hex digits of mappings, fed entry by entry."""
    digest = hashlib.sha256()
    for part in parts:
        for name, value in part._asdict().items() if isinstance(part, Collection) else part.items():
            entries = value.items() if isinstance(value, dict) else [("", value)]
            digest.update(json.dumps(name).encode())
            for key, entry in entries:
                digest.update(json.dumps([key, entry]).encode())
    return digest.hexdigest()[:16]


def files_digest(folder: Path) -> str:
    """16 hex digits of the names and contents of a folder's files, hidden ones left out."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            digest.update(json.dumps([name.as_posix(), sha256(path)]).encode())
    return digest.hexdigest()[:16]


def choose_split(folder: Path, splits: list[str], wanted: str | None) -> str:
    """The split that is wanted; otherwise test, or the only one."""
    if wanted is None:
        wanted = "test" if "test" in splits else splits[0] if len(splits) == 1 else None
    if wanted not in splits:
        found = ", ".join(f"{folder}:{s}" for s in splits) or "none (a split is a file qrels/NAME.tsv)"
        raise RecipeError(one_line(f"{folder}: name one of its splits; found {found}"))
    return wanted
