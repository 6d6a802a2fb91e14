"""Callbacks of a run: the metrics file, and the check that ranks stay equal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from sft import process
from sft.checkpoint import folders, sharded
from sft.config.settings import ProfileConfig
from sft.errors import RunError
from sft.files import read_records, to_json, write_text
from sft.ranks import gather, trained_bits
from sft.watch.lines import Lines


class MetricsFile(TrainerCallback):  # type: ignore[misc]
    """Appends every logged record to metrics.jsonl."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Append one record."""
        if state.is_world_process_zero:
            record = {"step": state.global_step, **(logs or {})}
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
            logged = {key for log in state.log_history if log["step"] == step for key in log}
            kept = [
                record
                for record in read_records(self.path)
                if step
                and record["step"] <= step
                and (record["step"] < step or logged & record.keys() & {"loss", "eval_loss"})
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
    """Runs an action after the model is wrapped for training and before the first step."""

    def __init__(self, action: Callable[[], object], on_resume: bool = False) -> None:
        self.action = action
        self.on_resume = on_resume

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Run the action; in a resumed run only with ``on_resume``."""
        if state.global_step == 0 or self.on_resume:
            self.action()


def watch(trainer: Any, metrics: Path) -> None:
    """Replace the Trainer's printing callbacks by ours, and add the check of the ranks."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    for callback in (Lines(), MetricsFile(metrics), RanksAgree()):
        trainer.add_callback(callback)


@contextlib.contextmanager
def profiled(trainer: Any, settings: ProfileConfig, folder: Path, system: Path) -> Iterator[None]:
    """Record the training of a block as the section ``profile`` says; however it ends, this does.

    Args:
        trainer: Its steps are recorded with ``profile=torch``.
        settings: The section ``profile``.
        folder: The folder of ``profile=torch``.
        system: The file of ``profile=system`` on the first machine.
    """
    with contextlib.ExitStack() as ending:
        if settings.torch:
            from sft.watch.profile import TorchProfile

            recording = ending.enter_context(TorchProfile(trainer, settings, folder))
            # The first one: what the others do after a step is no part of it.
            trainer.callback_handler.callbacks.insert(0, recording)
        if settings.system and process.local_rank() == 0:
            from sft.watch.system import System, file_of

            ending.enter_context(System(file_of(system, process.node()), settings.interval))
        yield
