"""The pool of ranks: what comes out is what launched ranks give; nothing of one run is left in the next, nor behind."""

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from distributed import REPOSITORY, WORKERS, launch, pooled, rank_environment, run_on_ranks

CLEAN = {"fails": None, "stays": False}


@pytest.mark.full
def test_the_pool_gives_what_launched_ranks_give(tmp_path: Path) -> None:
    """To the bit; the worker joins the process group as a run does."""
    answer = run_on_ranks("pool_ranks.py", 3, {"rows": 5}, tmp_path)
    (tmp_path / "answer.json").rename(tmp_path / "pooled.json")
    asked, answered = (str(tmp_path / name) for name in ("request.json", "answer.json"))
    done = launch(WORKERS / "pool_ranks.py", 3, asked, answered)
    assert done.returncode == 0, done.stderr[-3000:]
    assert Path(answered).read_bytes() == (tmp_path / "pooled.json").read_bytes() and len(answer) == 3


def test_nothing_of_a_run_is_left_in_the_next(tmp_path: Path) -> None:
    first, ranks = run_on_ranks("unclean.py", 2, CLEAN, tmp_path)
    assert first == run_on_ranks("unclean.py", 2, CLEAN, tmp_path)[0]
    assert first | {"torch": 0} == {
        "dtype": "torch.float32", "deterministic": False, "torch": 0, "patched": False, "variable": None,
        "joined": False, "signal": True, "folder": str(REPOSITORY), "module": False,
    }  # fmt: skip
    # Ranks of a launcher have their own order of sets and their own numbers where nobody seeds: so have these.
    assert all(ranks[0][name] != ranks[1][name] for name in ("order", "numpy", "random"))


@pytest.mark.parametrize("fails", [0, 1])
def test_a_rank_that_fails_ends_the_other_and_harms_no_later_run(fails: int, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match=rf"unclean.py on 2 ranks ended with 1(.|\n)*rank {fails} is damaged"):
        run_on_ranks("unclean.py", 2, CLEAN | {"fails": fails}, tmp_path)
    assert time.monotonic() - began < 60
    assert run_on_ranks("unclean.py", 2, CLEAN, tmp_path)[0]["patched"] is False


@pytest.mark.full
def test_a_run_that_does_not_end_is_ended(tmp_path: Path) -> None:
    run_on_ranks("unclean.py", 1, CLEAN, tmp_path)  # the imports are done
    (tmp_path / "request.json").write_text(json.dumps(CLEAN | {"fails": 7, "stays": True}))
    asked = [str(tmp_path / name) for name in ("request.json", "answer.json")]
    with pytest.raises(TimeoutError, match=r"unclean.py.*rank \[0\] does not end"):
        pooled(WORKERS / "unclean.py", 1, *asked, timeout=10)
    assert run_on_ranks("unclean.py", 1, CLEAN, tmp_path)[0]["joined"] is False


@pytest.mark.full
def test_the_pool_ends_with_the_process_that_has_it(tmp_path: Path) -> None:
    """Killed while a rank runs: neither the rank nor its parent stays."""
    (tmp_path / "request.json").write_text(json.dumps(CLEAN | {"fails": 7, "stays": True}))
    asked = [str(tmp_path / name) for name in ("request.json", "answer.json")]
    code = f"from distributed import pooled; pooled({str(WORKERS / 'unclean.py')!r}, 1, *{asked})"
    process = subprocess.Popen([sys.executable, "-c", code], env=rank_environment())
    deadline = time.monotonic() + 200
    while not (tmp_path / "answer.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    children = descendants(process.pid)
    assert len(children) == 2  # one parent, one rank
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(map(is_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_alive, children))


def descendants(pid: int) -> list[int]:
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [further for child in found for further in descendants(child)]


def is_alive(pid: int) -> bool:
    """A process that has ended may wait for init to look at it."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
