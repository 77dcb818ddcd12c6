"""Run a script in other processes: on CPU ranks launched by deepspeed, or, faster, in ones forked from a pool."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

WORKERS = Path(__file__).parent / "workers"
REPOSITORY = Path(__file__).parent.parent


def rank_environment(**changes: str) -> dict[str, str]:
    """The environment of a launched CPU run: no leftovers of an outer launcher, one thread a rank."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    python_path = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"
    return kept | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": python_path} | changes


def launch(
    script: str | Path, world_size: int, *arguments: str, timeout: float = 900, port: str = "", **env: str
) -> subprocess.CompletedProcess:
    """`deepspeed --num_gpus W script arguments...` with its output captured as text."""
    command = ["deepspeed", "--num_gpus", str(world_size), "--master_port", port or free_port(), str(script)]
    command += arguments
    return subprocess.run(
        command,
        env=rank_environment(**env),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def pooled(
    script: str | Path, world_size: int, *arguments: str, timeout: float = 900, port: str = "", **env: str
) -> subprocess.CompletedProcess:
    """`launch` without the launcher: ranks that are forked from a pool of processes which have imported everything.

    For tests of what ranks compute. Those of how processes start, meet, are watched or end take `launch`.
    """
    common = rank_environment(**env) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port or free_port()}
    common |= {"WORLD_SIZE": str(world_size), "LOCAL_SIZE": str(world_size), "CROSS_RANK": "0", "CROSS_SIZE": "1"}
    what = [str(REPOSITORY / script)]
    if script == "--module":
        what, arguments = ["-m", arguments[0]], arguments[1:]
    return _forked(
        {
            rank: ([*what, f"--local_rank={rank}", *arguments], common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(world_size)
        },
        timeout,
    )


def run_python(*arguments: str, timeout: float = 900, **env: str) -> subprocess.CompletedProcess:
    """`python ARGUMENTS` (a script, or -m and a module) in a process that is forked from the pool, its output captured.

    For tests of what a command says and writes; as `launch`, it starts in the repository's root.
    """
    return _forked({0: (list(arguments), rank_environment(**env))}, timeout)


def _forked(ranks: dict[int, tuple[list[str], dict[str, str]]], timeout: float) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as folder:
        output = [Path(folder, name) for name in ("stdout", "stderr")]
        for path in output:
            path.touch()
        code = _POOL.run(ranks, [str(path) for path in output], timeout)
        return subprocess.CompletedProcess(ranks[0][0], code, *(path.read_text(errors="replace") for path in output))


class _Pool:
    """Two processes that fork the ranks with even and with odd numbers.

    Two, because ranks of one (of multiprocessing's forkserver, too) would have the same order of sets.
    """

    def __init__(self) -> None:
        self._parents: list[tuple[subprocess.Popen, Connection]] = []

    def run(self, ranks: dict[int, tuple[list[str], dict[str, str]]], output: list[str], timeout: float) -> int:
        """0, or the exit code of the first rank that failed: the others are then ended, as the launcher does.

        They have 30 seconds to do it themselves.
        """
        try:
            return self._run(ranks, output, time.monotonic() + timeout)
        except BaseException:  # of a timeout too: whatever runs ends with the parents
            for parent, connection in self._parents:
                parent.kill()
                parent.wait()
                connection.close()
            self._parents = []
            raise

    def _run(self, ranks: dict[int, Any], output: list[str], deadline: float) -> int:
        while len(self._parents) < min(len(ranks), 2):
            self._parents.append(_start_parent())
        asked = [connection for _, connection in self._parents[: len(ranks)]]
        for odd, connection in enumerate(asked):
            connection.send({"ranks": {rank: of for rank, of in ranks.items() if rank % 2 == odd}, "output": output})
        running: dict[int, int] = {}
        ended, failed = 0, 0
        while ended < len(ranks):
            ready = wait(asked, max(0, deadline - time.monotonic()))
            if not ready and not failed:
                raise TimeoutError(f"{ranks[0][0]}: rank {sorted(running)} does not end")
            if not ready:
                _signal(list(running.values()), signal.SIGKILL)
                deadline = time.monotonic() + 30
            for connection in ready:
                what, rank, number = connection.recv()  # pyright: ignore[reportAttributeAccessIssue]
                if what == "begun":
                    running[rank] = number
                    if failed:
                        _signal([number], signal.SIGTERM)
                    continue
                del running[rank]
                ended += 1
                if number and not failed:
                    failed, deadline = number, time.monotonic() + 30
                    _signal(list(running.values()), signal.SIGTERM)
        return failed


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):  # it has ended; its parent's word is on the way
            os.kill(pid, number)


def _start_parent() -> tuple[subprocess.Popen, Connection]:
    ours, its = Pipe()
    command = [sys.executable, "-u", str(Path(__file__).with_name("rank_parent.py")), str(os.getpid())]
    with its:
        parent = subprocess.Popen(
            [*command, str(its.fileno())], env=rank_environment(), cwd=REPOSITORY, pass_fds=[its.fileno()]
        )
    return parent, ours


_POOL = _Pool()


def run_on_ranks(worker: str, world_size: int, request: Any, folder: Path, timeout: float = 900) -> Any:
    """Run tests/workers/`worker` on `world_size` ranks with a JSON request; returns the JSON that rank 0 wrote."""
    asked, answered = folder / "request.json", folder / "answer.json"
    asked.write_text(json.dumps(request))
    done = pooled(WORKERS / worker, world_size, str(asked), str(answered), timeout=timeout)
    if done.returncode or not answered.exists():
        raise AssertionError(
            f"{worker} on {world_size} ranks ended with {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}"
        )
    return json.loads(answered.read_text())


def free_port() -> str:
    """One that is not among those that the system gives to connections: it is opened seconds later, if not minutes."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(min(10000, lowest - 5000), lowest)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return str(port)
