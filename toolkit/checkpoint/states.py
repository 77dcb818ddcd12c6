"""Checkpoints of an unfinished stage: written aside, checked, renamed when complete, the newest few kept.

Called by the training loop on all ranks. The files are safetensors and JSON, the same for any number of ranks; they are
read back only if they are byte for byte what was written (manifest_*.json, one for each rank's share of the files).
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from toolkit.checkpoint.shares import KEYS, Piece, begin, pieces, refresh, steps_taken
from toolkit.collectives import first_of_any_rank, on_rank_zero, rank, world_size
from toolkit.files import sha256, sync, usual_mode
from toolkit.ranks.together import on_every_rank
from toolkit.recipe.errors import RecipeError

EXTRA = "objective.safetensors"  # what the objective keeps besides its weights
FILE_BYTES = 2**30  # of a file with a rank's pieces, about; they are in memory together


class RunState(NamedTuple):
    """Where a stage stands after `step` optimizer steps; random state and learning rate follow from the step."""

    step: int
    skipped: int  # of these, left out for a loss or gradient that was not finite
    tokens: int
    stage_digest: str
    data_digest: str
    tokenizer_digests: list[str]  # of the retriever's base and of the models beside it
    model_digests: list[str]  # the same: frozen weights are in no checkpoint


# --------------------------------------------------------------------------- writing


def save_checkpoint(engine: Any, folder: Path, state: RunState, keep: int) -> None:
    """Write `folder`/step_N on all ranks; it appears under that name only when every file is there, on the disk and
    readable. Older ones than the newest `keep` are deleted after that.

    Raises:
        RecipeError: if it cannot be written: no room, no right to write, `folder` gone. The one before is whole.
    """
    final, aside = folder / f"step_{state.step:08d}", folder / f".writing_step_{state.step:08d}"
    try:
        on_every_rank(lambda: _open(aside) if rank() == 0 else None)
        on_every_rank(lambda: _seal(aside, _write(engine, aside, state)))
        on_every_rank(lambda: _place(aside, final, keep) if rank() == 0 else None)
    except RecipeError as error:
        raise RecipeError(
            f"{folder}: the checkpoint cannot be written ({error}); make room there or let it be written, then start "
            "the same command again: it goes on from the checkpoint before"
        ) from None


def _open(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()  # not its parents: a run folder that was taken away does not come back half


def _write(engine: Any, aside: Path, state: RunState) -> list[Path]:
    """Write this rank's files, and read back what is in them."""
    if steps_taken(engine) == 0:  # no step was applied yet: DeepSpeed makes the moments in the first
        begin(engine, 0)
    written = []
    for number, tensors in enumerate(_groups(engine)):
        written.append(_save(aside / f"weights_{rank():05d}_{number:03d}.safetensors", tensors))
    if rank() == 0:
        if extra := engine.module.extra_state():
            written.append(_save(aside / EXTRA, {name: tensor.contiguous() for name, tensor in extra.items()}))
        written.append(aside / "run_state.json")
        described = {"ranks": world_size(), "adam_steps": steps_taken(engine), **state._asdict()}
        written[-1].write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return written


def _groups(engine: Any) -> Iterator[dict[str, Tensor]]:
    """This rank's pieces, "weight/<parameter>@<first element>" and its moments, some FILE_BYTES at a time."""
    group: dict[str, Tensor] = {}
    for piece in pieces(engine):
        if piece.own:
            group |= {f"{key}/{piece.name}@{piece.start}": piece.read(key).to("cpu", copy=True) for key in KEYS}
        if sum(tensor.nbytes for tensor in group.values()) >= FILE_BYTES:
            yield group
            group = {}
    if group:
        yield group


def _save(path: Path, tensors: dict[str, Tensor]) -> Path:
    try:
        save_file(tensors, path)
        usual_mode(path)
        with safe_open(path, "pt") as file:
            same = all(torch.equal(file.get_tensor(name), tensor.cpu()) for name, tensor in tensors.items())
    except SafetensorError as error:
        raise OSError(" ".join(str(error).split())) from None
    if not same:
        raise OSError(f"{path.name} does not read back as it was written")
    return path


def _seal(aside: Path, files: list[Path]) -> None:
    """Write down sizes and hashes of this rank's files, which are on the disk then."""
    manifest = {}
    for path in files:
        sync(path)
        manifest[path.name] = [path.stat().st_size, sha256(path)]
    path = aside / f"manifest_{rank():05d}.json"
    path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sync(path)


