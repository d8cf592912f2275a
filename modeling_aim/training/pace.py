"""How fast a run goes: what it logs, plain lines where there is no terminal, and the hours that are left."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..progress import duration, write_line

WARM_UP = 2  # first steps that are slower than the others
MEASURED = 5  # steps before a rate is shown


class Pace:
    """Episodes, tokens and images a second, and the share of the time that reading takes, from one log to the next.

    Args:
        reading: gives the seconds that this process has read demonstrations for.
        processes: that work at the same pace.
    """

    def __init__(self, reading: Callable[[], float], processes: int = 1) -> None:
        self.reading, self.processes = reading, processes
        self._counts: Counter[str] = Counter()
        self._since: float | None = None
        self._read = 0.0

    def count(self, counts: Mapping[str, int]) -> None:
        """Note the episodes, tokens and images of a batch; the first one starts the clock."""
        if self._since is None:
            self._since, self._read = time.perf_counter(), self.reading()
        self._counts.update({name: int(count) for name, count in counts.items()})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time that this block takes, and what it reads."""
        start, before = time.perf_counter(), self.reading()
        try:
            yield
        finally:
            self._read += self.reading() - before
            if self._since is not None:
                self._since += time.perf_counter() - start

    def report(self) -> dict[str, float]:
        """Figures since the last report; none before the first batch."""
        if self._since is None:
            return {}
        passed = max(time.perf_counter() - self._since, 1e-9)
        figures = {
            f"{name}_per_second": _rounded(self.processes * self._counts[name] / passed)
            for name in ("episodes", "tokens", "images")
        }
        figures["reading_share"] = round(min(max(self.reading() - self._read, 0.0) / passed, 1.0), 4)
        self._counts.clear()
        self._since, self._read = time.perf_counter(), self.reading()
        return figures


class LogLines(TrainerCallback):
    """One plain line for each log, with the time left: for runs without a terminal."""

    def __init__(self) -> None:
        self._begun: tuple[float, int] | None = None
        self._held: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._begun = time.perf_counter(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the line of this log."""
        if logs is None or not state.is_world_process_zero:
            return
        self._held |= {name: logs[name] for name in ("eval_loss", "eval_accuracy") if name in logs}
        where = f"step {state.global_step:,} of {state.max_steps:,}"
        if "eval_accuracy" in logs:
            held = "" if "eval_loss" not in self._held else f"held-out loss {self._held['eval_loss']:.4f}, "
            write_line(f"{where}: {held}held-out accuracy {logs['eval_accuracy']:.3f}")
        if "loss" in logs:
            write_line(f"{where}: {self._figures(logs)}{self._left(state)}")

    def _figures(self, logs: Mapping[str, float]) -> str:
        figures = [f"loss {logs['loss']:.4f}", f"rate {logs.get('learning_rate', 0.0):.2e}"]
        for name in ("episodes", "tokens", "images"):
            if f"{name}_per_second" in logs:
                figures.append(f"{logs[f'{name}_per_second']:,g} {name}/s")
        if "reading_share" in logs:
            figures.append(f"reading {logs['reading_share']:.0%}")
        return ", ".join(figures)

    def _left(self, state: TrainerState) -> str:
        if self._begun is None or state.global_step <= self._begun[1]:
            return ""
        seconds = (time.perf_counter() - self._begun[0]) / (state.global_step - self._begun[1])
        return f", {duration(seconds * (state.max_steps - state.global_step))} left"


class StepTimes(TrainerCallback):
    """Measure some steps after the first ones, and pass their times on.

    Args:
        reading: gives the seconds that this process has read demonstrations for.
        measured: is called once, with the median seconds of a step, the share of reading, and the steps done.
    """

    def __init__(self, reading: Callable[[], float], measured: Callable[[float, float, int], None]) -> None:
        self.reading, self.measured = reading, measured
        self._ends: list[tuple[float, float]] = []
        self._disturbed = False
        self._seconds: list[float] = []
        self._read = 0.0
        self.done = False

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A step that is followed by an evaluation is not measured."""
        self._disturbed = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A step that is followed by a save is not measured."""
        self._disturbed = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the time; after enough steps, or at the end, hand it on."""
        now = time.perf_counter(), self.reading()
        if self._ends and not self._disturbed:
            self._seconds.append(now[0] - self._ends[-1][0])
            self._read += now[1] - self._ends[-1][1]
        self._ends, self._disturbed = [now], False
        last = state.global_step >= state.max_steps
        if not self.done and self._seconds and (len(self._seconds) >= WARM_UP + MEASURED - 1 or last):
            self.done = True
            share = self._read / max(sum(self._seconds), 1e-9)
            usual = statistics.median(self._seconds[-MEASURED:])
            self.measured(usual, min(share, 1.0), state.global_step)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
