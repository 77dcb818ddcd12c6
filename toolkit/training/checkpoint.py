"""Checkpoints of an unfinished stage: written aside, checked, renamed when complete, the newest few kept.

Called by the training loop on all ranks. Only DeepSpeed's own files of this run's folder are read back, and only if
they are byte for byte what was written (manifest_*.json, one for each rank's share of the files).
"""

import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from toolkit.collectives import first_of_any_rank, on_rank_zero, rank, world_size
from toolkit.prepare import on_every_rank
from toolkit.recipe import RecipeError

TAG = "engine"
EXTRA = "objective.safetensors"  # what the objective keeps besides its weights


class RunState(NamedTuple):
    """Where a stage stands after `step` optimizer steps; random state and learning rate follow from the step."""

    step: int
    tokens: int
    stage_digest: str
    data_digest: str
    tokenizer_digests: list[str]  # of the retriever's base and, for Revela, of the language model
    world_size: int


def save_checkpoint(engine: Any, folder: Path, state: RunState, keep: int) -> None:
    """Write `folder`/step_N on all ranks; it appears under that name only when every file is there, on the disk and
    readable. Older ones than the newest `keep` are deleted after that.

    Raises:
        RecipeError: if it cannot be written: no room, no right to write, `folder` gone. The one before is whole.
    """
    final, aside = folder / f"step_{state.step:08d}", folder / f".writing_step_{state.step:08d}"
    try:
        on_every_rank(lambda: _open(aside) if rank() == 0 else None)
        engine.save_checkpoint(str(aside), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
        on_every_rank(lambda: _describe(engine, aside, state) if rank() == 0 else None)
        on_every_rank(lambda: _seal(aside))
        on_every_rank(lambda: _place(aside, final, keep) if rank() == 0 else None)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter
        raise RecipeError(_unwritten(folder, " ".join(str(error).split())[:120])) from None
    except RecipeError as error:
        raise RecipeError(_unwritten(folder, str(error))) from None


def _unwritten(folder: Path, reason: str) -> str:
    return (
        f"{folder}: the checkpoint cannot be written ({reason}); make room there or let it be written, then start the "
        "same command again: it goes on from the checkpoint before"
    )


def _open(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()  # not its parents: a run folder that was taken away does not come back half


def _describe(engine: Any, aside: Path, state: RunState) -> None:
    if extra := engine.module.extra_state():
        save_file({name: tensor.contiguous() for name, tensor in extra.items()}, aside / EXTRA)
    (aside / "run_state.json").write_text(json.dumps(state._asdict(), indent=2) + "\n")


def _share(paths: list[Path]) -> list[Path]:
    """This rank's of them: together the ranks read each once."""
    return sorted(paths)[rank() :: world_size()]


def _seal(aside: Path) -> None:
    """See that this rank's share of the files is on the disk and readable, and write down its sizes and hashes."""
    files = [path for path in aside.rglob("*") if path.is_file() and not path.name.startswith("manifest_")]
    manifest = {}
    for path in _share(files):
        if path.suffix == ".pt":
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:  # the sums that were taken when it was written
                    raise OSError(f"{path.name} does not read back as it was written")
        manifest[path.relative_to(aside).as_posix()] = [path.stat().st_size, _hash(path)]
        _sync(path)
    path = aside / f"manifest_{rank():05d}.json"
    path.write_text(json.dumps(manifest, indent=1) + "\n")
    _sync(path)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _place(aside: Path, final: Path, keep: int) -> None:
    for folder in (aside / TAG, aside):
        _sync(folder)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    _sync(final.parent)
    for old in sorted(final.parent.glob("step_*"))[:-keep]:
        shutil.rmtree(old)


def load_newest(engine: Any, folder: Path, fresh: RunState) -> RunState:
    """Load the newest whole checkpoint into the engine on all ranks; without any, `fresh`: the state before step 0.

    A checkpoint with a file that is missing or not what was written is named, put aside as damaged_step_N, and the one
    before is used.

    Raises:
        RecipeError: on all ranks, if the checkpoint was written by other settings, from other data, with another
            tokenizer or by another number of ranks, cannot be read, or if all there are are damaged.
    """
    found = on_rank_zero(lambda: sorted((str(path) for path in folder.glob("step_*")), reverse=True))
    for place, path in enumerate(map(Path, found)):
        damage = first_of_any_rank(_damage(path))
        if not damage:
            state = on_every_rank(
                lambda path=path: _check(path, fresh)
            )  # before the engine, whose loading is collective
            on_every_rank(lambda path=path: _load(engine, path))
            return state
        if place + 1 == len(found):
            raise RecipeError(f"{damage}; there is no checkpoint before it: delete {folder} to begin the stage anew")
        on_rank_zero(lambda path=path, damage=damage, before=found[place + 1]: _put_aside(path, damage, Path(before)))
    return fresh


def _put_aside(path: Path, damage: str, before: Path) -> None:
    aside = path.with_name(f"damaged_{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    print(f"{damage}; it is now {aside.name}, and {before.name} is used", flush=True)


def _damage(checkpoint: Path) -> str:
    """What is wrong with the files of a checkpoint, of this rank's share; empty if nothing is."""
    manifest: dict[str, list[Any]] = {}
    try:
        parts = sorted(checkpoint.glob("manifest_*.json"))
        for part in parts:
            manifest |= json.loads(part.read_text())
        written = json.loads((checkpoint / "run_state.json").read_text())["world_size"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{checkpoint}: its description cannot be read ({' '.join(str(error).split())[:80]})"
    if len(parts) != written:
        return f"{checkpoint}: {len(parts)} of {written} files manifest_*.json are there"
    for path in _share([checkpoint / name for name in manifest]):
        size, digest = manifest[path.relative_to(checkpoint).as_posix()]
        if not path.is_file():
            return f"{path}: is missing"
        if path.stat().st_size != size:
            return f"{path}: has {path.stat().st_size:,} bytes, {size:,} were written"
        if _hash(path) != digest:
            return f"{path}: is not what was written (sha256)"
    return ""


def _check(newest: Path, fresh: RunState) -> RunState:
    try:
        state = RunState(**json.loads((newest / "run_state.json").read_text()))
    except TypeError:
        raise RecipeError(
            f"{newest}: was written by another version of the toolkit; use that, or another --output"
        ) from None
    if state.stage_digest != fresh.stage_digest:
        raise RecipeError(f"{newest}: was written by other settings; use another --output or delete the folder")
    if state.data_digest != fresh.data_digest:
        raise RecipeError(
            f"{newest}: the data changed since (digest {state.data_digest} then, {fresh.data_digest} now); put the "
            "data back, or choose another --output"
        )
    if state.tokenizer_digests != fresh.tokenizer_digests:
        raise RecipeError(
            f"{newest}: the tokenizer changed since (digest {', '.join(state.tokenizer_digests)} then, "
            f"{', '.join(fresh.tokenizer_digests)} now); put its files back, or choose another --output"
        )
    if state.world_size != fresh.world_size:
        raise RecipeError(
            f"{newest}: was written by {state.world_size} ranks, this run has {fresh.world_size}; start with "
            f"{state.world_size} again"
        )
    return state


def _load(engine: Any, newest: Path) -> None:
    try:
        loaded, _ = engine.load_checkpoint(str(newest), tag=TAG, load_module_strict=False)
        if engine.module.extra_state():
            engine.module.load_extra_state(load_file(newest / EXTRA))
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:80]
        raise RecipeError(f"{newest}: cannot be read ({reason}); delete it to go on from the one before") from None
    if loaded is None:
        raise RecipeError(f"{newest}: DeepSpeed's files are missing; delete it to go on from the one before")
