"""How far a generation is: a bar with the time left, tokens a second and refused answers; in a pipe a line at times.

Called by every kind of generation, on the first rank.
"""

import sys
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30


class Progress:
    """A context: `add` for each finished item."""

    def __init__(self, total: int, done_before: int, unit: str, shown: bool) -> None:
        """
        Args:
            done_before: of `total`, finished by earlier starts.
            shown: False on ranks that say nothing.
        """
        self._total, self._unit, self._shown = total, unit, shown
        self._done, self._before = done_before, done_before
        self._tokens, self._refused = 0, 0
        self._began = self._said = time.monotonic()
        self._bar = tqdm(
            total=total, initial=done_before, unit=unit, disable=not (shown and sys.stderr.isatty()), dynamic_ncols=True
        )

        if shown and self._bar.disable:
            print(f"{done_before:,} of {total:,} {unit} are finished; asks for {total - done_before:,}", flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def add(self, record: dict[str, Any]) -> None:
        """Count an item with its tokens and refused answers."""
        self._done += 1
        self._tokens += record["tokens"]
        self._refused += len(record["causes"])
        rate = self._tokens / max(time.monotonic() - self._began, 1e-9)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s, {self._refused:,} refused", refresh=False)
        self._bar.update()
        last = self._done == self._total
        if self._shown and self._bar.disable and (last or time.monotonic() - self._said > SECONDS_BETWEEN_LINES):
            self._said = time.monotonic()
            print(self._line(rate), flush=True)

    def _line(self, rate: float) -> str:
        spent = time.monotonic() - self._began
        left = spent / (self._done - self._before) * (self._total - self._done)
        return (
            f"{self._done:,} of {self._total:,} {self._unit}: {rate:,.0f} tokens/s, {self._refused:,} answers refused, "
            f"{tqdm.format_interval(left)} left"
        )
