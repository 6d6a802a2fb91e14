"""Callbacks of a run: the metrics file, and the check that ranks stay equal."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sft.checkpoint import folders, sharded
from sft.config.evaluation import is_evaluation
from sft.errors import RunError
from sft.files import read_records, to_json, write_text
from sft.ranks import gather, trained_bits


class MetricsFile(TrainerCallback):  # type: ignore[misc]
    """Appends every logged record to metrics.jsonl."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Append one record."""
        if state.is_world_process_zero:
            now = round(time.time(), 3)
            record = {"step": state.global_step, "time": now, **(logs or {})}
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(to_json(record) + "\n")
            except OSError as error:
                folders.require_run(self.path.parent)
                raise RunError(
                    f"{self.path} cannot be written: {error}\n"
                    "    fix: free disk space, then give the same command again to resume the run"
                ) from error

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remove the records that a resumed run will log again: those after its checkpoint."""
        if state.is_world_process_zero and self.path.is_file():
            step = state.global_step
            # For the checkpoint's own step, keep only the records that existed when it was saved.
            own = [log for log in state.log_history if log["step"] == step]
            trained, evaluated = any("loss" in log for log in own), any(map(is_evaluation, own))
            kept = [
                record
                for record in read_records(self.path)
                if step
                and record["step"] <= step
                and (
                    record["step"] < step
                    or ("loss" in record and trained)
                    or (is_evaluation(record) and evaluated)
                )
            ]
            write_text(self.path, "".join(f"{to_json(record)}\n" for record in kept))


class RanksAgree(TrainerCallback):  # type: ignore[misc]
    """Compares the trained parameters of all ranks bit by bit after each of the first two steps.

    Ranks whose gradients are no longer synchronised still show normal losses. Two steps are
    compared, because with a warm-up the first step has learning rate 0 and changes nothing.
    """

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare, unless ZeRO-3 gives each rank its own part of the parameters.

        Raises:
            RunError: The ranks hold different parameters.
        """
        self.steps += 1
        if self.steps > 2 or args.world_size == 1:
            return
        model = kwargs["model"]
        if sharded.any_sharded(model):
            return
        sums = gather(trained_bits(model))
        if len(set(sums)) > 1:
            different = [rank for rank, value in enumerate(sums) if value != sums[0]]
            raise RunError(
                f"after step {state.global_step} the trained parameters of ranks {different} "
                "differ from rank 0's: gradients are not synchronised\n"
                "    fix: use the same versions, files and settings on every node"
            )


class BeforeTraining(TrainerCallback):  # type: ignore[misc]
    """Runs an action after the model is wrapped, and before the first step of this start."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action = action

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Run the action."""
        self.action()


class EverySteps(TrainerCallback):  # type: ignore[misc]
    """Runs an action on rank 0 after every so many steps.

    It runs before the next step, when all of the step has been logged.
    """

    def __init__(self, every: int, action: Callable[[], object]) -> None:
        self.every, self.action = every, action

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Run the action if it is due."""
        due = state.global_step > 0 and state.global_step % self.every == 0
        if due and state.is_world_process_zero:
            self.action()
