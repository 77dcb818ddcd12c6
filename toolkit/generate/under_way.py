"""How many requests are under way at a server: more until it writes no faster, fewer where it refuses.

Called by the server engine. Knows no network, and no clock but the one it is given.
"""

from collections.abc import Callable

FIRST = 4
"""Under way once the first request, which is sent alone, is answered."""
RISE = 1.1
"""Twice as many requests must give at least so many times the tokens a second."""


class UnderWay:
    """A limit that doubles while throughput rises, and then stays; refused requests halve it, answered ones raise it
    again by one a round, up to where it was refused."""

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        """`most` is never exceeded; `clock` gives seconds."""
        self.limit = 1
        self._most, self._clock = most, clock
        self._growing, self._missed = True, False
        self._best, self._best_limit, self._speed_above = 0.0, 1, 0.0
        self._ceiling = most
        self._answered, self._tokens, self._began = 0, 0, 0.0
        self._shrunk_at = float("-inf")

    def answered(self, tokens: int) -> str:
        """Count an answer of so many tokens; returns what is to be said, or ""."""
        self._answered += 1
        if not self._growing:
            return self._recovered()
        if self.limit == 1:  # the first of all
            return self._try(min(FIRST, self._most))
        if self._answered <= self.limit:  # those that were under way when the limit changed, and as many again
            self._began = self._clock()
            return ""
        self._tokens += tokens
        if self._answered < 3 * self.limit:
            return ""
        return self._judged(self._tokens / max(self._clock() - self._began, 1e-9))

    def refused(self, sent: float) -> str:
        """The server was too busy for a request that was sent at this time; returns what is to be said, or ""."""
        if sent < self._shrunk_at or self.limit == 1:  # of the same wave, or nothing to take away
            return ""
        self._shrunk_at = self._clock()
        before, said = self.limit, self._growing
        self._growing, self._ceiling = False, before
        self.limit, self._answered = max(1, before // 2), 0
        return f"the server refuses {before} requests at a time; {self.limit} are under way" if said else ""

    def _try(self, limit: int) -> str:
        self.limit, self._missed = limit, False
        self._answered = self._tokens = 0
        return ""

    def _judged(self, speed: float) -> str:
        if speed > RISE * self._best:
            self._best, self._best_limit = speed, self.limit
            if self.limit < self._most:
                return self._try(min(2 * self.limit, self._most))
            self._settle()
            return f"{self.limit} requests are under way, the most that this process opens: {speed:,.0f} tokens/s"
        if not self._missed:  # measured once more, since one round may have been slow by chance
            self._speed_above = speed
            self._try(self.limit)
            self._missed = True
            return ""
        above, faster = self.limit, max(speed, self._speed_above)
        self._settle()
        said = f"{self.limit} requests are under way: {self._best:,.0f} tokens/s; {above} at a time give {faster:,.0f}"
        return said

    def _settle(self) -> None:
        self._growing, self.limit, self._ceiling, self._answered = False, self._best_limit, self._best_limit, 0

    def _recovered(self) -> str:
        if self.limit < self._ceiling and self._answered >= self.limit:
            self.limit, self._answered = self.limit + 1, 0
        return ""
