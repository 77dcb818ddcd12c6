"""Worker: checkpoints of two ranks, of which a file is altered or a save fails on one rank; the answer is JSON."""

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import models_at, random_crops, stage_of

from toolkit.checkpoint import states as checkpoint
from toolkit.checkpoint.states import RunState, load_newest, save_checkpoint
from toolkit.collectives import gather_texts, on_rank_zero, rank, world_size
from toolkit.ranks.last_words import end
from toolkit.ranks.process_group import start_distributed
from toolkit.recipe.errors import RecipeError
from toolkit.training.engine import build_engine, train_step

FRESH = RunState(0, 0, 0, "stage", "data", ["tokenizer"], ["model"])
FAILING = {"_save": 1, "_seal": 1, "_open": 0, "_place": 0}  # what a save calls -> the rank on which it fails


def copied(source: Path, place: Path, altered: str | None = None) -> Path:
    """A copy, one bit of a file altered; called on all ranks."""

    def copy() -> None:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source, place)
        if altered is not None:
            flip(place / altered)

    on_rank_zero(copy)
    return place


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def loaded(engine: Any, folder: Path) -> dict[str, Any]:
    """Which step every rank finds, what rank 0 says of it, and what then is in the folder.

    Rank 0 alone looks there: it removes the folder for the next case as soon as the steps are gathered.
    """
    with contextlib.redirect_stdout(io.StringIO()) as said:
        state = load_newest(engine, folder, FRESH)
    steps = [json.loads(text) for text in gather_texts(json.dumps(state.step))]
    left = on_rank_zero(lambda: sorted(path.name for path in folder.iterdir()))
    return {"steps": steps, "said": said.getvalue(), "left": left}


def failing(engine: Any, folder: Path, name: str) -> dict[str, Any]:
    """What every rank raises where one of them has no room, and what can be loaded then."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    whole: Callable[..., Any] = getattr(checkpoint, name)
    try:
        if rank() == FAILING[name]:
            setattr(checkpoint, name, full)
        save_checkpoint(engine, folder, FRESH._replace(step=3), keep=1)
        raised = ""
    except RecipeError as error:
        raised = str(error)
    finally:
        setattr(checkpoint, name, whole)
    return {"raised": gather_texts(raised)} | loaded(engine, folder)


def main() -> None:
    request = json.loads(Path(sys.argv[-2]).read_text())
    start_distributed()
    stage = stage_of("recontriever", lora=None, zero__stage=2, optim__lr=1e-2, optim__clip=1.0, optim__steps=4)
    engine = build_engine(stage, 3, torch.device("cpu"), models_at(Path(request["folder"])))
    source, place = Path(request["checkpoints"]), Path(request["checkpoints"] + "_copy")
    on_rank_zero(source.mkdir)
    for step in (1, 2):
        pools = random_crops(2 * world_size(), stage.batch.pool, 3, seed=step)
        train_step(engine, stage, pools[rank() :: world_size()], step - 1, 3, 0.0, torch.device("cpu"))
        save_checkpoint(engine, source, FRESH._replace(step=step), keep=2)
    answer: dict[str, Any] = {"whole": loaded(engine, copied(source, place)), "damaged": {}, "failing": {}}
    for file in on_rank_zero(lambda: sorted(path.name for path in (source / "step_00000002").iterdir())):
        answer["damaged"][file] = loaded(engine, copied(source, place, f"step_00000002/{file}"))
    for name in FAILING:
        answer["failing"][name] = failing(engine, copied(source, place), name)
    if rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
    end(0)
