"""Who is dead, who stands still: the judgement alone, by a clock of the test's own."""

import threading
import time

import pytest
from distributed import free_port

from toolkit.ranks import watch
from toolkit.ranks.watch import (
    COMPARING,
    COMPUTING,
    DEAD_SECONDS,
    TROUBLED_SECONDS,
    UNHEARD_SECONDS,
    WAITING,
    Seen,
    Status,
    Watch,
    seen_now,
    verdict,
)

HOSTS = ["a", "a", "b"]


def alive(status: Status, beat_at: float = 0.0, moved_at: float = 0.0) -> Seen:
    return Seen(status, beat_at, moved_at)


def test_a_rank_is_dead_when_it_is_not_heard_of() -> None:
    ranks = [alive(Status(beat=1, step=7, phase=COMPUTING)) for _ in HOSTS]
    assert verdict(ranks, HOSTS, DEAD_SECONDS) == ""
    heard = [ranks[0]._replace(beat_at=1.0), ranks[1]._replace(beat_at=1.0), ranks[2]]
    said = verdict(heard, HOSTS, DEAD_SECONDS + 0.5)
    assert said.startswith("rank 2 (b): not heard of for 20 s: killed, stopped, or its machine is down or cut off; ")
    assert "last seen at step 7, computing; the same command goes on from the last checkpoint" in said
    # sooner where a collective operation has failed
    troubled = [heard[0]._replace(status=heard[0].status._replace(troubled=True), beat_at=TROUBLED_SECONDS), *heard[1:]]
    assert verdict(troubled, HOSTS, TROUBLED_SECONDS + 0.5).startswith("rank 2 (b): not heard of for 8 s")
    assert verdict(heard, HOSTS, TROUBLED_SECONDS + 0.5) == ""
    # later where it never said a word, as it may still prepare its GPU
    never = [*(alive(ranks[0].status, UNHEARD_SECONDS) for _ in range(2)), alive(Status())]
    assert verdict(never, HOSTS, UNHEARD_SECONDS) == ""
    assert verdict(never, HOSTS, UNHEARD_SECONDS + 0.4).startswith("rank 2 (b): not heard of for 25 s")


def test_the_rank_that_is_furthest_behind_is_named() -> None:
    late = 60.5
    waiting = Status(step=9, phase=WAITING, limit=60, where="stream.py:1 __next__")
    ranks = [
        alive(waiting._replace(phase=COMPARING), late),
        alive(waiting, late),
        alive(waiting._replace(phase=COMPARING), late),
    ]
    said = verdict(ranks, HOSTS, late)
    assert said.startswith(
        "rank 1 (a): no progress for 1 minutes, at step 9, waiting for its rows (stream.py:1 __next__)"
    )
    assert verdict(ranks, HOSTS, 59.5) == ""
    seen_later = [ranks[0], ranks[1]._replace(moved_at=1.0), ranks[2]]
    assert verdict(seen_later, HOSTS, late) == said
    unlimited = [rank._replace(status=rank.status._replace(limit=0)) for rank in ranks]  # saving, evaluating
    assert verdict(unlimited, HOSTS, late) == ""
    assert verdict([ranks[0], unlimited[1], ranks[2]], HOSTS, late) == ""  # they wait for one that may take its time
    computing = [alive(Status(step=9, phase=COMPUTING, slices=n, limit=60), late) for n in (40, 40, 38)]
    assert verdict(computing, HOSTS, late).startswith("rank 2 (b): no progress")
    assert verdict([computing[0]] * 3, HOSTS, late).startswith("rank 0 (a), rank 1 (a), rank 2 (b): no progress")


def test_progress_is_a_step_a_phase_or_a_slice() -> None:
    first = seen_now(None, Status(1, 4, WAITING, 0, 60), 100.0)
    assert first == Seen(first.status, 100.0, 100.0)
    beat = seen_now(first, first.status._replace(beat=2, where="elsewhere"), 101.0)
    assert (beat.beat_at, beat.moved_at) == (101.0, 100.0)
    assert seen_now(beat, beat.status, 102.0)[1:] == (101.0, 100.0)  # not heard of
    for change in ({"step": 5}, {"phase": COMPUTING}, {"slices": 1}, {"limit": 0}):
        assert seen_now(beat, beat.status._replace(**change), 103.0).moved_at == 103.0


# what ends the thread here is os._exit in a run
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_process_alone_watches_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so and ends; one that gets on does not, nor one that saves."""
    said, codes, stopped = [], [], threading.Event()

    def leave(code: int) -> None:
        codes.append(code)
        stopped.set()
        raise SystemExit

    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(watch, "tell", said.append)
    monkeypatch.setattr(watch.os, "_exit", leave)
    with Watch() as watched:
        for step in range(15):
            watched.at(step, COMPUTING, 4 / 60)
            time.sleep(0.3)
        watched.at(15, "saving", 0)
        time.sleep(2)
        assert not said and not codes
        watched.at(16, COMPUTING, 0.3 / 60)
        assert stopped.wait(20)
    assert codes == [watch.LOST] and len(said) == 1
    assert said[0].startswith("\nrank 0 (") and "no progress for 0.005 minutes, at step 16, computing" in said[0]


def test_a_first_rank_that_is_gone_is_named_once_on_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """By any of its ranks: the lowest may have died with it."""
    said, codes = [], []
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", free_port())
    monkeypatch.setattr(watch, "tell", said.append)
    monkeypatch.setattr(watch.os, "_exit", codes.append)
    watched = Watch()
    ranks = [threading.Thread(target=watched._first_rank_is_gone) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert codes == [watch.LOST] * 4 and len(said) == 1 and "does not answer rank 0" in said[0]


def test_after_a_suspension_the_count_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole job stood still, so nobody's silence says anything; without that rule the process would end."""
    said, ends = [], []
    monkeypatch.setattr(watch, "tell", said.append)
    monkeypatch.setattr(watch.os, "_exit", ends.append)
    for asleep, ended in ((watch.ASLEEP_SECONDS, []), (float("inf"), [watch.LOST])):
        monkeypatch.setattr(watch, "ASLEEP_SECONDS", asleep)
        watched = Watch()
        watched.at(3, COMPUTING, 1)
        watched._say()
        watched._judge()
        long_ago = time.monotonic() - 500
        watched._judged, watched._seen = long_ago, [Seen(watched._own, long_ago, long_ago)]
        watched._judge()
        assert ends == ended and len(said) == len(ended)
