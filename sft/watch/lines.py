"""The lines and the bar that show on a terminal and in a log how a run goes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

from transformers.trainer_callback import ProgressCallback

from sft.config.evaluation import RESULT, is_evaluation

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
    if is_evaluation(logs):
        return f"{where}  {'  '.join(_evaluated(logs))}"
    if "exact_match" in logs:
        return f"{where}  {_answered(logs)}"
    if "loss" in logs:
        norm = f"  grad norm {logs['grad_norm']:.3g}" if "grad_norm" in logs else ""
        return (
            f"{where}  loss {logs['loss']:.4f}{norm}  lr {logs['learning_rate']:.2e}  "
            f"epoch {logs['epoch']:.2f}"
        )
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
