"""Checks after every step on all ranks: signals, and a loss or gradient that is not usable."""

from __future__ import annotations

import logging
import math
import signal
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainingArguments

from sft.checkpoint import folders
from sft.config.watch_settings import AlertConfig
from sft.errors import RunError, Stopped
from sft.ranks import gather
from sft.training.signals import INTERRUPTED, STOPPED, Signals
from sft.watch.alerts import Alerts

logger = logging.getLogger("sft")

RECENT = 20  # steps over which the loss is averaged; a jump is measured against the average
# Nats per token that a loss must have risen by for an alert: near 0, a few rows that are not learnt
# yet make a loss many times the others.
JUMP = 0.5
SKIPS = 10  # the run stops after this many skipped steps in a row: the weights must be damaged


@dataclass
class Step:
    """The figures of one step, on their way to the CPU.

    Attributes:
        number: The step.
        sums: Means over all ranks: signals received, loss, gradient norm; shape (3,), on the CPU.
        losses: The losses of this rank's micro-batches, shape (micro-batches,), on the CPU.
        copied: A CUDA event after both copies; None where there is no GPU.
    """

    number: int
    sums: torch.Tensor
    losses: torch.Tensor
    copied: Any = None


class Guard(TrainerCallback):  # type: ignore[misc]
    """Stops a run on a signal once the step is saved, and on a loss that is not finite or jumps.

    The trainer reports the loss of each micro-batch and the step's gradient norm. The ranks add up
    their figures in one small all-reduce a step. On a GPU the sums are read one step later, so that
    the CPU never waits for them, and before every save.
    """

    def __init__(
        self,
        args: TrainingArguments,
        signals: Signals,
        rows_of: Callable[[int, Sequence[int]], list[int]],
        max_loss_jump: float | None,
        on_nan: str,
        alerts: Alerts | None = None,
    ) -> None:
        """Set up the checks.

        Args:
            args: The trainer's arguments.
            signals: Holds the first signal that this rank was sent.
            rows_of: Returns the rows that this rank saw in given micro-batches of a step.
            max_loss_jump: ``train.max_loss_jump``.
            on_nan: ``train.on_nan``.
            alerts: Takes the alerts of the same name; None: nobody does.
        """
        self.args, self.signals, self.rows_of = args, signals, rows_of
        self.max_loss_jump, self.on_nan = max_loss_jump, on_nan
        self.alerts = alerts or Alerts(AlertConfig(loss_jump=None))
        # The trainer sets both during a step. Tensors stay on their device.
        self.losses: list[torch.Tensor] = []  # of this rank's micro-batches
        self.norm: Any = 0.0
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.skipped = 0
        self._skips_in_a_row = 0
        self._pending: Step | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add up the ranks' figures, and check them as soon as they have reached the CPU."""
        losses = torch.stack(self.losses).double()
        self.losses.clear()
        norm = torch.as_tensor(self.norm, dtype=torch.float64, device=losses.device)
        asked = torch.full_like(norm, self.signals.received is not None)
        sums = torch.stack([asked, losses.sum(), norm])
        if dist.is_initialized():
            dist.all_reduce(sums)
        sums = sums / args.world_size
        step: Step | None
        step = here = Step(
            state.global_step,
            sums.to("cpu", non_blocking=True),
            losses.to("cpu", non_blocking=True),
        )
        if sums.is_cuda:
            here.copied = torch.cuda.current_stream().record_event()
            step, self._pending = self._pending, step
        if step is not None and self._look(step):
            self.settle()
            control.should_save = control.should_training_stop = True
            # An evaluation that is due is repeated when the run is resumed. Only the one after the
            # last step still starts: it stops the run itself, before the end of training is logged.
            control.should_evaluate &= state.global_step >= state.max_steps

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Check the last step."""
        self.settle()

    def asked(self) -> bool:
        """Return whether any rank was sent a signal. All ranks must call it."""
        self.alerts.alive()
        flag = torch.tensor(float(self.signals.received is not None), device=self.args.device)
        if dist.is_initialized():
            dist.all_reduce(flag)
        return bool(flag.item())

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores: recent losses, skipped steps, and alerts."""
        alerts = self.alerts.state()
        return {"recent": list(self.recent), "skipped": self.skipped, "alerts": alerts}

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from what ``state`` returned."""
        self.recent.extend(saved["recent"])
        self.skipped = saved["skipped"]
        self.alerts.restore(saved.get("alerts", []))  # absent before there were alerts

    def settle(self) -> None:
        """Check a step that has not been checked yet; called before every save."""
        step, self._pending = self._pending, None
        if step is not None:
            self._look(step)

    def stop(self, step: int) -> None:
        """End the run.

        Args:
            step: The last step, which has been saved; 0: no step was made.

        Raises:
            Stopped: Always, with the exit code of the process.
        """
        received = self.signals.received
        name = "another rank's signal" if received is None else signal.Signals(received).name
        where = f"after step {step}, which is saved" if step else "before the first step"
        raise Stopped(
            f"stopped by {name} {where}; give the same command again to resume the run",
            INTERRUPTED if received == signal.SIGINT else STOPPED,
        )

    def _look(self, step: Step) -> bool:
        """Check one step, and return whether any rank was sent a signal.

        Raises:
            RunError: The loss or the gradient norm is not finite, or the loss has jumped.
        """
        if step.copied is not None:
            step.copied.synchronize()
        asked, loss, norm = step.sums.tolist()
        # With fp16, the loss scaler expects infinite gradients and lowers its scale.
        finite = math.isfinite(loss) and (math.isfinite(norm) or self.args.fp16)
        if not finite:
            self._not_finite(step, loss, norm)
        else:
            self._skips_in_a_row = 0
            self.alerts.recovered("nan")
            self._jump(step, loss)
            self.recent.append(loss)
        return bool(asked)

    def _not_finite(self, step: Step, loss: float, norm: float) -> None:
        """Skip a step, or stop."""
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
        rows = self._rows(step, math.isfinite(loss))
        what = f"step {step.number}: {what}{_named(rows)}"
        self.alerts.add("nan", step.number, what, rows)
        if self.on_nan != "skip":
            self._fail(what, step, ", or train.on_nan=skip to skip such updates")
        self.skipped += 1
        self._skips_in_a_row += 1
        logger.info("%s: its update was skipped", what)
        if self._skips_in_a_row == SKIPS:
            self._fail(f"{SKIPS} steps in a row were skipped", step)

    def _jump(self, step: Step, loss: float) -> None:
        """Alert to a loss far above the recent ones, or stop."""
        usual = sum(self.recent) / RECENT if len(self.recent) == RECENT else math.inf

        def above(times: float | None) -> bool:
            return times is not None and loss > times * usual

        stops = above(self.max_loss_jump)
        alerts = above(self.alerts.settings.loss_jump) and loss > usual + JUMP
        if stops or (alerts and self.alerts.is_new("loss_jump")):
            rows = self._rows(step, True)
            what = (
                f"step {step.number}: the loss jumped to {loss:.4g}, from {usual:.4g} on average "
                f"over {RECENT} steps{_named(rows)}"
            )
            self.alerts.add("loss_jump", step.number, what, rows)
            if stops:
                self._fail(what, step, ", or a larger train.max_loss_jump")
        if not alerts:
            self.alerts.recovered("loss_jump")

    def _rows(self, step: Step, all_of_them: bool) -> list[int]:
        """List the rows of the step: those of micro-batches whose loss is not finite, or all."""
        bad = [
            number
            for number, finite in enumerate(step.losses.isfinite().tolist())
            if all_of_them or not finite
        ]
        everywhere = gather(self.rows_of(step.number, bad))
        return sorted({row for found in everywhere for row in found})

    def _fail(self, what: str, step: Step, else_: str = "") -> None:
        folder = Path(self.args.output_dir)
        good = next(iter(folders.checkpoints(folder)), None)
        there = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        raise RunError(
            f"{what}; {there}\n"
            f"    fix: check the rows of this step; use a smaller train.learning_rate{else_}"
            + (", or precision=fp32: float16 ends at 65,504" if self.args.fp16 else "")
        )


def _named(rows: Sequence[int]) -> str:
    return f" (rows {listed(rows)})" if rows else ""


def listed(rows: Sequence[int], most: int = 20) -> str:
    """Format row numbers as a list; of more than ``most``, only the first are named."""
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    return ", ".join(map(str, rows[:most])) + more
