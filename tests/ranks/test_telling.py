"""Work that takes long says what it is at, from time to time and on rank 0 alone."""

import time

import pytest

from toolkit.ranks import telling as module
from toolkit.ranks.telling import telling


def test_a_line_every_so_often_and_none_after_the_work(capsys):
    with telling(0.05) as say:
        time.sleep(0.2)
        assert capsys.readouterr().out == ""  # nothing was said yet
        say("the first half")
        time.sleep(0.3)
        say("the second half")
        time.sleep(0.3)
    lines = capsys.readouterr().out.splitlines()
    assert {line.rsplit(" (", 1)[0] for line in lines} == {"the first half", "the second half"}
    assert 2 <= len(lines) <= 12 and lines[-1].endswith(" s)")
    time.sleep(0.15)
    assert capsys.readouterr().out == ""


def test_short_work_says_nothing_and_an_error_ends_it(capsys):
    with pytest.raises(ValueError, match="no"), telling() as say:
        say("short")
        raise ValueError("no")
    assert capsys.readouterr().out == "" and module.SECONDS < 30


def test_other_ranks_are_silent(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "rank", lambda: 1)
    with telling(0.02) as say:
        say("something")
        time.sleep(0.1)
    assert capsys.readouterr().out == ""
