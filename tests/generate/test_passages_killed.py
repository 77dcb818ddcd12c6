"""kill -9 at every operation on the disk: the same command goes on, asks for nothing twice and writes the same."""

import json
from pathlib import Path

import pytest
from distributed import run_python

from toolkit.generate.flags import FORMS


@pytest.mark.parametrize(
    ("form", "every"),
    [("together", 3), ("one-by-one", 7), *(pytest.param(form, 1, marks=pytest.mark.full) for form in FORMS)],
)
def test_a_run_that_is_killed_anywhere_goes_on(form: str, every: int, tmp_path: Path):
    done = run_python("tests/workers/killed_generation.py", str(tmp_path), form, str(every), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["steps"] > 30 and found["wrong"] == []
