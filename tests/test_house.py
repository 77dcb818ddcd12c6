"""The house: launcher/preflight.sh names what a machine lacks; the Makefile installs nothing then; no test may skip."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def machine(folder: Path, **replaced: str) -> dict[str, str]:
    """A PATH of its own: the few tools the check uses, `replaced` by shell lines ("" takes one away)."""
    tools = folder / "bin"
    tools.mkdir()
    real = {name: shutil.which(name) for name in ("sh", "awk", "df", "uname", "make", "touch")}
    real |= {"python3": sys.executable, "c++": "/bin/sh"}
    for name, target in real.items():
        if name not in replaced:
            (tools / name).symlink_to(target)
        elif replaced[name]:
            (tools / name).write_text(f"#!/bin/sh\n{replaced[name]}\n")
            (tools / name).chmod(0o755)
    return {"PATH": str(tools)}


def preflight(env: dict[str, str], python: str = "python3") -> tuple[int, list[str]]:
    command = ["sh", str(ROOT / "launcher" / "preflight.sh"), python]
    done = subprocess.run(command, env=env, cwd=env["PATH"], capture_output=True, text=True)
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()


DF = "echo Filesystem 1024-blocks Used Available Capacity Mounted; echo disk 9 9 {} 9% /"
OLD = f'case "$2" in *version_info*) exit 1;; *) exec {sys.executable} "$@";; esac'
NO_VENV = f'case "$2" in *ensurepip*) exit 1;; *) exec {sys.executable} "$@";; esac'
NO_HEADERS = f'case "$2" in *get_path*) echo /no/headers;; *) exec {sys.executable} "$@";; esac'


def test_a_complete_machine_passes_in_silence(tmp_path):
    assert preflight(machine(tmp_path, df=DF.format(5 * 1024 * 1024))) == (0, [])


@pytest.mark.parametrize(
    ("replaced", "line"),
    [
        ({"uname": "echo Darwin"}, "this toolkit runs on Linux; found Darwin"),
        ({"python3": ""}, "apt-get install python3"),
        ({"python3": OLD}, "Python 3.11 or newer is needed; python3 is older"),
        ({"python3": NO_VENV}, "apt-get install python3-venv"),
        ({"python3": NO_HEADERS}, "Python's headers are missing (/no/headers/Python.h): apt-get install python3-dev"),
        ({"c++": ""}, "apt-get install g++"),
        ({"df": DF.format(5 * 1024 * 1024 - 1)}, "5 GB of free disk are needed here; 4 GB are free"),
    ],
)
def test_what_is_missing_is_one_line(tmp_path, replaced, line):
    status, lines = preflight(machine(tmp_path, **replaced))
    assert status == 1
    assert len(lines) == 1 and line in lines[0]


def test_everything_that_is_missing_is_said_at_once(tmp_path):
    env = machine(tmp_path, python3=NO_HEADERS, df=DF.format(0), uname="echo Other", **{"c++": ""})
    status, lines = preflight(env)
    assert (status, len(lines)) == (1, 4)


def test_another_compiler_may_be_named(tmp_path):
    env = machine(tmp_path, **{"c++": "", "my-c++": "true"})
    (tmp_path / "bin" / "my-c++").symlink_to("/bin/sh")
    assert preflight(env | {"CXX": "my-c++"}) == (0, [])


def test_make_stops_before_it_writes_anything(tmp_path):
    env = machine(tmp_path, **{"c++": ""})
    here = tmp_path / "checkout"
    (here / "launcher").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "launcher/preflight.sh"):
        shutil.copy(ROOT / name, here / name)
    before = sorted(here.rglob("*"))
    for target in ("quickstart", "test", "lint"):
        done = subprocess.run(["make", target], env=env, cwd=here, capture_output=True, text=True)
        assert done.returncode == 2
        assert "apt-get install g++" in done.stderr
        assert sorted(here.rglob("*")) == before


def test_make_leaves_a_finished_installation_alone(tmp_path):
    here = tmp_path / "checkout"
    (here / ".venv").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, here / name)
    stamp = here / ".venv" / "installed-cpu"
    stamp.touch()
    command = ["make", "--question", str(stamp.relative_to(here))]
    assert subprocess.run(command, cwd=here).returncode == 0
    os.utime(stamp, (0, 0))  # as after a change of constraints.txt
    assert subprocess.run(command, cwd=here, capture_output=True).returncode == 1


def test_a_skipped_test_is_a_failure_unless_the_machine_lacks_a_program(tmp_path):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    test = tmp_path / "test_one.py"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        f"--rootdir={tmp_path}",
    ]
    skip = "__import__('pytest').skip"
    lacking = f"{skip}('this machine lacks pdsh')"
    cases = (("pass", "", 0), (f"{skip}('no device')", "", 1), (lacking, "", 0), (lacking, "true", 1))
    for body, ci, status in cases:
        test.write_text(f"def test_one():\n    {body}\n")
        env = os.environ | {"CI": ci}
        done = subprocess.run([*command, str(test)], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == status, done.stdout
        assert ("skipped: 1;" in done.stdout) == bool(status)
        assert ("not run: 1;" in done.stdout) == (body == lacking and not ci)
