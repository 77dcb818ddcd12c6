"""Ranks that do not come are named; a lock that a killed compile left is removed, that of one under way is not."""

import os
import re
import socket
import threading
import time
from pathlib import Path

import pytest
from distributed import free_port

from toolkit.last_words import OTHER_KEY, store_of_first_rank
from toolkit.recipe import RecipeError
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


def test_what_another_rank_says_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of three does not come but tells why: the first ends with its code, and so does the one that came."""
    place = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise SystemExit

    def come_and_tell() -> None:
        store = store_of_first_rank(20)
        store.set("arrived/1", "node2")
        store.set(OTHER_KEY, "")
        store.wait(["all arrived"])
        told.append(store.get("all arrived").decode())

    told: list[str] = []
    monkeypatch.setattr(process_group.os, "_exit", leave)
    other = threading.Thread(target=come_and_tell)
    other.start()
    with pytest.raises(SystemExit):
        process_group.roll_call()
    other.join()
    assert codes == [2] and told == ["told by another rank"]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_that_do_not_come_are_named(rank: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Rank 0 alone, and rank 1 without it: said at once, given up later, in place of hours of silence."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in ({"RANK": rank, "WORLD_SIZE": "3"} | place).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(process_group, "SECONDS_TO_SAY", 0.5)
    monkeypatch.setattr(process_group, "SECONDS_TO_ARRIVE", 1)
    with pytest.raises(RecipeError) as raised:
        process_group.roll_call()
    host, said = socket.gethostname(), capsys.readouterr().err
    if rank == "0":
        missing = rf"2 of 3 ranks have not come for \d+ s: 1, 2; there are {host} \(1\); "
        assert re.match(f"{missing}waiting for 1 s", said) and re.match(f"{missing}see what", str(raised.value))
    else:
        assert said.startswith(f"rank 1 ({host}): finds no rank 0 at 127.0.0.1:") and "MASTER_ADDR" in str(raised.value)
