"""Progress of long commands: a bar on a terminal, and elsewhere (SLURM, nohup, a file) plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
Report = Callable[[int, str], None]
EVERY = 30.0  # seconds from one line to the next at most, while something is done
SOONEST = 1.0  # and at least


def has_bars() -> bool:
    """Whether stderr shows a bar that moves: a terminal, or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def write_line(text: str) -> None:
    """Write a line to stderr at once."""
    print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`0:07:05`, hours first."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def rate(count: float, seconds: float) -> str:
    """`3.2` of something a second, with three digits."""
    value = count / max(seconds, 1e-9)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


class PlainLines:
    """A line at each tenth of the work and at least every 30 seconds, with rate and time left.

    Args:
        what: the work, at the start of each line.
        unit: what is counted, in the plural.
        total: how many of them; `None` where that is not known.
        write: takes a line.
        clock: gives seconds.
    """

    def __init__(
        self,
        what: str,
        unit: str,
        total: int | None = None,
        write: Callable[[str], None] = write_line,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.unit, self.total, self.write, self.clock = what, unit, total, write, clock
        self.done = self._written = 0
        self._start = self._last = clock()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Note that so many more are done; `note` says what they were."""
        self.done += count
        since = self.clock() - self._last
        tenth = self.total is not None and 10 * self.done // max(self.total, 1) > 10 * self._written // max(
            self.total, 1
        )
        if since >= EVERY or self.done == self.total or (tenth and since >= SOONEST):
            self._write(note)

    def finish(self) -> None:
        """Write the last line, where it is not written yet."""
        if self.done > self._written:
            self._write("")

    def _write(self, note: str) -> None:
        passed = self.clock() - self._start
        total = f" of {self.total:,}" if self.total else ""
        line = f"{self.what}: {self.done:,}{total} {self.unit}, {rate(self.done, passed)} a second"
        if self.total and self.done < self.total:
            line += f", {duration(passed / max(self.done, 1) * (self.total - self.done))} left"
        elif self.done == self.total:
            line += f", {duration(passed)} in all"
        self.write(line + (f" ({note})" if note else ""))
        self._last, self._written = self.clock(), self.done


@contextmanager
def show_progress(what: str, unit: str, total: int | None = None, disable: bool = False) -> Iterator[Report]:
    """Show progress; what it gives is called with how many more are done, and what they were.

    A bar appears with the first call: what comes before may have one of its own.

    Args:
        what: the work.
        unit: what is counted, in the plural.
        total: how many of them.
        disable: show nothing, as on other processes than the main one.
    """
    if disable:
        yield _silent
    elif not has_bars():
        lines = PlainLines(what, unit, total)
        yield lines.advance
        lines.finish()
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
        task = bar.add_task(what, total=total)

        def report(count: int, note: str = "") -> None:
            bar.start()
            bar.update(task, advance=count, description=note or what)

        try:
            yield report
        finally:
            bar.stop()


def _silent(count: int, note: str = "") -> None:
    """Show nothing."""


def tracked(items: Iterable[Item], what: str, unit: str, total: int | None = None) -> Iterator[Item]:
    """The same items, with their progress shown."""
    total = len(items) if total is None and isinstance(items, Sized) else total
    with show_progress(what, unit, total) as report:
        for item in items:
            yield item
            report(1, "")
