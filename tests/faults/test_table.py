"""README's reliability table: each fault has tests, which are there."""

from pathlib import Path

import pytest
from run_all import REPOSITORY, faults, outcome


def test_every_fault_has_tests() -> None:
    table = faults()
    assert len(table) > 15 and all(table.values()), table
    for command in (command for commands in table.values() for command in commands):
        words = command[command.index("-k") + 1].split(" or ") if "-k" in command else []
        paths = [REPOSITORY / word for word in command if word.startswith("tests/")]
        assert paths and all(path.exists() for path in paths), command
        text = "".join(file.read_text() for path in paths for file in ([path] if path.is_file() else path.glob("*.py")))
        assert all(word in text for word in words), command


@pytest.mark.parametrize(("body", "passed"), [("assert True", True), ("assert False", False), (None, False)])
def test_what_came_of_a_command(body: str | None, passed: bool, tmp_path: Path, capsys) -> None:
    """A failure is shown; a command that finds no test is one."""
    (tmp_path / "test_a.py").write_text("" if body is None else f"def test_it():\n    {body}\n")
    ok, last = outcome([str(tmp_path)])
    assert ok == passed and last == {"assert True": "1 passed", "assert False": "1 failed"}.get(
        str(body), "no tests ran"
    )
    assert bool(capsys.readouterr().out) == (not passed)
