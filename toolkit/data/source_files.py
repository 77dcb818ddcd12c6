"""Which files of a folder a source reads: all of them, or those of its split and configuration.

Called by the readers of records and of pairs; evaluation asks too whether a folder is laid out as the hub does.
"""

import os
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from toolkit.data.faults import listed
from toolkit.files import expanded
from toolkit.recipe.errors import RecipeError, one_line
from toolkit.recipe.graded import FolderGraded
from toolkit.recipe.sources import FolderSource

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
# Of files that hold data too, and are not read; but for what libraries write beside data.
OTHER_SUFFIXES = (".json", ".csv", ".tsv", ".txt", ".arrow", ".zst", ".xz", ".bz2", ".zip", ".gz")
DESCRIPTIONS = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "mined.json",
    "generated.json",
)
DESCRIPTIONS += ("license.txt", "readme.txt")

# The words by which the datasets library tells the split of a file from its name or its folder's, and some more.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trainset", "trn"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val", "devset"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "testset", "tst", "holdout", "heldout"), "test"),
}
_BETWEEN_WORDS = re.compile(r"[-._ 0-9]+")
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*")  # the library's own name for a file of any split


def source_files(source: FolderSource) -> list[Path]:
    """The data files that a folder source reads, sorted; of a folder in BEIR layout the corpus alone, or the
    graded rows beside it, passages.jsonl.

    Of a folder that lies as it came from the hub, with configurations in its README.md, these are the files that the
    datasets library would read. Elsewhere they are the files of the folder or, where it has none, those below it; words
    such as train or dev in their names are their splits.

    Raises:
        RecipeError: for no such folder or file, for files of several splits of which the source names none, and for a
            split or configuration that is not there.
    """
    path, named = expanded(source.folder), one_line(source.folder)
    if os.path.isfile(path) and path.name.endswith(SUFFIXES):
        for key, value in (("split", source.split), ("config", source.config)):
            if value is not None and (key, value) != ("split", "train"):  # the default of earlier versions
                raise RecipeError(f"data.sources: {named} is one file, which has no {key}; set {key} to null")
        return [path]
    if not os.path.isdir(path):
        problem = "is no .jsonl, .jsonl.gz or .parquet file" if os.path.exists(path) else "does not exist"
        raise RecipeError(f"data.sources: {named} {problem}; name a folder or file of .jsonl, .jsonl.gz or .parquet")
    try:
        top = [p for p in data_files(path) if p.parent == path]
        names = {p.name.split(".")[0] for p in top}
        if {"corpus", "queries"} <= names and source.config is None and source.split in (None, "train"):
            part = "passages" if isinstance(source, FolderGraded) and "passages" in names else "corpus"
            return [p for p in top if p.name.split(".")[0] == part]
        if is_hub_layout(path):
            return _chosen(named, _hub_splits(path, named, source.config), [], source.split)
        files = top or data_files(path)
    except OSError as error:
        raise RecipeError(f"data.sources: {named}: cannot be read ({error.strerror}); mend its rights") from None
    if not files:
        raise RecipeError(f"data.sources: {named} holds no .jsonl, .jsonl.gz or .parquet file; put the data there")
    if source.config is not None:
        fix = "set config to null, or name the folder below that you mean"
        raise RecipeError(f"data.sources: {named} has no README.md with configs; {fix}")
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file.relative_to(path)), []).append(file)
    return _chosen(named, splits, splits.pop("", []), source.split)


def data_files(folder: Path) -> list[Path]:
    """Every file of a known suffix in a folder and below it, sorted; nothing hidden. Raises OSError."""
    found = []
    for place, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place) / name for name in names if name.endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(file for file in found if file.is_file())


