"""The Slurm script of README, with stand-ins for Slurm's own commands: two tasks, a signal before the time is up."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from beir import write_beir
from distributed import REPOSITORY, free_port, rank_environment
from nodes import processes_of
from recipe_changes import changed

COMMANDS = {
    "srun": """\
shift # --kill-on-bad-exit
pids=
for node in 0 1; do SLURM_NODEID=$node "$@" & pids="$pids $!"; done
code=0
for pid in $pids; do wait "$pid" || code=$?; done
exit $code
""",
    "scontrol": """\
case "$1 $2" in
    "show hostnames") printf 'node1\\nnode2\\n' ;;
    "requeue $SLURM_JOB_ID") touch "$REQUEUED" ;;
esac
""",
}


@pytest.mark.full
def test_the_script_saves_at_the_signal_and_asks_to_be_requeued(tmp_path: Path) -> None:
    text = (REPOSITORY / "README.md").read_text()
    script = text[text.index("#!/bin/bash\n#SBATCH") :].partition("```")[0]
    run, logs = tmp_path / "run", tmp_path / "logs"
    for there, here in (
        ("cd /shared/toolkit && . .venv/bin/activate\n", ""),
        ("$PWD/hosts", f"{tmp_path}/hosts"),
        ("$((20000 + SLURM_JOB_ID % 10000))", free_port()),
        ('"$MASTER" --master_port', "127.0.0.1 --master_port"),
        ("slots=8", "slots=1"),
        ("logs/", f"{logs}/"),
        ("recipes/revela_7b.json", f"{tmp_path}/recipe.json --output {run}"),
    ):
        assert there in script, there
        script = script.replace(there, here)
    suite = write_beir(tmp_path / "collection")
    content = changed(("stages.0.data.sources", [{"folder": str(suite)}]), ("stages.0.optim.steps", 5000))
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    (tmp_path / "script.sh").write_text(script)
    (tmp_path / "bin").mkdir()
    for name, body in COMMANDS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}")
        (tmp_path / "bin" / name).chmod(0o755)
    requeued = tmp_path / "requeued"
    env = rank_environment(SLURM_JOB_ID="4711", SLURM_JOB_NODELIST="node[1-2]", REQUEUED=str(requeued))
    env["PATH"] = f"{tmp_path}/bin{os.pathsep}{env['PATH']}"
    job = subprocess.Popen(["bash", str(tmp_path / "script.sh")], env=env, cwd=REPOSITORY)
    try:
        log, deadline = run / "log.jsonl", time.monotonic() + 400
        while not (log.exists() and log.read_text().count("\n") > 10):
            assert time.monotonic() < deadline and job.poll() is None
            time.sleep(0.05)
        asked = [pid for pid in processes_of(run) if not _is_shell(pid)]
        assert len(asked) == 6  # the runner, the launcher and the rank of each node, as Slurm signals a step
        for pid in asked:
            os.kill(pid, signal.SIGUSR1)
        assert job.wait(timeout=120) == 4
    finally:
        for pid in processes_of(run):
            os.kill(pid, signal.SIGKILL)
    assert requeued.exists() and not processes_of(run)
    said = "".join(path.read_text() for path in (logs / "4711").iterdir())
    (saved,) = re.findall(r"saved at step (\d+)", said)
    assert log.read_text().count("\n") == int(saved)


def _is_shell(pid: int) -> bool:
    return Path(f"/proc/{pid}/comm").read_text().strip() in ("sh", "bash", "srun")
