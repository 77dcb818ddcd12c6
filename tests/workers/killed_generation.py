"""Writes passages in children that kill themselves at an operation on the disk, and goes on after each; see
tests/generate/test_passages_killed.py.

Arguments: folder to work in, form, every how many operations. Prints one JSON object: operations of a whole run, and
what was wrong.
"""

import json
import os
import shutil
import signal
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from scripted_engine import ScriptedEngine, right

from toolkit.generate import order, passages
from toolkit.generate.__main__ import main
from toolkit.generate.requests import Request
from toolkit.generate.written import finished, mend

WORK, FORM, EVERY = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
ASKED, FILES = WORK / "asked", ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "passages.jsonl")
EVENTS = {"open", "os.rename", "os.mkdir", "os.truncate", "os.remove", "os.rmdir", "shutil.rmtree"}
count, fatal = 0, 0


def step() -> None:
    """One operation; the fatal one does not happen."""
    global count
    count += 1
    if count == fatal:
        os.kill(os.getpid(), signal.SIGKILL)


def seen(event: str, arguments: tuple[Any, ...]) -> None:
    if event in EVENTS and str(WORK / "out") in str(arguments[0]):
        step()


def half_written(file: int, data: bytes) -> int:
    """A line that is killed is there in part, after one that is not."""
    if count + 1 == fatal:
        write(file, data[: len(data) // 2])
    step()
    return write(file, data)


def synced(file: int) -> None:
    step()


def answer(request: Request) -> str:
    with ASKED.open("a") as file:
        file.write(request.name + "\n")
    return "no object" if request.name.startswith("q1/") else right(request)  # q1 is dropped


def run() -> int:
    arguments = ["passages", "--queries", str(WORK / "q.jsonl"), "--model", "m", "--seed", "1", "--form", FORM]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        return main([*arguments, "--output", str(WORK / "out")])


def child(fatal_step: int) -> tuple[int, int]:
    """Exit status of a run that is killed at a step (0: never), and the steps that it made."""
    global count, fatal
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        count, fatal = 0, fatal_step
        code = run()
        write(writing, str(count).encode())
        os._exit(code)
    os.close(writing)
    _, status = os.waitpid(process, 0)
    with os.fdopen(reading) as told:
        return status, int(told.read() or 0)


def contents() -> dict[str, bytes]:
    return {name: (WORK / "out" / name).read_bytes() for name in FILES}


write = os.write
os.write, os.fsync = half_written, synced
order.RESAMPLES = 9
passages.open_engine = lambda *_: ScriptedEngine(answer)
rows = [{"_id": f"q{i}", "text": f"query number {i}"} for i in range(3)]
(WORK / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
sys.addaudithook(seen)
status, steps = child(0)
whole, wrong = contents(), [] if status == 0 else ["the whole run failed"]
names = ASKED.read_text().split()
for fatal_step in range(1, steps + 1, EVERY):
    shutil.rmtree(WORK / "out")
    ASKED.write_text("")
    status, _ = child(fatal_step)
    if status != signal.SIGKILL:
        wrong.append(f"step {fatal_step}: status {status}")
    before: set[str] = set()
    if (WORK / "out" / ".journal").is_dir():
        mend(WORK / "out")
        before = set(finished(WORK / "out"))
    ASKED.write_text("")
    status, _ = child(0)
    asked = ASKED.read_text().split()
    expected = sorted(name for name in names if name.split("/")[0] not in before)
    if status != 0 or sorted(asked) != expected or contents() != whole:
        wrong.append(f"step {fatal_step}: after it status {status}, asked {asked} beside {sorted(before)}")
    if json.loads((WORK / "out" / "generated.json").read_text())["counts"]["kept"] != 2:
        wrong.append(f"step {fatal_step}: another number of queries")
print(json.dumps({"steps": steps, "wrong": wrong}))
