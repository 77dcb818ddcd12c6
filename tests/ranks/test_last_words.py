"""Who says what ends a run where rank 0 cannot be asked. Runs in which it can: tests/launcher."""

import socket

import pytest
from distributed import free_port

from toolkit.ranks import last_words

CASES = [("0", "RANK", True), ("1", "RANK", False), ("0", "PMI_RANK", True)]


@pytest.mark.parametrize(("local", "launcher", "speaks"), CASES)
def test_the_first_rank_of_a_machine_speaks_where_rank_0_is_not_there(
    local: str, launcher: str, speaks: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    place = {"WORLD_SIZE": "16", "LOCAL_RANK": local, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in (place | {launcher: "8"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(last_words, "WAIT_SECONDS", 0.3)
    last_words.say("recipes/a.json: is not there")
    expected = f"rank 8 ({socket.gethostname()}): recipes/a.json: is not there\n" if speaks else ""
    assert capsys.readouterr().err == expected
