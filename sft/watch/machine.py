"""Alerts about the machine: no step has ended for long, and the disk is almost full; on rank 0."""

from __future__ import annotations

import shutil
import statistics
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sft.checkpoint import folders, sharded
from sft.watch.alerts import Alerts

MEASURED = 5  # steps whose time must be known before a stall is alerted
FLOOR = 60.0  # seconds without a step, at least, before a stall is alerted
PATIENCE = 1800.0  # the same during work that may take long; ranks that hang end after this time


class Stall(TrainerCallback):  # type: ignore[misc]
    """Alerts if no step has ended for many times the median time of a step.

    A thread watches, so that it alerts while this rank waits for another one in a collective
    operation. It reads clocks only: neither a device nor the trainer.
    """

    def __init__(self, alerts: Alerts, floor: float = FLOOR, poll: float = 1.0) -> None:
        """Set up the watchdog; its thread runs from the first step to the last.

        Args:
            alerts: Takes the alert, and notes that the run goes on.
            floor: Seconds without a step, at least.
            poll: Seconds between two looks.
        """
        self.alerts, self.floor, self.poll = alerts, floor, poll
        self.seconds: deque[float] = deque(maxlen=100)  # of the last steps
        self.step = 0
        self._ended = threading.Event()

    def limit(self) -> float | None:
        """Return the seconds without a step that are a stall; None: not known yet."""
        if len(self.seconds) < MEASURED or self.alerts.settings.stall is None:
            return None
        floor = PATIENCE if self.alerts.patient else self.floor
        return max(self.alerts.settings.stall * statistics.median([*self.seconds]), floor)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the thread."""
        self.step = state.global_step
        self._ended.clear()
        threading.Thread(target=self._watch, daemon=True).start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure the step, or what was done since the last evaluation or checkpoint."""
        self.seconds.append(time.monotonic() - self.alerts.alive_at)
        self.step = state.global_step
        self.alerts.alive()
        self.alerts.recovered("stall")

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        """Note that the run goes on."""
        self.alerts.alive()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """End the thread."""
        self.close()

    def close(self) -> None:
        """End the thread; after an error, too."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(self.poll):
            limit, silent = self.limit(), time.monotonic() - self.alerts.alive_at
            if limit is not None and silent > limit:
                usual = statistics.median([*self.seconds])
                self.alerts.add(
                    "stall",
                    self.step,
                    f"no step has ended for {silent:.0f} s after step {self.step}; a step takes "
                    f"{usual:.3g} s",
                )


class Disk(TrainerCallback):  # type: ignore[misc]
    """Alerts if the disk of the run's folder has room for too few checkpoints.

    The size of a checkpoint is that of the newest one; before the first, it is estimated from the
    number of trained parameters.
    """

    def __init__(self, alerts: Alerts, folder: Path) -> None:
        self.alerts, self.folder = alerts, folder
        self.size = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Estimate a checkpoint's size: float32 values, Adam's two moments, and the weights."""
        for parameter in kwargs["model"].parameters():
            if parameter.requires_grad:
                count = sharded.shape_of(parameter).numel()
                self.size += count * (12 + parameter.element_size())
        self._look(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at the disk at every logged line."""
        self._look(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at the disk after every checkpoint."""
        self._look(state.global_step)

    def _look(self, step: int) -> None:
        least = self.alerts.settings.disk
        if least is None:
            return
        try:
            for newest in folders.checkpoints(self.folder)[:1]:
                self.size = sum(file.stat().st_size for file in newest.rglob("*"))
            free = shutil.disk_usage(self.folder).free
        except OSError:  # the folder is gone, or being deleted; saving says so
            return
        if free >= least * self.size:
            self.alerts.recovered("disk")
            return
        self.alerts.add(
            "disk",
            step,
            f"{free / 2**20:,.0f} MiB are free on the disk of {self.folder}: room for fewer than "
            f"{least:g} checkpoints of {self.size / 2**20:,.1f} MiB",
        )
