"""Run a worker script on several CPU ranks under the deepspeed launcher. Used by every test that needs ranks."""

import json
import os
import socket
import subprocess
import sys
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
    script: str | Path, world_size: int, *arguments: str, timeout: float = 900, **env: str
) -> subprocess.CompletedProcess:
    """`deepspeed --num_gpus W script arguments...` with its output captured as text."""
    command = ["deepspeed", "--num_gpus", str(world_size), "--master_port", free_port(), str(script), *arguments]
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
