"""A port or an address at which the ranks cannot meet is one line; what another run has there is left alone."""

import errno
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import REPOSITORY, free_port, launch, pooled, rank_environment
from recipe_changes import TINY
from torch.distributed import DistNetworkError, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from launcher import run as launcher
from toolkit.ranks import last_words, meeting, roll_call
from toolkit.ranks.meeting import check_place
from toolkit.recipe.errors import RecipeError

CHOOSE = "choose another with deepspeed --master_port N ..., or MASTER_PORT=N where mpirun or srun starts the ranks"


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> str:
    """The port of a run of two ranks, of which this process is the first, and has not met the other."""
    monkeypatch.setattr(last_words, "_joined", threading.Event())
    monkeypatch.setattr(last_words, "has_joined", last_words._joined.is_set)  # whatever ran before
    monkeypatch.setattr(meeting, "has_joined", last_words.has_joined)
    port = free_port()
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", port)
    return port


@pytest.fixture
def other_run(place: str) -> TCPStore:
    """Where the two ranks of another run have met."""
    store = TCPStore("127.0.0.1", int(place), 2, is_master=True, wait_for_workers=False)
    for key, value in {"arrived/0": "here", "arrived/1": "here", "all arrived": ""}.items():
        store.set(key, value)
    return store


@pytest.fixture
def server() -> Iterator[str]:
    """The port of a program that talks another language than torch."""
    with socket.create_server(("127.0.0.1", int(free_port()))) as listening:

        def answer() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        yield str(listening.getsockname()[1])
        listening.shutdown(socket.SHUT_RDWR)


def said_by(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in (done.stdout + done.stderr).splitlines() if not re.match(r"\[20\d\d-", line)]


@pytest.mark.parametrize(("what", "ranks"), [("train", 1), ("train", 2), ("eval", 2), ("mine", 2)])
def test_a_port_in_use_is_one_line(what: str, ranks: int, server: str, tmp_path: Path) -> None:
    """Alone, eval.run and toolkit.mine need no port."""
    (tmp_path / "recipe.json").write_text(json.dumps(TINY))
    output = ["--output", str(tmp_path / "out")]
    window = ["--ranks", "1", "9", "--negatives", "1", "--seed", "1"]
    command = {
        "train": ["launcher/run.py", str(tmp_path / "recipe.json")],
        "eval": ["--module", "eval.run", "bm25", "--suite", "stdlib:test"],
        "mine": ["--module", "toolkit.mine", "bm25", "--text", "code", "--pairs", str(tmp_path), *window],
    }[what]
    begin = launch if what == "train" else pooled
    done = begin(command[0], ranks, *command[1:], *output, timeout=300, port=server)
    problem = f"127.0.0.1:{server} is in use by another program (perhaps another run); {CHOOSE}"
    assert done.returncode == 2, done
    assert said_by(done) == [problem if what == "train" else f"error: {problem}"]
    assert not (tmp_path / "out").exists()


