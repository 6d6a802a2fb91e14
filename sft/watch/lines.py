"""The lines and the bar that show on a terminal and in a log how a run goes."""

from __future__ import annotations

import logging
import sys
from typing import Any

from transformers.trainer_callback import ProgressCallback

logger = logging.getLogger("sft")


class Lines(ProgressCallback):  # type: ignore[misc]
    """Writes one line per logged step, and shows a progress bar on a terminal."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar if stderr is a terminal."""
        self.current_step = state.global_step
        if state.is_world_process_zero and sys.stderr.isatty():
            super().on_train_begin(args, state, control)
            self.training_bar.update(state.global_step)
            self.current_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the bar."""
        if self.training_bar is not None:
            super().on_step_end(args, state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar."""
        if self.training_bar is not None:
            super().on_train_end(args, state, control)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Write one line."""
        line = describe(logs or {}, state.global_step, state.max_steps)
        if not line or not state.is_world_process_zero:
            return
        if self.training_bar is not None:
            self.training_bar.clear()
        logger.info(line)
        if self.training_bar is not None:
            self.training_bar.refresh()


def describe(logs: dict[str, Any], step: int, max_steps: int) -> str:
    """Format a logged record as one aligned line; empty for records that get no line."""
    where = f"step {step:>{len(str(max_steps))}}/{max_steps}"
    if "eval_loss" in logs:
        return (
            f"{where}  eval loss {logs['eval_loss']:.4f}  "
            f"perplexity {logs['eval_perplexity']:.4g}  tokens {logs['eval_tokens']:,}"
        )
    if "exact_match" in logs:
        return f"{where}  exact match {logs['exact_match']:.1%} of {logs['exact_match_rows']}"
    if "loss" in logs:
        norm = f"  grad norm {logs['grad_norm']:.3g}" if "grad_norm" in logs else ""
        return f"{where}  loss {logs['loss']:.4f}{norm}  lr {logs['learning_rate']:.2e}{pace(logs)}"
    return ""


def pace(logs: dict[str, Any]) -> str:
    """Format the speed, the time left, the memory and MFU of a training record."""
    if "seconds_per_step" not in logs:
        return ""
    # On a GPU: allocated by tensors, reserved by PyTorch, used by all processes.
    names = ("memory_allocated", "memory_reserved", "memory_device")
    used = [logs[name] for name in names if name in logs] or [logs["memory_resident"]]
    memory = "/".join(f"{size / 2**30:.1f}" for size in used)
    mfu = f"  MFU {logs['mfu']:.0%}" if "mfu" in logs else ""
    return (
        f"  {logs['tokens_per_second']:,.0f} tokens/s  {logs['seconds_per_step']:.3g} s/step"
        f"  {clock(logs['seconds_left'])} left  {memory} GiB{mfu}"
    )


def clock(seconds: float) -> str:
    """Format a duration as 0:48, 12:05, 3:07:12 or 2 d 03:07."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