def other_files(read: Iterable[Path]) -> list[str]:
    """Names of files of data in other formats beside those that are read, sorted."""
    beside = {path.parent for path in read}
    names = {path.name for folder in beside for path in folder.iterdir() if path.is_file()}
    names = {name for name in names if name.lower().endswith(OTHER_SUFFIXES) and not name.endswith(SUFFIXES)}
    return sorted(name for name in names if name.lower() not in DESCRIPTIONS and not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def is_hub_layout(folder: Path) -> bool:
    """Whether a folder holds a dataset as the hub does: its README.md lists configurations."""
    readme = folder / "README.md"
    if not readme.is_file():
        return False
    head = readme.read_text(encoding="utf-8", errors="replace").split("---")
    return len(head) > 2 and any(line.startswith("configs:") for line in head[1].splitlines())


def _split_of(name: Path) -> str:
    """The split that a file's name below its source's folder says; empty if it says none."""
    if shard := _SHARD.fullmatch(name.as_posix()):
        return shard[1]
    words = [word for part in name.parts for word in _BETWEEN_WORDS.split(part.lower())]
    words += [first + second for first, second in pairwise(words) if second == "out"]  # hold_out, held-out
    return next((word for word in words if word in SPLIT_WORDS), "")


def _chosen(named: str, splits: dict[str, list[Path]], rest: list[Path], wanted: str | None) -> list[Path]:
    """The files of the split that is wanted; of a folder without splits, or with one and nothing else, all of them."""
    if wanted is None:
        if len(splits) + bool(rest) == 1:
            return next(iter(splits.values()), rest)
        found = [f"{split}: {_names(files)}" for split, files in splits.items()]
        found += [f"of no split: {_names(rest)}"] if rest else []
        fix = f"set split to {' or '.join(splits)}, or name a file in place of the folder"
        raise RecipeError(one_line(f"data.sources: {named} holds files of several splits ({'; '.join(found)}); {fix}"))
    if wanted == "train" and not splits:  # the default of earlier versions, where no name says a split
        return rest
    alike = [split for split in splits if SPLIT_WORDS.get(split) == wanted]  # dev for validation
    files = [file for split in ([wanted] if wanted in splits else alike) for file in splits[split]]
    if not files:
        fix = f"set split to {' or '.join(splits)}" if splits else f"no name of {_names(rest)} says one; set it to null"
        raise RecipeError(one_line(f"data.sources: {named} has no split {wanted!r}; {fix}"))
    return sorted(files)


def _names(files: Iterable[Path]) -> str:
    return listed(file.name for file in files)


def _hub_splits(folder: Path, named: str, config: str | None) -> dict[str, list[Path]]:
    """Split -> files of a configuration, as the datasets library resolves them; it reads README.md and file names."""
    import datasets  # here, since it is slow to import and needed for this layout alone

    try:
        known = sorted(datasets.get_dataset_config_names(str(folder)))
        config = config or datasets.get_dataset_default_config_name(str(folder))
        if config not in known:
            problem = "has several configurations" if config is None else f"has no configuration {config!r}"
            raise RecipeError(one_line(f"data.sources: {named} {problem}; set config to {' or '.join(known)}"))
        with TemporaryDirectory() as cache:  # the library makes one, though nothing is read yet
            found = datasets.load_dataset_builder(str(folder), config, cache_dir=cache).config.data_files or {}
    except RecipeError:
        raise
    except Exception as error:  # the library raises half a dozen unrelated types here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        fix = "mend the configs there, or name a file in place of the folder"
        raise RecipeError(one_line(f"data.sources: {named}: README.md cannot be followed ({reason}); {fix}")) from None
    splits = {str(split): [Path(os.path.normpath(file)) for file in files] for split, files in found.items()}
    root = folder.resolve()
    others = [f for files in splits.values() for f in files if not f.is_relative_to(root)]
    others += [f for files in splits.values() for f in files if not f.name.endswith(SUFFIXES)]
    if others:
        fix = "only .jsonl, .jsonl.gz and .parquet files of the folder itself are read; convert them"
        raise RecipeError(one_line(f"data.sources: {named}: configuration {config} names {_names(others)}; {fix}"))
    return splits
