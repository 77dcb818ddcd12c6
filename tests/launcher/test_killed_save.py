"""A process that dies at any operation of a save, one after the other, leaves a checkpoint to go on from."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process import one_stage, start

from toolkit.checkpoint import states as checkpoint
from toolkit.checkpoint.states import RunState, load_newest, save_checkpoint
from toolkit.recipe.errors import RecipeError
from toolkit.training import loop

OPERATIONS = ("mkdir", "rename", "unlink", "rmdir", "fsync")
STAGE = "stage_0_language_model"


class Killed(BaseException):
    """No handler of the library takes it, and no operation is done after it."""


class Dying:
    """Counts what a save does to the disk, and dies at the operation of this number (counted from 0)."""

    def __init__(self, at: int) -> None:
        self.at, self.names = at, list[str]()

    def before(self, name: str, do: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **more: Any) -> Any:
            self._count(name)
            return do(*args, **more)

        return counted

    def within(self, name: str, write: Callable[..., Any], place: int) -> Callable[..., Any]:
        """Half of the file is there then; `place`: which argument is its path."""

        def counted(*args: Any, **more: Any) -> Any:
            try:
                self._count(name)
            except Killed:
                if len(self.names) == self.at + 1:  # alive until now
                    write(*args, **more)
                    os.truncate(args[place], os.stat(args[place]).st_size // 2)
                raise
            return write(*args, **more)

        return counted

    def _count(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) > self.at:
            raise Killed(name)


def names_until_death(at: int, save: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], bool]:
    """The operations that were begun, and whether the save died."""
    dying = Dying(at)
    with monkeypatch.context() as patched:
        for name in OPERATIONS:
            patched.setattr(os, name, dying.before(name, getattr(os, name)))
        patched.setattr(checkpoint, "save_file", dying.within("save_file", checkpoint.save_file, 1))
        patched.setattr(Path, "write_text", dying.within("write_text", Path.write_text, 0))
        try:
            save()
        except Killed:
            return dying.names, True
    return dying.names, False


@pytest.mark.parametrize("in_order", [True, False])
def test_at_every_operation_of_a_save(in_order: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of three checkpoints goes in the last save; control: deleted before the new one is there."""
    recipe = one_stage(tmp_path, ("stages.0.optim.steps", 3), ("stages.0.save", {"every": 1, "keep": 1}))
    found: list[tuple[list[str], bool, int]] = []

    def save(engine: Any, folder: Path, state: RunState, keep: int) -> None:
        if state.step < 3:
            save_checkpoint(engine, folder, state, keep)
            return
        left, died = tmp_path / "left", True
        while died:
            shutil.rmtree(left, ignore_errors=True)
            shutil.copytree(folder, left)
            names, died = names_until_death(len(found), lambda: saved(engine, left, state, keep), monkeypatch)
            try:
                found.append((names, died, load_newest(engine, left, state._replace(step=0)).step))
            except RecipeError:  # the only one is damaged
                found.append((names, died, 0))
            assert not list(left.glob(".writing_*"))  # what was cut off is cleared away
        save_checkpoint(engine, folder, state, keep)

    def saved(engine: Any, folder: Path, state: RunState, keep: int) -> None:
        if not in_order:
            shutil.rmtree(folder / "step_00000002")
        save_checkpoint(engine, folder, state, keep)

    monkeypatch.setattr(loop, "save_checkpoint", save)
    assert start(tmp_path, recipe, monkeypatch) == 0
    assert json.loads((tmp_path / "run" / STAGE / "done.json").read_text())["steps"] == 3
    (names, _, last), steps = found[-1], [step for _, _, step in found]
    assert {"save_file", "write_text", *OPERATIONS} == set(names) and len(found) == len(names) + 1 and last == 3
    if in_order:
        assert set(steps) == {2, 3} and steps == sorted(steps)
        assert steps.index(3) == names.index("rename") + 1  # from then on the new one is whole
    else:
        assert 0 in steps
