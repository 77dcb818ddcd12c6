"""Run a worker script on several CPU ranks under the deepspeed launcher. Used by every test that needs ranks."""

import json
import os
import random
import socket
import subprocess
import sys
from contextlib import suppress
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


def run_on_ranks(worker: str, world_size: int, request: Any, folder: Path, timeout: float = 900) -> Any:
    """Run tests/workers/`worker` on `world_size` ranks with a JSON request; returns the JSON that rank 0 wrote."""
    asked, answered = folder / "request.json", folder / "answer.json"
    asked.write_text(json.dumps(request))
    done = launch(WORKERS / worker, world_size, str(asked), str(answered), timeout=timeout)
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
