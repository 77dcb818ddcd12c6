"""How many requests are under way: counted against a server that is made of numbers, whose clock is one of them."""

import heapq

import pytest

from toolkit.generate.under_way import FIRST, UnderWay


class Slots:
    """A server that works on `slots` requests at a time, a second each, and refuses what is beyond `room`."""

    def __init__(self, slots: int, room: int = 10**9) -> None:
        self.now, self.slots, self.room = 0.0, slots, room
        self.free = [0.0] * slots

    def run(self, limit: UnderWay, requests: int, tokens: int = 100) -> tuple[int, list[str]]:
        """(requests at a time at the most, what was said)."""
        flying: list[tuple[float, float]] = []
        most, said = 0, []
        while requests or flying:
            while requests and len(flying) < limit.limit:
                if len(flying) >= self.room:
                    said.append(limit.refused(self.now))
                    break
                begins = max(self.now, heapq.heappop(self.free))
                heapq.heappush(self.free, begins + 1)
                heapq.heappush(flying, (begins + 1, self.now))
                requests -= 1
            most = max(most, len(flying))
            self.now, _ = heapq.heappop(flying)
            said.append(limit.answered(tokens))
        return most, [line for line in said if line]


@pytest.mark.parametrize("slots", [4, 16, 128])
def test_the_number_doubles_while_the_server_gets_faster_and_then_stays(slots):
    server = Slots(slots)
    limit = UnderWay(1000, lambda: server.now)
    most, said = server.run(limit, 40 * slots)
    assert limit.limit == slots
    assert most == 2 * slots  # tried, and of no use
    (line,) = said
    assert line.startswith(f"{slots} requests are under way: {100 * slots:,} tokens/s; {2 * slots} at a time give")


def test_a_server_that_does_one_at_a_time_is_left_with_few():
    server = Slots(1)
    limit = UnderWay(1000, lambda: server.now)
    server.run(limit, 100)
    assert limit.limit == FIRST


def test_the_most_is_not_exceeded_and_said():
    server = Slots(512)
    limit = UnderWay(100, lambda: server.now)
    most, said = server.run(limit, 3000)
    assert most == limit.limit == 100
    assert said == ["100 requests are under way, the most that this process opens: 10,000 tokens/s"]


def test_the_first_request_goes_alone():
    limit = UnderWay(1000, lambda: 0.0)
    assert limit.limit == 1
    limit.answered(1)
    assert limit.limit == FIRST


def test_one_slow_round_does_not_end_the_growth():
    now = 0.0
    limit = UnderWay(1000, lambda: now)
    limit.answered(1)
    for at, rounds in ((FIRST, [1.0]), (2 * FIRST, [2.2, 1.0])):
        for seconds in rounds:
            assert limit.limit == at
            for _ in range(3 * at):
                now += seconds / at
                limit.answered(10)
    assert limit.limit == 4 * FIRST


def test_a_server_that_refuses_is_asked_for_less_and_then_slowly_for_more():
    now = 100.0
    limit = UnderWay(1000, lambda: now)
    limit.answered(1)
    for _ in range(3 * FIRST):
        now += 0.1
        limit.answered(1)
    assert limit.limit == 8
    assert limit.refused(now) == "the server refuses 8 requests at a time; 4 are under way"
    assert limit.refused(now - 1) == "" and limit.limit == 4  # sent before: of the same wave
    for _ in range(4):
        limit.answered(1)
    assert limit.limit == 5
    now += 1
    assert limit.refused(now) == "" and limit.limit == 2  # said once
    for _ in range(100):
        limit.answered(1)
    assert limit.limit == 5  # where it was refused the last time, and no further


def test_a_refusal_of_the_first_request_does_not_keep_the_others_alone():
    limit = UnderWay(1000, lambda: 0.0)
    limit.refused(0.0)
    limit.answered(1)
    assert limit.limit == FIRST


def test_a_server_with_room_for_so_many_is_kept_full():
    server = Slots(64, room=48)
    limit = UnderWay(1000, lambda: server.now)
    most, said = server.run(limit, 2000)
    assert most <= 48 and 16 <= limit.limit <= 64
    assert said[0].startswith("the server refuses")