def _place(aside: Path, final: Path, keep: int) -> None:
    sync(aside)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    sync(final.parent)
    for old in sorted(final.parent.glob("step_*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)  # the new one is whole, whatever becomes of the old


# --------------------------------------------------------------------------- reading


def load_newest(engine: Any, folder: Path, fresh: RunState) -> RunState:
    """Load the newest whole checkpoint into the engine on all ranks; without any, `fresh`: the state before step 0.

    A checkpoint with a file that is missing or not what was written is named, put aside as damaged_step_N, and the one
    before is used.

    Any number of ranks may have written it: rows, losses and, but for rounding, weights go on as they were.

    Raises:
        RecipeError: on all ranks, if the checkpoint was written by other settings, from other data, model or
            tokenizer, cannot be read, or if all there are are damaged.
    """
    found = on_rank_zero(lambda: _complete(folder))
    for place, path in enumerate(map(Path, found)):
        damage = first_of_any_rank(_damage(path))
        if not damage:
            state = on_every_rank(lambda path=path: _check(path, fresh))
            on_every_rank(lambda path=path: _load(engine, path))
            refresh(engine)
            return state
        if place + 1 == len(found):
            raise RecipeError(f"{damage}; there is no checkpoint before it: delete {folder} to begin the stage anew")
        on_rank_zero(lambda path=path, damage=damage, before=found[place + 1]: _put_aside(path, damage, Path(before)))
    return fresh


def _complete(folder: Path) -> list[str]:
    """Checkpoints from the newest, once what a killed save left is cleared away."""
    for cut_off in folder.glob(".writing_step_*"):
        shutil.rmtree(cut_off)
    return sorted((str(path) for path in folder.glob("step_*")), reverse=True)


def _put_aside(path: Path, damage: str, before: Path) -> None:
    aside = path.with_name(f"damaged_{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    print(f"{damage}; it is now {aside.name}, and {before.name} is used", flush=True)


def _damage(checkpoint: Path) -> str:
    """What is wrong with the files of a checkpoint, of this rank's share; empty if nothing is."""
    manifest: dict[str, tuple[int, str]] = {}
    try:
        parts = sorted(checkpoint.glob("manifest_*.json"))
        for part in parts:
            for name, (size, digest) in json.loads(part.read_text()).items():
                manifest[name] = (int(size), str(digest))
        written = _description(checkpoint)["ranks"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{checkpoint}: its description cannot be read ({' '.join(str(error).split())[:80]})"
    if len(parts) != written:
        return f"{checkpoint}: {len(parts)} of {written} files manifest_*.json are there"
    read = {path.name for path in (*checkpoint.glob("weights_*.safetensors"), *checkpoint.glob(EXTRA))}
    if unlisted := sorted((read | {"run_state.json"}) - set(manifest)):
        return f"{checkpoint / unlisted[0]}: is in no file manifest_*.json"
    for path in [checkpoint / name for name in sorted(manifest)][rank() :: world_size()]:  # each is read once
        size, digest = manifest[path.name]
        try:
            if not path.is_file():
                return f"{path}: is missing"
            if path.stat().st_size != size:
                return f"{path}: has {path.stat().st_size:,} bytes, {size:,} were written"
            if sha256(path) != digest:
                return f"{path}: is not what was written (sha256)"
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror})"
    return ""


def _description(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "run_state.json").read_text(encoding="utf-8"))


def _check(newest: Path, fresh: RunState) -> RunState:
    described = _description(newest)
    try:
        state = RunState(**{name: value for name, value in described.items() if name not in ("ranks", "adam_steps")})
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
    if state.model_digests != fresh.model_digests:
        raise RecipeError(
            f"{newest}: the model that the stage starts from changed since (digest {', '.join(state.model_digests)} "
            f"then, {', '.join(fresh.model_digests)} now); put its files back, or choose another --output"
        )
    return state


def _load(engine: Any, newest: Path) -> None:
    """Fill this rank's pieces from whatever files hold them."""
    try:
        begin(engine, _description(newest)["adam_steps"])
        files = [safe_open(path, "pt") for path in sorted(newest.glob("weights_*.safetensors"))]
        held: dict[str, list[tuple[int, Any]]] = {}  # "weight/<parameter>" -> first element and what holds it
        for file in files:
            for name in file.keys():  # noqa: SIM118 (no dict)
                held.setdefault(name.rpartition("@")[0], []).append(
                    (int(name.rpartition("@")[2]), file.get_slice(name))
                )
        for piece in pieces(engine):
            for key in KEYS:
                piece.write(key, _assembled(piece, held.get(f"{key}/{piece.name}", [])))
        if engine.module.extra_state():
            engine.module.load_extra_state(load_file(newest / EXTRA))
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:80]
        raise RecipeError(f"{newest}: cannot be read ({reason}); delete it to go on from the one before") from None


def _assembled(piece: Piece, held: list[tuple[int, Any]]) -> Tensor:
    """The elements of a piece from runs of the same parameter, which may be cut otherwise."""
    parts, end = [], piece.start
    for first, run in sorted(held, key=lambda part: part[0]):
        size = run.get_shape()[0]
        if first <= end < first + size and end < piece.start + piece.size:
            parts.append(run[end - first : piece.start + piece.size - first])
            end += len(parts[-1])
    if end != piece.start + piece.size:
        raise ValueError(f"elements {end} to {piece.start + piece.size} of {piece.name} are missing")
    return torch.cat(parts)
