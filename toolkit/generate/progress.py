"""How far a generation is: a bar with the time left, tokens a second and refused answers; in a pipe a line at times.

Called by every kind of generation, on the first rank. Where nothing is finished for long, that is said too.
"""

import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30
_SECONDS_BETWEEN_LOOKS = 1.0


class Progress:
    """A context: `add` for each finished item, `heard` for each answer."""

    def __init__(self, total: int, done_before: int, unit: str, shown: bool) -> None:
        """
        Args:
            done_before: of `total`, finished by earlier starts.
            shown: False on ranks that say nothing.
        """
        self._total, self._unit, self._shown = total, unit, shown
        self._done, self._before = done_before, done_before
        self._tokens, self._refused, self._heard = 0, 0, 0
        self._began = self._said = self._came = time.monotonic()
        self._bar = tqdm(
            total=total, initial=done_before, unit=unit, disable=not (shown and sys.stderr.isatty()), dynamic_ncols=True
        )

        self._ended = threading.Event()
        self._waiting = threading.Thread(target=self._say_that_it_waits, daemon=True)
        if shown and self._bar.disable:
            print(f"{done_before:,} of {total:,} {unit} are finished; asks for {total - done_before:,}", flush=True)

    def __enter__(self) -> Self:
        if self._shown:
            self._waiting.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._shown:
            self._waiting.join()
        self._bar.close()

    def _say_that_it_waits(self) -> None:
        """A line, or the bar anew, where nothing is finished for long: slow models leave minutes between two items."""
        while not self._ended.wait(_SECONDS_BETWEEN_LOOKS):
            now = time.monotonic()
            if now - max(self._said, self._came) < SECONDS_BETWEEN_LINES:
                continue
            self._said = now
            if self._bar.disable:
                print(
                    f"{self._done:,} of {self._total:,} {self._unit}: none was finished for "
                    f"{now - self._came:,.0f} s; {self._heard:,} answers have come",
                    flush=True,
                )
            else:
                self._bar.refresh()

    def heard(self) -> None:
        """Count an answer: an item may need several."""
        self._heard += 1

    def add(self, record: dict[str, Any]) -> None:
        """Count an item with its tokens and refused answers."""
        self._done += 1
        self._came = time.monotonic()
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
