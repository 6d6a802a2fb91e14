"""Where the time of a run goes, and how much of it is left."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

import torch

PARTS = ("data", "compute", "optimizer", "evaluation", "saving", "other")
APART = ("evaluation", "saving")  # not a part of the time of a step
RECENT = 100  # steps whose times the time left is estimated from
MOST = 512  # CUDA events that wait to be read


class Clock:
    """Divides the time since the last logged line into parts, which sum to all of it.

    On a GPU an event is recorded in its stream at each mark, and the events are read when the step
    is logged, so that the CPU never waits for it. The parts are then those of the GPU's time, in
    which it waits for data as well.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._last: Any = None
        self._waiting: list[tuple[str, Any, Any]] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._inside: list[str] = []
        self.apart = 0.0  # seconds of evaluations and saves, of the CPU's clock
        self.took: dict[str, list[float]] = {name: [] for name in APART}

    def start(self) -> None:
        """Begin the first interval; marks before it count nothing."""
        self._last = self._now()

    @property
    def started(self) -> bool:
        """Whether ``start`` was called."""
        return self._last is not None

    def mark(self, part: str) -> None:
        """Add the time since the last mark to a part."""
        if self._last is None:
            return
        now = self._now()
        if self._stream is None:
            self._seconds[part] += now - self._last
        else:
            self._waiting.append((part, self._last, now))
            if len(self._waiting) > MOST:
                self._read(len(self._waiting) // 2)
        self._last = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of a block to a part."""
        self.mark(self._inside[-1] if self._inside else "other")
        self._inside.append(name)
        began = time.perf_counter()
        try:
            yield
        finally:
            self.mark(self._inside.pop())
            took = time.perf_counter() - began
            if name in APART and not self._inside:
                self.apart += took
            if name in self.took and name not in self._inside:
                self.took[name].append(took)

    def flush(self) -> dict[str, float]:
        """Return the seconds of each part since the last call, and begin the next interval."""
        self.mark("other")
        self._read(len(self._waiting))
        seconds, self._seconds = self._seconds, defaultdict(float)
        return {part: seconds[part] for part in PARTS}

    def _now(self) -> Any:
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        return self._stream.record_event(event)

    def _read(self, count: int) -> None:
        """Read the oldest events."""
        done, self._waiting = self._waiting[:count], self._waiting[count:]
        if done:
            done[-1][2].synchronize()
        for part, begin, end in done:
            self._seconds[part] += begin.elapsed_time(end) / 1000


class Pace:
    """Estimates the time left from the recent steps, and from evaluations and saves to come."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._before: float | None = None

    def step(self, now: float) -> None:
        """Note the end of a step, at a time from which evaluations and saves are left out."""
        if self._before is not None:
            self._recent.append(now - self._before)
        self._before = now

    @property
    def seconds_per_step(self) -> float | None:
        """The mean of the recent steps without those far slower, such as the first; None: none."""
        if not self._recent:
            return None
        usual = statistics.median(self._recent)
        return statistics.mean(took for took in self._recent if took <= 3 * usual)
