"""Run the stages of ``gpu.py`` in processes that may crash, within a budget; save each row."""

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import gpu_commands
import gpu_machine
from gpu_parts import ROOT, Skip, end_tree

SCRIPT = Path(__file__).resolve().with_name("gpu.py")
STARTING = 90  # seconds that a process may take to import everything
LEAST = 1 / 4  # a stage is begun where so much of its limit is left of the budget


@dataclass(frozen=True)
class Stage:
    """One measurement, which gives one row.

    Attributes:
        name: Its name.
        process: The name of its process; the stages of a process run one after the other.
        limit: The seconds after which it is ended.
        run: Returns its figures; the entry ``wrong`` lists the checks that failed.
        beside: It may run in parallel with neighbouring stages that have this set too.
    """

    name: str
    process: str
    limit: float
    run: Callable[[], dict[str, Any]]
    beside: bool = False


def perform(stage: Stage) -> dict[str, Any]:
    """Run a stage in this process and make its row."""
    began = time.perf_counter()
    try:
        found = stage.run()
        wrong = found.pop("wrong", [])
        row = {"status": "failed" if wrong else "ok", **found}
        row |= {"error": "; ".join(wrong)} if wrong else {}
    except Skip as reason:
        row = {"status": "skipped", "why": str(reason)}
    except BaseException as error:
        traceback.print_exc()
        status = "timeout" if isinstance(error, TimeoutError) else "failed"
        row = {"status": status, "error": f"{type(error).__name__}: {error}"[-2000:]}
    seconds = round(time.perf_counter() - began, 2)
    return {"stage": stage.name, "status": row.pop("status"), "seconds": seconds, **row}


def work(process: str, stages: list[Stage]) -> None:
    """Run the stages that the standard input names, and write their rows to standard output."""
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    lock = threading.Lock()
    by_name = {stage.name: stage for stage in stages}

    def say(message: dict[str, Any]) -> None:
        with lock:
            rows.write(json.dumps(message, default=str) + "\n")
            rows.flush()

    try:
        preload(process)
    except Exception:  # the first stage names what is missing; others may do without
        traceback.print_exc()
    beside = process == "commands" and gpu_commands.has_gpu()  # a CPU's are forked from this thread
    say({"ready": process, "beside": beside})
    for line in sys.stdin:
        order = json.loads(line)
        ordered = [by_name[name] for name in order["stages"]]
        gpu_commands.deadline = time.monotonic() + order["seconds"]
        if len(ordered) == 1:
            row = perform(ordered[0])
            say({**row, "last": poisoned(row)})
            continue
        threads = [threading.Thread(target=lambda s=s: say(perform(s))) for s in ordered]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def preload(process: str) -> None:
    """Import the libraries before the stages, so that imports do not count as their time."""
    if process == "planted" or (process == "commands" and gpu_commands.has_gpu()):
        return  # on a GPU each command imports for itself
    began = time.perf_counter()
    from sft import environment

    environment.prepare()
    import sft.train
    import sft.training.trainer  # noqa: F401

    if process == "commands":
        import deepspeed  # noqa: F401
    gpu_machine.import_seconds = time.perf_counter() - began


def poisoned(row: dict[str, Any]) -> bool:
    """Return whether the process cannot go on: every CUDA error but out-of-memory persists."""
    error = str(row.get("error", ""))
    return "CUDA error" in error or "AcceleratorError" in error or "Triton Error" in error


