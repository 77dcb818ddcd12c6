"""A lock that a killed compile left behind is named; that of a compile under way is left to its owner."""

import os
import time
from pathlib import Path

import pytest

from toolkit.recipe import RecipeError
from toolkit.training.process_group import LONGEST_COMPILE_SECONDS, check_compiler_locks


@pytest.mark.parametrize("place", ["operation", "py311_cpu/operation"])
def test_only_an_old_lock_is_refused(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / place / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    check_compiler_locks()
    old = time.time() - LONGEST_COMPILE_SECONDS - 1
    os.utime(lock, (old, old))
    with pytest.raises(RecipeError, match=f"{lock}: was left behind by a compile that was killed; remove this file"):
        check_compiler_locks()
