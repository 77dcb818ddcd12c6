"""Try every fault of README's reliability table, in its order: python tests/faults/run_all.py [WORDS OF A FAULT].

Runs the commands of the table's last column and prints, a line a fault, how many of its tests passed, in how long.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def faults() -> dict[str, list[list[str]]]:
    """The table: fault -> arguments of pytest, a list a command."""
    section = (REPOSITORY / "README.md").read_text(encoding="utf-8").partition("\n## Runs that survive\n")[2]
    rows = [line.strip("| ").split(" | ") for line in section.partition("\n## ")[0].splitlines() if line[:1] == "|"]
    return {
        row[0]: [shlex.split(command)[1:] for command in re.findall(r"`(pytest [^`]+)`", row[2])] for row in rows[2:]
    }


def outcome(command: list[str]) -> tuple[bool, str]:
    """Whether all tests of a command passed, and pytest's last line; without any test they have not."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "COLUMNS": "120"}
    environment["CI"] = "true"  # a skip fails
    pytest = [sys.executable, "-m", "pytest", "-q", "--color=no"]
    done = subprocess.run(
        [*pytest, *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(f"$ pytest {shlex.join(command)}\n{done.stdout[-5000:]}{done.stderr[-2000:]}", flush=True)
    last = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1]
    return done.returncode == 0, last.partition(" in ")[0]


def main(words: str) -> int:
    known: dict[str, tuple[bool, str]] = {}
    chosen = {fault: commands for fault, commands in faults().items() if words in fault}
    if not chosen:
        print(f"no fault of the table has {words!r} in it; there are: {'; '.join(faults())}")
        return 2
    for fault, commands in chosen.items():
        began = time.monotonic()
        for command in commands:
            if shlex.join(command) not in known:
                known[shlex.join(command)] = outcome(command)
        results = [known[shlex.join(command)] for command in commands]
        said = "; ".join(said for _, said in results)
        passed = "ok  " if all(ok for ok, _ in results) else "FAIL"
        print(f"{passed} {fault}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
    return 0 if all(ok for ok, _ in known.values()) else 1


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
