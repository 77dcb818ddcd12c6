"""README's reliability table: each fault has tests, which are there."""

from pathlib import Path

import pytest
from distributed import run_python
from run_all import faults, outcome


def test_every_fault_has_tests() -> None:
    table = faults()
    commands = [command for commands in table.values() for command in commands]
    assert len(table) > 15 and all(table.values()), table
    paths = sorted({word for command in commands for word in command if word.startswith("tests/")})
    done = run_python("-m", "pytest", "--collect-only", "-q", *paths)
    assert done.returncode == 0, done.stdout + done.stderr
    listed = done.stdout.splitlines()
    for command in commands:
        of_files = [line for line in listed if line.startswith(tuple(w for w in command if w.startswith("tests/")))]
        words = command[command.index("-k") + 1].split(" or ") if "-k" in command else [""]
        assert all(any(word in line.partition("::")[2] for line in of_files) for word in words), command


@pytest.mark.parametrize(("body", "passed"), [("assert True", True), ("assert False", False), (None, False)])
def test_what_came_of_a_command(body: str | None, passed: bool, tmp_path: Path, capsys) -> None:
    """A failure is shown; a command that finds no test is one."""
    (tmp_path / "test_a.py").write_text("" if body is None else f"def test_it():\n    {body}\n")
    ok, last = outcome([str(tmp_path)])
    assert ok == passed
    assert last == {"assert True": "1 passed", "assert False": "1 failed"}.get(str(body), "no tests ran")
    assert bool(capsys.readouterr().out) == (not passed)