def test_under_mpirun_it_is_the_same_line(server: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(TINY))
    ranks = {"RANK": "0", "SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}
    environment = rank_environment(MASTER_PORT=server, **{f"OMPI_COMM_WORLD_{key}": v for key, v in ranks.items()})
    command = [sys.executable, "launcher/run.py", str(tmp_path / "recipe.json"), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"127.0.0.1:{server} is in use by another program") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("port", ["abc", "0", "65536", "70000", "-1", "29500 ", "1e3"])
def test_what_is_no_port_is_said(port: str, place: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("MASTER_PORT", port)
    problem = f"MASTER_PORT {port}: a port is a number from 1 to 65535; {CHOOSE}"
    with pytest.raises(RecipeError, match=f"^{re.escape(problem)}$"):
        check_place()
    last_words.say(problem)  # which looks for the other rank
    assert capsys.readouterr().err == f"{problem}\n"
    monkeypatch.setenv("RANK", "1")
    began = time.monotonic()
    last_words.say(problem)
    assert capsys.readouterr().err.startswith("rank 1 (") and time.monotonic() - began < 10


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT"])
def test_a_place_that_is_not_given_is_said(name: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    with pytest.raises(RecipeError, match=f"^{name} is not set, by which the ranks find each other; start them with"):
        check_place()


def test_an_address_that_nobody_knows_is_said(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no-such-node.invalid")
    expected = (
        rf"^MASTER_ADDR no-such-node.invalid: is not known on {socket.gethostname()} \(.*\); name the first node "
    )
    with pytest.raises(RecipeError, match=expected):
        check_place()
    monkeypatch.setenv("RANK", "1")
    check_place()  # the name may be known later there: roll_call waits


def test_an_address_of_another_machine_is_said(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "255.255.255.255")  # nobody's
    expected = rf"^MASTER_ADDR 255.255.255.255: is not {socket.gethostname()}, where rank 0 runs; name this machine "
    with pytest.raises(RecipeError, match=expected):
        check_place()
    monkeypatch.setattr(meeting, "_is_own", lambda address: False)
    for own in ("127.0.0.1", "127.0.0.2"):  # as if it were: connections come back, as through a service
        monkeypatch.setenv("MASTER_ADDR", own)
        check_place()


def test_an_address_of_this_machine_is_its_own(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("127.0.0.1", "127.0.0.2", "localhost", socket.gethostname()):
        monkeypatch.setenv("MASTER_ADDR", address)
        check_place()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        assert meeting._is_own(probe.getsockname()[0]) and not meeting._is_own("192.0.2.1")


def test_rank_0_that_finds_its_port_taken_says_so(other_run: TCPStore, place: str, monkeypatch) -> None:
    """Also where it was free when the run began; and where it is root's."""
    expected = f"^127.0.0.1:{place} is in use by another program"
    with pytest.raises(RecipeError, match=expected):
        check_place()
    with pytest.raises(RecipeError, match=expected):
        roll_call.roll_call()

    def refuse(*_: object, **__: object) -> None:
        raise DistNetworkError(f"The server socket has failed to listen. port: 80, code: -{errno.EACCES}, name: EACCES")

    monkeypatch.setattr(roll_call, "TCPStore", refuse)
    with pytest.raises(RecipeError, match=f"^127.0.0.1:{place} cannot be opened by this user: ports below 1024 are"):
        roll_call.roll_call()


@pytest.mark.parametrize("number", ["1", "5"])
def test_another_rank_does_not_join_another_run(number: str, other_run: TCPStore, place: str, monkeypatch) -> None:
    """Neither in the place of one of its ranks nor beside them; it waits for rank 0 as long as for one that is late."""
    monkeypatch.setenv("RANK", number)
    monkeypatch.setattr(roll_call, "SECONDS_TO_SAY", 1)
    keys = other_run.num_keys()
    with pytest.raises(RecipeError, match=f"^127.0.0.1:{place} is in use by another program"):
        roll_call.roll_call()
    assert other_run.num_keys() == keys


@pytest.mark.parametrize("number", ["0", "1"])
def test_last_words_do_not_end_another_run(number: str, other_run: TCPStore, place: str, monkeypatch, capsys) -> None:
    """A typo in a recipe, at the port of a run that trains: those words would end all its ranks."""
    monkeypatch.setenv("RANK", number)
    monkeypatch.setattr(last_words, "WAIT_SECONDS", 1)
    monkeypatch.setattr(sys, "argv", ["run.py", "/nowhere/recipe.json"])
    keys = other_run.num_keys()
    assert launcher.main() == 2
    assert "/nowhere/recipe.json: cannot be read" in capsys.readouterr().err
    assert other_run.num_keys() == keys and not last_words.is_told_by_another()


def test_a_rank_that_has_joined_speaks_to_its_own_run(other_run: TCPStore, monkeypatch, capsys) -> None:
    """The control of the last: there the words arrive."""
    last_words.joins()
    monkeypatch.setattr(last_words, "_SECONDS_TO_LOOK", 0)
    last_words.say("no room")
    assert other_run.get(last_words.KEY) == b"no room" and capsys.readouterr().err == "no room\n"
