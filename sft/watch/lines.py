"""The lines and the bar that show on a terminal and in a log how a run goes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from sft.config.evaluation import RESULT, is_evaluation
from sft.progress import Progress

logger = logging.getLogger("sft")


class Lines(TrainerCallback):  # type: ignore[misc]
    """Writes one line per logged step, and shows a bar on a terminal."""

    bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar. A log gets a line for each logged step instead."""
        steps = state.max_steps, "steps"
        self.bar = Progress("training", *steps, done=state.global_step, lines=False, at_once=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.done)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Write one line, and show the loss and the speed in the bar."""
        logs = logs or {}
        if self.bar is not None and "loss" in logs:
            speed = logs.get("tokens_per_second")
            shown = f", {tqdm.format_sizeof(speed)} tokens/s" if speed else ""
            self.bar.note = f"loss {logs['loss']:.4f}{shown}"
        line = describe(logs, state.global_step, state.max_steps)
        if line and state.is_world_process_zero:
            logger.info(line)


def describe(logs: dict[str, Any], step: int, max_steps: int) -> str:
    """Format a logged record as one aligned line; empty for records that get no line."""
    where = f"step {step:>{len(str(max_steps))}}/{max_steps}"
    if is_evaluation(logs):
        return f"{where}  {'  '.join(_evaluated(logs))}"
    if "exact_match" in logs:
        return f"{where}  {_answered(logs)}"
    if "loss" in logs:
        norm = f"  grad norm {logs['grad_norm']:.3g}" if "grad_norm" in logs else ""
        return f"{where}  loss {logs['loss']:.4f}{norm}  lr {logs['learning_rate']:.2e}{pace(logs)}"
    return ""


def _evaluated(logs: dict[str, Any]) -> Iterator[str]:
    """Yield the parts of the line of an evaluation: those of the main rows, then of each set."""
    if "eval_loss" in logs:
        yield f"eval loss {logs['eval_loss']:.4f}"
        yield f"perplexity {logs['eval_perplexity']:.4g}  tokens {logs['eval_tokens']:,}"
    for found in filter(None, map(RESULT.fullmatch, logs)):
        name, figure = found.groups()
        if name is not None and figure == "loss":
            yield f"{name} loss {logs[found[0]]:.4f}"
    if "exact_match" in logs:
        yield _answered(logs)


def _answered(logs: dict[str, Any]) -> str:
    return f"exact match {logs['exact_match']:.1%} of {logs['exact_match_rows']}"


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