class Process:
    """A process that runs stages, and its descendants."""

    def __init__(self, name: str, work_dir: Path, tiny: bool) -> None:
        self.name = name
        self.log = work_dir / f"{name}.log"
        self.beside = False  # stages may run beside each other in it
        self.said_before = 0  # bytes of the log, when the stages that run now began
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "SFT_GPU_WORK": str(work_dir),
            "SFT_GPU_TINY": "1" if tiny else "",
            "SFT_CACHE_DIR": str(work_dir / "cache"),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "TMPDIR": str(work_dir),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        self.popen = subprocess.Popen(
            [sys.executable, str(SCRIPT), "--worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("ab"),
            env=environment,
            cwd=work_dir,
            text=True,
            start_new_session=True,  # so that a signal to its group ends all
        )
        self.messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.popen.stdout:
            self.messages.put(json.loads(line))
        self.messages.put(None)

    def order(self, stages: list[Stage], seconds: float) -> None:
        """Start stages; if the process has died, ``read`` raises the error."""
        self.said_before = self.log.stat().st_size
        message = {"stages": [stage.name for stage in stages], "seconds": seconds}
        with contextlib.suppress(BrokenPipeError):
            self.popen.stdin.write(json.dumps(message) + "\n")
            self.popen.stdin.flush()

    def read(self, until: float) -> dict[str, Any]:
        """Return the next message of the process.

        Raises:
            TimeoutError: No message came in time.
            ChildProcessError: The process has died.
        """
        try:
            message = self.messages.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            raise TimeoutError("ran out of its time") from None
        if message is None:
            code: Any = "its output closed"
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self.popen.wait(10)
            raise ChildProcessError(f"its process ended with {code}")
        return message

    def last_lines(self) -> str:
        with self.log.open(errors="replace") as file:
            file.seek(self.said_before)
            return file.read()[-1500:]

    def end(self) -> None:
        """Kill the process and all its descendants."""
        end_tree(self.popen.pid)
        self.popen.wait()


class Session:
    """Runs stages within a budget, and saves their rows."""

    def __init__(self, given: argparse.Namespace, work_dir: Path, output: TextIO | None) -> None:
        self.given, self.work_dir, self.output = given, work_dir, output
        self.until = time.monotonic() + given.budget
        self.processes: dict[str, Process] = {}
        self.counts: dict[str, int] = {}

    def keep(self, row: dict[str, Any]) -> None:
        """Print a row, append it to the output, and flush that to the disk."""
        self.counts[row["status"]] = self.counts.get(row["status"], 0) + 1
        print(described(row), flush=True)
        if self.output is not None:
            self.output.write(json.dumps(row) + "\n")
            self.output.flush()
            os.fsync(self.output.fileno())

    def fits(self, stage: Stage) -> bool:
        return self.until - time.monotonic() >= LEAST * stage.limit

    def run(self, stages: list[Stage]) -> None:
        """Run stages in their order, in parallel where they allow it."""
        waiting = list(stages)
        while waiting:
            stage = waiting.pop(0)
            if not self.fits(stage):
                self.keep({"stage": stage.name, "status": "skipped", "why": "budget"})
                continue
            try:
                process = self.enter(stage.process)
            except (TimeoutError, ChildProcessError) as error:
                self.lose(stage.process, [stage], error)
                continue
            batch = [stage]
            while (
                process.beside and stage.beside and waiting and waiting[0].process == stage.process
            ):
                batch.append(waiting.pop(0))
            self.together(process, batch)

    def enter(self, name: str) -> Process:
        """Return the process of this name; it is a new one if a stage has ended the last."""
        if name not in self.processes:
            process = self.processes[name] = Process(name, self.work_dir, self.given.tiny)
            message = process.read(min(self.until, time.monotonic() + STARTING))
            process.beside = message["beside"]
        return self.processes[name]

    def leave(self, name: str) -> None:
        """End a process."""
        self.processes.pop(name).end()

    def close(self) -> None:
        """End all processes."""
        for name in list(self.processes):
            self.leave(name)

    def together(self, process: Process, batch: list[Stage]) -> None:
        """Run one stage, or several in parallel."""
        now = time.monotonic()
        seconds = min(max(stage.limit for stage in batch), self.until - now)
        # Commands end a little before, and say how far they came.
        process.order(batch, seconds - 5 * process.beside)
        left = {stage.name: stage for stage in batch}
        try:
            while left:
                row = process.read(now + seconds)
                is_last = row.pop("last", False)
                del left[row["stage"]]
                self.keep(row)
            if is_last:
                self.leave(process.name)
        except (TimeoutError, ChildProcessError) as error:
            self.lose(process.name, list(left.values()), error)

    def lose(self, name: str, stages: list[Stage], error: Exception) -> None:
        """Record an error as the row of stages without one, and end their process."""
        status = "timeout" if isinstance(error, TimeoutError) else "failed"
        said = self.processes[name].last_lines()
        self.leave(name)
        for stage in stages:
            text = f"{error}\n{said}".strip()
            self.keep({"stage": stage.name, "status": status, "error": text})


def described(row: dict[str, Any]) -> str:
    """Format a row as one line, or as several if the stage failed."""
    shown = []
    for name, value in row.items():
        if name in ("stage", "status", "seconds", "error") or value is None:
            continue
        if isinstance(value, float):
            value = f"{value:.4g}"
        elif isinstance(value, list | dict):
            value = json.dumps(value)[:300]
        shown.append(f"{name} {value}")
    seconds = f"{row['seconds']:.1f} s" if "seconds" in row else ""
    line = f"{row['status']:<8}{row['stage']:<34}{seconds:>8}  {', '.join(shown)}"
    error = str(row.get("error", "")).strip()
    return line + "".join(f"\n        {each}" for each in error.splitlines()[-12:])
