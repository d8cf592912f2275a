"""Time and memory of the methods: medians over repeats in which the methods take turns."""

from __future__ import annotations

import ctypes
import gc
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from ..backbone_aim import longest_prompt
from .counting import Counted, Twin, count, kv_bytes
from .methods import METHODS, WITHOUT_DEMONSTRATIONS, Bench, Call, Clock, call_of
from .shapes import free_memory

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Measurement:
    """What was measured of one method with so many demonstrations.

    Args:
        counted: what it should cost.
        ttft_ms: milliseconds to the first token, one value a repeat.
        decode_ms: milliseconds a further token.
        around_ms: milliseconds of a call outside the backbone's own `generate` (of `overhead` alone).
        peak_bytes: most memory above that of the models, with what the method keeps; `None` where the system does not
            say.
        kv_bytes: keys and values of the prompt.
        failed: why there are no figures.
        positions: how many the backbone knows, where the prompt has more: it can be computed, and means nothing.
    """

    counted: Counted
    ttft_ms: list[float] = field(default_factory=list)
    decode_ms: list[float] = field(default_factory=list)
    around_ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    kv_bytes: int | None = None
    failed: str | None = None
    positions: int | None = None

    @property
    def method(self) -> str:
        """Which method."""
        return self.counted.method

    @property
    def shots(self) -> int:
        """How many demonstrations."""
        return self.counted.shots

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        times = {name: spread(getattr(self, name)) for name in ("ttft_ms", "decode_ms", "around_ms")}
        measured = {"peak_bytes": self.peak_bytes, "measured_kv_bytes": self.kv_bytes, "failed": self.failed}
        measured["beyond_positions"] = self.positions
        return {**self.counted.as_dict(), **times, **measured}


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, quartiles and number of values."""
    if not values:
        return None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "low": low, "high": high, "repeats": len(values)}


class Memory:
    """Memory of a device, or of this process."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"

    def settle(self) -> None:
        """Give back what is not used."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        else:
            with suppress(OSError, AttributeError):  # the C library is not glibc
                ctypes.CDLL("libc.so.6").malloc_trim(0)

    def now(self) -> int | None:
        """Bytes in use."""
        self.settle()
        return torch.cuda.memory_allocated() if self.cuda else self._status("VmRSS")

    def forget_peak(self) -> None:
        """Measure the peak from here on."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):  # not Linux: `now` gives None
                CLEAR.write_text("5")

    def peak(self) -> int | None:
        """Most bytes in use since `forget_peak`."""
        return torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")

    @staticmethod
    def _status(name: str) -> int | None:
        try:
            lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        except OSError:
            return None
        return int(lines[name].split()[0]) * 1024


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


class Measuring:
    """Methods that take turns.

    Args:
        bench: the backbone and its prompts.
        twin: the same backbone without weights, to say what each method should cost.
        methods: names of `METHODS`.
        repeats: how often each is measured.
        tokens: tokens of an answer.
        demo_tokens, query_tokens: of the prompts.
    """

    def __init__(
        self, bench: Bench, twin: Twin, methods: Sequence[str], repeats: int, tokens: int,
        demo_tokens: int, query_tokens: int,
    ) -> None:  # fmt: skip
        self.bench, self.twin, self.methods = bench, twin, list(methods)
        self.repeats, self.tokens, self.lengths = repeats, tokens, (demo_tokens, query_tokens)
        self.device = str(bench.model.device)
        self.memory = Memory(self.device)
        self._ready: dict[str, Call] = {}

    def run(self, shots: Sequence[int], progress: Progress | None = None) -> list[Measurement]:
        """Measure each number of demonstrations."""
        METHODS["zero"](self.bench, 0)(Clock(), 2)  # what the first call of all costs belongs to no method
        gc.collect()
        gc.freeze()  # all that is there stays there, and need not be looked through each time
        try:
            return self._run(shots, progress)
        finally:
            gc.unfreeze()
            self._release()

    def _run(self, shots: Sequence[int], progress: Progress | None) -> list[Measurement]:
        rows: list[Measurement] = []
        counts = {n: [m for m in self.methods if n or m in WITHOUT_DEMONSTRATIONS] for n in shots}
        passes = sum(len(methods) for methods in counts.values()) * (self.repeats + 1)
        task = None if progress is None else progress.add_task("measuring", total=passes)
        for n, methods in counts.items():
            self._release()
            by_method = {name: Measurement(self._counted(name, n)) for name in methods}
            for repeat in range(self.repeats + 1):  # the first is for warming up, and for memory
                turn = repeat % max(len(methods), 1)
                for name in methods[turn:] + methods[:turn]:
                    if progress is not None and task is not None:
                        progress.update(task, advance=1, description=f"{name}, {n} demonstrations")
                    if by_method[name].failed is None:
                        self._try(by_method[name], warm=repeat == 0)
            rows += by_method.values()
        return rows

    def _counted(self, name: str, shots: int) -> Counted:
        counted = count(self.twin, "zero" if name == "overhead" else name, shots, *self.lengths)
        return Counted(**{**counted.as_dict(), "method": name})

    def _try(self, row: Measurement, warm: bool) -> None:
        """One pass of a method. What others keep must not be what it lacks, so it is tried again without that."""
        for attempt in range(2):
            try:
                return self._pass(row, warm)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                reason = f"out of memory with {row.shots} demonstrations"
            self._release()  # here the error no longer holds the tensors of the failed pass
            if attempt:
                row.failed = reason

    def _pass(self, row: Measurement, warm: bool) -> None:
        self._check_room(row)
        if row.failed is not None:
            return
        before = self.memory.now() if warm else None
        if row.method not in self._ready:
            self._ready[row.method] = call_of(self.bench, row.method, row.shots)
        if warm:
            self.memory.settle()
            self.memory.forget_peak()
        clock = Clock()
        cache = self._ready[row.method](clock, 1 if warm else self.tokens)
        if warm:
            row.kv_bytes, peak = kv_bytes(cache), self.memory.peak()
            row.peak_bytes = None if before is None or peak is None else max(peak - before, 0)
            return
        row.ttft_ms.append(clock.first_token)
        if clock.around is not None:
            row.around_ms.append(clock.around)
        if clock.each_token is not None:
            row.decode_ms.append(clock.each_token)

    def _check_room(self, row: Measurement) -> None:
        """What need not be tried; a system without memory ends a process instead of telling it."""
        longest = longest_prompt(self.bench.backbone.config)
        if longest is not None and row.counted.positions > longest:
            row.positions = longest
            if row.method.startswith(("bank", "cold", "depth")):  # which the plug-in refuses
                row.failed = f"{row.counted.prompt_tokens} tokens, but the backbone has {longest} positions"
        needed = row.counted.kv_bytes * self.bench.backbone.dtype.itemsize // 2
        free = free_memory(self.device)
        if not self.memory.cuda and not row.ttft_ms and free is not None and needed > free:
            row.failed = f"out of memory with {row.shots} demonstrations: its KV alone needs {needed / 2**30:.1f} GiB"

    def _release(self) -> None:
        self._ready.clear()
        self.bench.release()
        self.memory.settle()
