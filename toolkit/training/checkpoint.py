"""Checkpoints of an unfinished stage: written aside, renamed when complete, the newest few kept.

Called by the training loop on all ranks. Only DeepSpeed's own files of this run's folder are read back.
"""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from toolkit.collectives import barrier, on_rank_zero, rank, world_size
from toolkit.prepare import on_every_rank
from toolkit.recipe import RecipeError

TAG = "engine"
EXTRA = "objective.safetensors"  # what the objective keeps besides its weights
_FALL_BACK = "delete this checkpoint to go on from the one before"


class RunState(NamedTuple):
    """Where a stage stands after `step` optimizer steps; random state and learning rate follow from the step."""

    step: int
    tokens: int
    stage_digest: str
    data_digest: str
    tokenizer_digests: list[str]  # of the retriever's base and, for Revela, of the language model
    world_size: int


def save_checkpoint(engine: Any, folder: Path, state: RunState, keep: int) -> None:
    """Write `folder`/step_N on all ranks; it appears under that name only when every file is there."""
    final, aside = folder / f"step_{state.step:08d}", folder / f".writing_step_{state.step:08d}"
    if rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    barrier()
    engine.save_checkpoint(str(aside), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
    barrier()
    if rank() == 0:
        if extra := engine.module.extra_state():
            save_file({name: tensor.contiguous() for name, tensor in extra.items()}, aside / EXTRA)
        (aside / "run_state.json").write_text(json.dumps(state._asdict(), indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        for old in sorted(folder.glob("step_*"))[:-keep]:
            shutil.rmtree(old)
    barrier()


def load_newest(engine: Any, folder: Path, fresh: RunState) -> RunState:
    """Load the newest checkpoint into the engine on all ranks; `fresh`, the state before step 0, if there is none.

    Raises:
        RecipeError: on all ranks, if the checkpoint was written by other settings, from other data, with another
            tokenizer or by another number of ranks, or cannot be read.
    """
    newest = on_rank_zero(lambda: max((str(path) for path in folder.glob("step_*")), default=None))
    if newest is None:
        return fresh
    state = on_every_rank(lambda: _check(Path(newest), fresh))  # before the engine, whose loading is collective
    on_every_rank(lambda: _load(engine, Path(newest)))
    return state


def _check(newest: Path, fresh: RunState) -> RunState:
    try:
        state = RunState(**json.loads((newest / "run_state.json").read_text()))
    except (OSError, ValueError, TypeError):
        raise RecipeError(f"{newest}: run_state.json cannot be read; {_FALL_BACK}") from None
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
    for path in sorted((newest / TAG).glob("*.pt"))[rank() :: world_size()]:
        if not zipfile.is_zipfile(path):  # its directory stands at the end of the file
            raise RecipeError(f"{path}: is cut short; {_FALL_BACK}")
    return state


def _load(engine: Any, newest: Path) -> None:
    try:
        loaded, _ = engine.load_checkpoint(str(newest), tag=TAG, load_module_strict=False)
        if engine.module.extra_state():
            engine.module.load_extra_state(load_file(newest / EXTRA))
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:80]
        raise RecipeError(f"{newest}: cannot be read ({reason}); {_FALL_BACK}") from None
    if loaded is None:
        raise RecipeError(f"{newest}: DeepSpeed's files are missing; {_FALL_BACK}")
