"""Two nodes on one machine, 127.0.0.1 and 127.0.0.2, reached through an ssh daemon of the tests' own.

Everything lies in one folder: keys, configuration, hostfile. An `ssh` first in PATH uses them, so the launchers' own
commands run unchanged and nobody's ~/.ssh is read or written.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from distributed import REPOSITORY, free_port, rank_environment

HOSTS = ("127.0.0.1", "127.0.0.2")
SECRET = "hf_kYpQw0aXnTzVbMdR"
"""The value of a variable that reaches every rank and must not be written anywhere."""
FORWARDED = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TORCH_EXTENSIONS_DIR")
SSHD_CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
ListenAddress 127.0.0.2
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
MaxStartups 100
"""
SSH_CONFIG = """\
Host *
Port {port}
IdentityFile {folder}/user_key
IdentitiesOnly yes
UserKnownHostsFile {folder}/known_hosts
StrictHostKeyChecking no
BatchMode yes
LogLevel ERROR
"""


class Nodes(NamedTuple):
    """Two nodes that answer."""

    folder: Path
    ssh_port: str
    environment: dict[str, str]  # of a launcher

    def command(self, *launcher: str) -> list[str]:
        """`deepspeed --hostfile ...` with these options of the launcher; the script comes behind."""
        return ["deepspeed", "--hostfile", str(self.folder / "hosts"), "--master_addr", HOSTS[0], *launcher]


def require(*programs: str) -> None:
    """Skip the test if a program is not installed: only reported, but a failure where CI is set (conftest.py)."""
    if lacking := [program for program in programs if not _find(program)]:
        pytest.skip(f"this machine lacks {', '.join(lacking)}; .ci/run installs what the tests need")
    if "sshd" in programs and os.geteuid() == 0 and not Path("/run/sshd").is_dir():
        pytest.skip("this machine lacks /run/sshd, which sshd needs; .ci/run makes it")


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{rank_environment()['PATH']}:/usr/sbin:/sbin")


@contextmanager
def two_nodes(folder: Path) -> Iterator[Nodes]:
    """Start the daemon, and end it."""
    require("sshd", "ssh", "ssh-keygen")
    port = free_port()
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(port=port, folder=folder))
    (folder / "ssh_config").write_text(SSH_CONFIG.format(port=port, folder=folder))
    (folder / "hosts").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {_find("ssh")} -F {folder}/ssh_config "$@"\n')
    (folder / "bin" / "ssh").chmod(0o755)
    # what a login on the other node does not have; a name that os.path.join takes as it is
    names = [name for name in FORWARDED if name in rank_environment()]
    lines = [f"{name}={rank_environment()[name]}\n" for name in names] + [f"HF_TOKEN={SECRET}\n"]
    (folder / "variables").write_text("".join(lines))
    environment = rank_environment(DS_ENV_FILE=str(folder / "variables"), HF_TOKEN=SECRET)
    environment["PATH"] = f"{folder}/bin{os.pathsep}{environment['PATH']}"
    with (folder / "sshd.log").open("w") as log:
        daemon = subprocess.Popen([str(_find("sshd")), "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    try:
        _wait_until(lambda: all(_answers(host, int(port)) for host in HOSTS), 60, (folder / "sshd.log").read_text)
        yield Nodes(folder, port, environment)
    finally:
        daemon.terminate()
        daemon.wait(timeout=20)


def _answers(host: str, port: int) -> bool:
    with suppress(OSError):
        socket.create_connection((host, port), timeout=2).close()
        return True
    return False


def _wait_until(condition, seconds: float, said) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, said()[-4000:]
        time.sleep(0.05)


def processes_of(run: Path) -> list[int]:
    """Processes whose command line names the folder: launchers, ssh, ranks."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(run).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def process_of_rank(run: Path, rank: int) -> int:
    """The process that trains as this rank."""
    found = []
    for pid in processes_of(run):
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            names = (f"RANK={rank}".encode(), f"OMPI_COMM_WORLD_RANK={rank}".encode())
            if b"launcher/run.py" in words[:4] and any(name in variables for name in names):
                found.append(pid)
    assert len(found) == 1, found
    return found[0]


def finish(command: list[str], nodes: Nodes, run: Path, kill_after: int | None = None) -> tuple[int, str]:
    """Run a command to its end; returns its exit code and what it said.

    Args:
        run: the run folder that the command names.
        kill_after: SIGKILL the process of rank 1, on the second node, once the log has so many lines; all other
            processes must then end by themselves.
    """
    said = nodes.folder / f"{run.name}.txt"
    with said.open("w") as output:
        process = subprocess.Popen(
            command, env=nodes.environment, cwd=REPOSITORY, stdout=output, stderr=output, start_new_session=True
        )
    try:
        if kill_after is not None:
            log = run / "log.jsonl"
            _wait_until(
                lambda: process.poll() is not None or (log.exists() and log.read_text().count("\n") >= kill_after),
                300,
                said.read_text,
            )
            os.kill(process_of_rank(run, 1), signal.SIGKILL)
        code = process.wait(timeout=300 if kill_after is None else 90)
        _wait_until(lambda: not processes_of(run), 60, lambda: f"left: {processes_of(run)}\n{said.read_text()}")
        return code, said.read_text()
    finally:
        for pid in processes_of(run):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(timeout=20)
