"""Ranks that do not come are named; a lock that a killed compile left is removed, that of one under way is not."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from distributed import free_port
from torch.distributed import DistError, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from toolkit.ranks import process_group, roll_call
from toolkit.ranks.last_words import OTHER_KEY, store_of_first_rank
from toolkit.ranks.process_group import LONGEST_COMPILE_SECONDS, clear_compiler_locks
from toolkit.ranks.watch import LOST
from toolkit.recipe.errors import RecipeError


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
    """One of three does not come but tells why: the first ends with its code, and says so to the one that came."""
    place = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise SystemExit

    def come_and_tell() -> None:
        store = TCPStore("127.0.0.1", int(place["MASTER_PORT"]), wait_for_workers=False)
        store.set("arrived/1", "node2")
        store.set(OTHER_KEY, "")
        store.wait(["all arrived"])
        told.append(store.get("all arrived").decode())

    told: list[str] = []
    monkeypatch.setattr(roll_call.os, "_exit", leave)
    other = threading.Thread(target=come_and_tell)
    other.start()
    with pytest.raises(SystemExit):
        roll_call.roll_call()
    other.join()
    assert codes == [2] and told == ["told by another rank"]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", free_port())
    first = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), 3, is_master=True, wait_for_workers=False)
    first.set("all arrived", told[0])
    with pytest.raises(SystemExit):
        roll_call.roll_call()
    assert codes == [2, 2]


def test_a_start_that_another_rank_holds_up_ends(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Rank 0 is frozen with its store: torch's own timeout does not come, ours does; not where it is in time."""
    opened = "store = TCPStore('127.0.0.1', 0, 2, is_master=True, wait_for_workers=False)"
    told = "print(store.port, flush=True)"
    code = f"import time; from torch.distributed import TCPStore; {opened}; {told}; time.sleep(600)"
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    place = {"RANK": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": first.stdout.readline().strip()}
    for name, value in ({"WORLD_SIZE": "2"} | place).items():
        monkeypatch.setenv(name, value)
    store = store_of_first_rank(20)
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        first.send_signal(signal.SIGCONT)
        first.kill()

    monkeypatch.setattr(roll_call.os, "_exit", leave)
    with roll_call.ended_after(600, "nothing"):
        store.set("arrived/1", "here")
    assert not codes
    first.send_signal(signal.SIGSTOP)
    with pytest.raises(DistError), roll_call.ended_after(1, "the ranks have not met"):
        store.wait(["all arrived"], timedelta(seconds=0.2))
    first.wait()
    assert codes == [LOST]
    said = f"rank 1 ({socket.gethostname()}): the ranks have not met within 1 s: one is stopped, or cut off; "
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_that_do_not_come_are_named(rank: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Rank 0 alone, and rank 1 without it: said at once, given up later, in place of hours of silence."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in ({"RANK": rank, "WORLD_SIZE": "3"} | place).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(roll_call, "SECONDS_TO_SAY", 0.5)
    monkeypatch.setattr(roll_call, "SECONDS_TO_ARRIVE", 1)
    with pytest.raises(RecipeError) as raised:
        roll_call.roll_call()
    host, said = socket.gethostname(), capsys.readouterr().err
    if rank == "0":
        missing = rf"2 of 3 ranks have not come for \d+ s: 1, 2; there are {host} \(1\); "
        assert re.match(f"{missing}waiting for 1 s", said) and re.match(f"{missing}see what", str(raised.value))
    else:
        assert said.startswith(f"rank 1 ({host}): finds no rank 0 at 127.0.0.1:") and "MASTER_ADDR" in str(raised.value)
