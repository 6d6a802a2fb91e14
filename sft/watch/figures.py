"""What a logged line says of speed, memory and time left."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from sft.watch.clock import APART, Clock, Pace
from sft.watch.operations import Operations


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

    def facts(self, parameters: int) -> dict[str, Any]:
        """Return what run.json says of operations.

        Args:
            parameters: All parameters of the model.
        """
        tokens, done = self._total
        return {
            "per_token": round(done / tokens) if tokens and done else None,
            "left_out": [] if self.operations is None else self.operations.left_out,
            "convention_6n": 6 * parameters,
            "peak_per_second": self.peaks and float(f"{self.peaks:.4g}"),
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
        if "train_loss" in logs:  # after the last step: its evaluation and its checkpoint
            logs |= _named(self.clock.flush())
        if "loss" not in logs:
            return
        sums, largest = self._of_all_ranks()
        parts, now = self.clock.flush(), time.time()
        steps, self._step = state.global_step - self._step, state.global_step
        seconds = sum(took for name, took in parts.items() if name not in APART)
        logs |= {
            "time": round(now, 3),  # at which the parts end
            "tokens_per_second": round(sums["tokens"] / seconds, 1),
            "seconds_per_step": round(seconds / steps, 6),
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
        left: float = (state.max_steps - state.global_step) * (self.pace.seconds_per_step or 0.0)
        for part, times in self.due().items():
            recent = self.clock.took[part][-3:]
            left += times * statistics.mean(recent) if recent else 0.0
        return left

    def _of_all_ranks(self) -> tuple[dict[str, float], dict[str, int]]:
        """Return the sums of the ranks' counts, and the largest of their peaks of memory."""
        counted = (0.0, 0.0, 0.0) if self.operations is None else self.operations.flush()
        memory = peak_memory(self.device)
        own = torch.tensor(
            [*counted, self._own_peak or 0.0, *memory.values()],
            dtype=torch.float64,
            device=self.device,
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
    return {f"seconds_{part}": round(took, 6) for part, took in parts.items()}
