"""profile=torch: a trace of some steps, their most expensive operations, and a GPU's memory."""

from __future__ import annotations

import contextlib
import functools
import gzip
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback

from sft.attributes import replaced
from sft.config.settings import ProfileConfig
from sft.files import PARTIAL, to_disk, to_json, write_text
from sft.watch.recording import BACKWARD, DATA, FORWARD, OPTIMIZER, ROWS, STEP, at_peak, costs

logger = logging.getLogger("sft")

ALLOCATIONS = 100_000  # the newest ones are kept; each takes some KB of the CPU's memory


class TorchProfile(TrainerCallback):  # type: ignore[misc]
    """Records the steps from ``profile.start`` on, on this rank, with PyTorch's profiler.

    A step is recorded from the loading of its rows to the end of its update. An evaluation could be
    of any length, so the recording ends before one. Nothing is installed in the trainer before the
    first of these steps but a look at the number of the step.
    """

    def __init__(self, trainer: Any, settings: ProfileConfig, folder: Path) -> None:
        """Set up the recording.

        Args:
            trainer: The trainer whose steps are recorded.
            settings: The section ``profile``.
            folder: The folder of the recordings.
        """
        self._trainer, self._folder = trainer, folder
        self._rank: int = trainer.args.process_index
        self._first, self._last = settings.start, settings.start + settings.steps - 1
        self._steps: list[int] = []  # that are recorded
        self._profiler: Any = None
        self._waiting, self._hooks = contextlib.ExitStack(), contextlib.ExitStack()
        self._step: Any = None  # the range of the step that is recorded now

    def __enter__(self) -> TorchProfile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write what is recorded, unless Ctrl-C asks to end at once."""
        self._finish(write=kind is not KeyboardInterrupt)
        self._waiting.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for the first step, unless an earlier start of the run has recorded it."""
        if self._file("trace", "json.gz").exists():
            return
        if state.global_step >= self._last:
            self._say(
                f"profile=torch records nothing: the run goes on after step {state.global_step}; "
                f"profile.start={state.global_step + 3} records steps that follow"
            )
            return
        trainer = self._trainer
        load, evaluate = trainer.get_batch_samples, trainer.evaluate

        def load_recorded(*args: Any, **kwargs: Any) -> Any:
            self._begin_step(state.global_step + 1)
            with record_function(DATA) if self._profiler else contextlib.nullcontext():
                return load(*args, **kwargs)

        def evaluate_unrecorded(*args: Any, **kwargs: Any) -> Any:
            self._finish()
            return evaluate(*args, **kwargs)

        hooks = {"get_batch_samples": load_recorded, "evaluate": evaluate_unrecorded}
        self._waiting.enter_context(replaced(trainer, hooks))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the range of the step, and after the last one the recording."""
        if self._profiler is not None:
            self._end_step()
            self._steps.append(state.global_step)
            if state.global_step >= self._last:
                self._finish()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write what is recorded, and say so if training has ended before the first step of it."""
        self._finish()
        if state.global_step < self._first:
            self._say(
                f"profile=torch has recorded nothing: training ended with step "
                f"{state.global_step}, before profile.start={self._first}"
            )

    def _begin_step(self, step: int) -> None:
        if self._profiler is None and not self._steps and self._first <= step <= self._last:
            self._begin()
        if self._profiler is not None:
            self._step = record_function(f"{STEP}{step}")
            self._step.__enter__()

    def _end_step(self) -> None:
        step, self._step = self._step, None
        if step is not None:
            step.__exit__(None, None, None)

    def _begin(self) -> None:
        """Start to record, and name the phases of a step in the trace."""
        activities, trainer = [ProfilerActivity.CPU], self._trainer
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        else:
            # Without a GPU, the library that records prints only that it starts and stops.
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        profiler = profile(activities=activities, record_shapes=True)
        try:
            # PyTorch would end a recording that goes on.
            if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
                raise RuntimeError("this process is being profiled already")
            profiler.start()
        except RuntimeError as error:
            logger.warning("profile=torch cannot record: %s", error)
            self._waiting.close()
            return
        self._profiler = profiler
        if torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(
                context="alloc", stacks="python", max_entries=ALLOCATIONS
            )
        # Under DeepSpeed, the engine makes the update within the call of backward.
        optimizer = trainer.optimizer if trainer.deepspeed is None else trainer.deepspeed
        for owner, method, phase in (
            (trainer, "compute_loss", FORWARD),
            (trainer.accelerator, "backward", BACKWARD),
            (optimizer, "step", OPTIMIZER),
        ):
            hook = {method: _named(phase, getattr(owner, method))}
            self._hooks.enter_context(replaced(owner, hook))

    def _finish(self, write: bool = True) -> None:
        """End the recording and write its files; if that fails, the run goes on."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        self._end_step()
        self._hooks.close()
        self._waiting.close()
        try:
            profiler.stop()
            snapshot = None
            if torch.cuda.is_available():
                snapshot = torch.cuda.memory._snapshot()
                torch.cuda.memory._record_memory_history(None)
            if write and self._steps:
                self._write(profiler, snapshot)
        # PyTorch's errors are RuntimeErrors, also where a GPU has failed and training with it.
        except (OSError, RuntimeError) as error:
            logger.warning("profile=torch: %s is incomplete: %s", self._folder, error)

    def _write(self, profiler: Any, snapshot: dict[str, Any] | None) -> None:
        """Write all files; the trace is the last, because it says that the others exist."""
        self._folder.mkdir(exist_ok=True)
        events, cuda = profiler.key_averages(), torch.cuda.is_available()
        order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        table = events.table(sort_by=order, row_limit=ROWS, max_name_column_width=80)
        write_text(self._file("operations", "txt"), table)
        found = {"steps": self._steps, **costs(events, cuda)}
        write_text(self._file("operations", "json"), to_json(found, indent=1) + "\n")
        if snapshot is not None:
            peak = at_peak(snapshot, torch.cuda.current_device())
            write_text(self._file("memory", "json"), to_json(peak, indent=1) + "\n")
        _write_trace(profiler, self._file("trace", "json.gz"))
        first, last = self._steps[0], self._steps[-1]
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        self._say(f"profile=torch: the trace of {steps} is in {self._folder}")

    def _file(self, name: str, suffix: str) -> Path:
        return self._folder / f"{name}_rank{self._rank}.{suffix}"

    def _say(self, line: str) -> None:
        if self._rank == 0:
            logger.info(line)


def _write_trace(profiler: Any, final: Path) -> None:
    """Write the trace, compressed, into a file that is complete or absent."""
    plain, packed = (final.with_name(final.name + suffix) for suffix in (".json", PARTIAL))
    try:
        profiler.export_chrome_trace(str(plain))
        with plain.open("rb") as trace, gzip.open(packed, "wb", compresslevel=6) as file:
            # The library does not say when the disk was full before the end of the trace.
            trace.seek(-8, os.SEEK_END)
            if not trace.read().rstrip().endswith(b"}"):
                raise OSError(f"the disk is full: {plain} is incomplete")
            trace.seek(0)
            shutil.copyfileobj(trace, file)
        to_disk(packed)
        packed.replace(final)
    finally:
        for path in (plain, packed):
            path.unlink(missing_ok=True)


def _named(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is called within a range of that name in the trace."""

    @functools.wraps(function)
    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(phase):
            return function(*args, **kwargs)

    return named
