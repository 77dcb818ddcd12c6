"""A lock that a killed compile left behind is removed; that of a compile under way is left to its owner."""

import os
import threading
import time
from pathlib import Path

import pytest

from toolkit.training import process_group
from toolkit.training.process_group import LONGEST_COMPILE_SECONDS, clear_compiler_locks


@pytest.fixture(params=["operation", "py311_cpu/operation"])
def lock(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / request.param / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    return lock


def aged(lock: Path) -> None:
    old = time.time() - LONGEST_COMPILE_SECONDS - 1
    os.utime(lock, (old, old))


def test_an_old_lock_of_nobody_is_removed(lock: Path) -> None:
    aged(lock)
    clear_compiler_locks()
    assert not lock.exists()


def test_a_lock_that_a_process_holds_is_left_alone(lock: Path) -> None:
    aged(lock)
    with lock.open():
        clear_compiler_locks()
    assert lock.exists()


def test_a_young_lock_of_nobody_is_waited_for(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "LONGEST_COMPILE_SECONDS", 1)
    began = lock.stat().st_mtime
    clear_compiler_locks()
    assert not lock.exists() and time.time() - began >= 1
    lock.touch()
    monkeypatch.setattr(process_group, "LONGEST_COMPILE_SECONDS", 60)
    owner = threading.Timer(1, lock.unlink)
    owner.start()
    clear_compiler_locks()
    owner.join()
    assert not lock.exists()
