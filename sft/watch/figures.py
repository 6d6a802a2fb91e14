"""What a logged line says of speed, memory and time left; and where the time of a step goes."""

from __future__ import annotations

import contextlib
import resource
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from sft.watch.operations import Operations

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
            if name in self.took:
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
        return self._stream.record_event(torch.cuda.Event(enable_timing=True))

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


class Figures(TrainerCallback):  # type: ignore[misc]
    """Adds to each logged training record how fast the run is, and where its time goes.

    Attributes:
        clock: The trainer marks its parts.
        operations: Counts what the trainer shows it; made with the first micro-batch.
    """

    def __init__(
        self,
        device: torch.device,
        peak: Callable[[], float | None],
        due: Callable[[], dict[str, int]],
    ) -> None:
        """Set up.

        Args:
            device: The device that trains.
            peak: Returns the operations per second that this rank's device can do at most; None if
                that is not known.
            due: Returns how many evaluations and saves are to come.
        """
        self.device, self.peak, self.due = device, peak, due
        self.operations: Operations | None = None
        self.clock, self.pace = Clock(device), Pace()
        self.peaks: float | None = None  # of all ranks
        self._own_peak: float | None = None
        self._total = [0.0, 0.0]  # tokens, and operations done, by all ranks since the start
        self._step = 0

    def facts(self, parameters: int) -> dict[str, float | None]:
        """Return what run.json says of operations.

        Args:
            parameters: All parameters of the model.
        """
        tokens, done = self._total
        return {
            "per_token": round(done / tokens) if tokens and done else None,
            "convention_6n": 6 * parameters,
            "peak_per_second": self.peaks,
        }

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock with the first epoch, after the checks and the first evaluation."""
        if not self.clock.started:
            self._own_peak = self.peak()
            self.clock.start()
            self._step = state.global_step
            self.pace.step(time.perf_counter() - self.clock.apart)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Count the time since the backward pass."""
        self.clock.mark("optimizer")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time of the step."""
        self.pace.step(time.perf_counter() - self.clock.apart)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Add the figures to a training record, which later callbacks write; on all ranks.

        The Trainer has copied the record into its state already: a checkpoint has none of these.
        """
        if logs is None or not self.clock.started:
            return
        if "train_runtime" in logs:  # after the last step: its evaluation and its checkpoint
            logs |= _named(self.clock.flush())
        if "loss" not in logs:
            return
        sums, largest = self._of_all_ranks()
        parts = self.clock.flush()
        steps, self._step = state.global_step - self._step, state.global_step
        seconds = sum(took for name, took in parts.items() if name not in APART)
        logs |= {
            "tokens_per_second": round(sums["tokens"] / seconds, 1),
            "seconds_per_step": round(seconds / steps, 4),
            "seconds_left": round(self._left(state), 1),
            **_named(parts),
            **largest,
        }
        if sums["done"]:
            logs["operations_per_second"] = float(f"{sums['done'] / seconds:.4g}")
            if self.peaks:
                logs["mfu"] = round(sums["needed"] / seconds / self.peaks, 4)

    def _left(self, state: Any) -> float:
        """Estimate the seconds until the run's last step has been evaluated and saved."""
        steps = (state.max_steps - state.global_step) * (self.pace.seconds_per_step or 0.0)
        for part, times in self.due().items():
            recent = self.clock.took[part][-3:]
            steps += times * statistics.mean(recent) if recent else 0.0
        return steps

    def _of_all_ranks(self) -> tuple[dict[str, float], dict[str, int]]:
        """Return the sums of the ranks' counts, and the largest of their peaks of memory."""
        counted = (0.0, 0.0, 0.0) if self.operations is None else self.operations.flush()
        memory = peak_memory(self.device)
        own = torch.tensor(
            [*counted, self._own_peak or 0.0, *memory.values()], dtype=torch.float64, device=self.device
        )
        every = [own]
        if dist.is_initialized():
            every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
            dist.all_gather(every, own)
        rows = [row.tolist() for row in every]
        tokens, needed, done, peak = (sum(row[column] for row in rows) for column in range(4))
        self.peaks = peak if all(row[3] for row in rows) else None
        self._total = [self._total[0] + tokens, self._total[1] + done]
        largest = {
            name: int(max(row[4 + column] for row in rows)) for column, name in enumerate(memory)
        }
        return {"tokens": tokens, "needed": needed, "done": done}, largest


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the bytes of memory of this process at their peak, and on a GPU those of the device.

    ``memory_device`` is what all processes use on the device now.
    """
    found = {"memory_resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found |= {
            "memory_allocated": torch.cuda.max_memory_allocated(device),
            "memory_reserved": torch.cuda.max_memory_reserved(device),
            "memory_device": total - free,
        }
    return found


def _named(parts: dict[str, float]) -> dict[str, float]:
    return {f"seconds_{part}": round(took, 4) for part, took in parts.items()}
