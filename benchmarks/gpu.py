"""Measures everything that is claimed, on one GPU, in minutes.

    python benchmarks/gpu.py [--budget 480] [--output gpu.jsonl] [--only WORD ...] [--skip WORD ...]
        [--tiny] [--list]

It needs one H100 or H200 (or less, for what fits it), no network and no file beside the repository.
Stages run by importance: what the machine is, what is right, what is fast, what memory it takes.
Each gives one row, which is printed and appended to ``--output`` (JSON lines, on the disk) as it
ends. A stage that raises, crashes or runs out of its time loses that row only: it is then in it
with the last lines of the error, and the stages after it run in a new process. What no longer fits
``--budget`` (seconds) is skipped. ``--only`` and ``--skip`` take parts of stages' names.

Without a GPU, or with ``--tiny``, the shapes are tiny: that the script works is then all it shows.
"""

import argparse
import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import gpu_commands
import gpu_fast
import gpu_machine
import gpu_right
from gpu_parts import Skip

HERE = Path(__file__).resolve()
STARTING = 90  # seconds that a process may take to import everything
LEAST = 1 / 4  # a stage is begun where so much of its limit is left of the budget


@dataclass(frozen=True)
class Stage:
    """One row.

    Attributes:
        name: What it is called.
        process: Stages of one process follow each other in it.
        limit: Seconds, after which it is ended.
        run: Gives its figures; a list ``wrong`` among them says which promises are broken.
        beside: It runs beside its neighbours of which the same is said.
    """

    name: str
    process: str
    limit: float
    run: Callable[[], dict[str, Any]]
    beside: bool = False


def fast(name: str, limit: float, function: Callable[..., dict[str, Any]], *a: Any, **k: Any):
    return Stage(f"fast.{name}", "train", limit, partial(function, f"fast.{name}", *a, **k))


def command(name: str, limit: float, function: Callable[..., dict[str, Any]], *a: Any) -> Stage:
    return Stage(f"right.{name}", "commands", limit, partial(function, *a), beside=True)


def against_trl(shape: str) -> Iterator[Stage]:
    """Yield ours and TRL's in turn, padded or joined, then packed."""
    for how, packing in (("", False), (".packed", True)):
        yield fast(f"{shape}.ours{how}", 60, gpu_fast.beside, shape, packing)
        yield fast(f"{shape}.trl{how}", 60, gpu_fast.trl, shape, packing=packing)


STAGES = [
    Stage("machine.packages", "train", 90, gpu_machine.packages),
    Stage("machine.device", "train", 30, gpu_machine.device),
    Stage("machine.product", "train", 30, gpu_machine.product),
    Stage("machine.memory", "train", 30, gpu_machine.memory),
    *(
        Stage(f"right.attention.{name}", "train", 30, partial(gpu_right.attention, name))
        for name in gpu_right.FAMILIES
    ),
    Stage("right.head.chunked", "train", 30, partial(gpu_right.head, "chunked")),
    Stage("right.head.trl", "train", 60, partial(gpu_right.head, "trl")),
    Stage("right.precision.bf16", "train", 40, partial(gpu_right.precision, "bf16")),
    Stage("right.precision.fp16", "train", 40, partial(gpu_right.precision, "fp16")),
    command("demo", 150, gpu_commands.demo),
    command("kill", 120, gpu_commands.kill),
    command("nf4", 150, gpu_commands.quantized, "nf4"),
    command("int8", 150, gpu_commands.quantized, "int8"),
    command("zero.stage1", 90, gpu_commands.zero, "stage1"),
    command("zero.stage2", 90, gpu_commands.zero, "stage2"),
    command("zero.stage3", 90, gpu_commands.zero, "stage3"),
    command("zero.stage2_offload", 90, gpu_commands.zero, "stage2_offload"),
    command("zero.stage3_offload", 90, gpu_commands.zero, "stage3_offload"),
    command("zero.stage2.fp16", 90, gpu_commands.zero, "stage2", "fp16"),
    command("prove", 120, gpu_commands.prove),
    command("merge.cpu", 150, gpu_commands.merge),
    command("merge.gpu", 150, gpu_commands.merge_on_gpu),
    fast("llama-3.1-8b", 60, gpu_fast.llama, "train.gradient_checkpointing=false"),
    fast("llama-3.1-8b.2-rows", 60, gpu_fast.llama, size=2),
    fast("llama-3.1-8b.recomputed", 60, gpu_fast.llama, "train.gradient_checkpointing=true"),
    fast("llama-3.1-8b.profile", 60, gpu_fast.llama, profiled=2),
    *against_trl("qwen3-0.6b"),
    *against_trl("opt-125m"),
    *(fast(f"head.{k}", 40, gpu_fast.head, k) for k in ("trl", "chunked", "plain")),
    *(
        fast(f"attention.{kind}", 40, gpu_fast.kernel, kind)
        for kind in ("packed", "sdpa", "eager", "flash_attention_2")
    ),
    *(
        Stage(f"memory.{name}", "train", 40, partial(gpu_fast.memory, name))
        for name in gpu_fast.MEMORY
    ),
    *(
        fast(f"qwen3-0.6b.{who}.again", 60, function, "qwen3-0.6b", packing=False)
        for who, function in (("ours", gpu_fast.beside), ("trl", gpu_fast.trl))
    ),
]


def fail() -> dict[str, Any]:
    raise RuntimeError("planted")


def hang() -> dict[str, Any]:
    subprocess.run(["sleep", "600.25"])
    return {}


def die() -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


# To see that a fault loses its own row only: run where --only names them.
PLANTED = [
    Stage("planted.failure", "planted", 5, fail),
    Stage("planted.hang", "planted", 1, hang),
    Stage("planted.death", "planted", 5, die),
    Stage("planted.wrong", "planted", 5, lambda: {"wrong": ["planted"], "figure": 1}),
]


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


def work() -> None:
    """Run the stages that the standard input names, and write their rows to standard output."""
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    lock = threading.Lock()
    by_name = {stage.name: stage for stage in [*STAGES, *PLANTED]}

    def say(message: dict[str, Any]) -> None:
        with lock:
            rows.write(json.dumps(message, default=str) + "\n")
            rows.flush()

    process = sys.argv[-1]
    try:
        preload(process)
    except Exception:  # the first stage names what is missing; others may do without
        traceback.print_exc()
    beside = process == "commands" and gpu_commands.has_gpu()  # a CPU's are forked from this thread
    say({"ready": process, "beside": beside})
    for line in sys.stdin:
        order = json.loads(line)
        stages = [by_name[name] for name in order["stages"]]
        gpu_commands.deadline = time.monotonic() + order["seconds"]
        if len(stages) == 1:
            row = perform(stages[0])
            say({**row, "last": poisoned(row)})
            continue
        threads = [threading.Thread(target=lambda s=s: say(perform(s))) for s in stages]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def preload(process: str) -> None:
    """Import what the stages need, so that their time is their own."""
    if process == "planted" or (process == "commands" and gpu_commands.has_gpu()):
        return  # on a GPU each command imports for itself
    began = time.perf_counter()
    from sft import environment

    environment.prepare()
    import sft.train
    import sft.trainer  # noqa: F401

    if process == "commands":
        import deepspeed  # noqa: F401
    gpu_machine.import_seconds = time.perf_counter() - began


def poisoned(row: dict[str, Any]) -> bool:
    """Tell whether the process is of no further use: CUDA's errors stay, but for lack of memory."""
    error = str(row.get("error", ""))
    return "CUDA error" in error or "AcceleratorError" in error or "Triton Error" in error


class Process:
    """A process that runs stages, with everything that it starts."""

    def __init__(self, name: str, work_dir: Path, tiny: bool) -> None:
        self.name = name
        self.log = work_dir / f"{name}.log"
        self.beside = False  # stages may run beside each other in it
        self.said_before = 0  # bytes of the log, when the stages that run now began
        paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
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
            [sys.executable, str(HERE), "--worker", name],
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
        """Begin stages; a process that has died is noticed by who reads."""
        self.said_before = self.log.stat().st_size
        message = {"stages": [stage.name for stage in stages], "seconds": seconds}
        with contextlib.suppress(BrokenPipeError):
            self.popen.stdin.write(json.dumps(message) + "\n")
            self.popen.stdin.flush()

    def read(self, until: float) -> dict[str, Any]:
        """Give the next message.

        Raises:
            TimeoutError: There is none in time.
            ChildProcessError: It has died.
        """
        try:
            message = self.messages.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            raise TimeoutError("ran out of its time") from None
        if message is None:
            raise ChildProcessError(f"its process ended with {self.popen.wait(10)}")
        return message

    def last_lines(self) -> str:
        with self.log.open(errors="replace") as file:
            file.seek(self.said_before)
            return file.read()[-1500:]

    def end(self) -> None:
        """Kill it with all its descendants."""
        below = []
        with contextlib.suppress(Exception):  # psutil may be missing, the process gone
            import psutil

            below = psutil.Process(self.popen.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        for process in below:
            with contextlib.suppress(Exception):
                process.kill()
        self.popen.wait()


class Session:
    """Runs stages within a budget, and keeps their rows."""

    def __init__(self, given: argparse.Namespace, work_dir: Path, output: TextIO | None) -> None:
        self.given, self.work_dir, self.output = given, work_dir, output
        self.until = time.monotonic() + given.budget
        self.processes: dict[str, Process] = {}
        self.counts: dict[str, int] = {}

    def keep(self, row: dict[str, Any]) -> None:
        """Print a row, and append it to the output, on the disk."""
        self.counts[row["status"]] = self.counts.get(row["status"], 0) + 1
        print(described(row), flush=True)
        if self.output is not None:
            self.output.write(json.dumps(row) + "\n")
            self.output.flush()
            os.fsync(self.output.fileno())

    def fits(self, stage: Stage) -> bool:
        return self.until - time.monotonic() >= LEAST * stage.limit

    def run(self, stages: list[Stage]) -> None:
        """Run stages in their order; those that may, beside each other."""
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
        """Give the process of this name; one that has lost a stage is not used again."""
        if name not in self.processes:
            process = self.processes[name] = Process(name, self.work_dir, self.given.tiny)
            message = process.read(min(self.until, time.monotonic() + STARTING))
            process.beside = message["beside"]
        return self.processes[name]

    def leave(self, name: str) -> None:
        """End a process."""
        self.processes.pop(name).end()

    def close(self) -> None:
        """End all."""
        for name in list(self.processes):
            self.leave(name)

    def together(self, process: Process, batch: list[Stage]) -> None:
        """Run stages at the same time, or one."""
        now = time.monotonic()
        seconds = min(max(stage.limit for stage in batch), self.until - now)
        # Commands end a little before, and say how far they came.
        process.order(batch, seconds - 5 * (len(batch) > 1))
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
        """Say which stages gave no row, and end their process."""
        status = "timeout" if isinstance(error, TimeoutError) else "failed"
        said = self.processes[name].last_lines()
        self.leave(name)
        for stage in stages:
            text = f"{error}\n{said}".strip()
            self.keep({"stage": stage.name, "status": status, "error": text})


def described(row: dict[str, Any]) -> str:
    """Put a row into one line, or a few where it failed."""
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


def chosen(given: argparse.Namespace) -> list[Stage]:
    """Give the stages that ``--only`` and ``--skip`` leave, in their order."""
    planted = any(word.startswith("planted") for word in given.only)
    every = [*PLANTED, *STAGES] if planted else STAGES
    for word in [*given.only, *given.skip]:
        if not any(word in stage.name for stage in every):
            sys.exit(f"error: no stage has {word} in its name\n    fix: --list shows them")
    return [
        stage
        for stage in every
        if (not given.only or any(word in stage.name for word in given.only))
        and not any(word in stage.name for word in given.skip)
    ]


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work()
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=480, help="seconds, of everything")
    parser.add_argument("--output", type=Path, help="a file that rows are appended to")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD")
    parser.add_argument("--skip", nargs="+", default=[], metavar="WORD")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--list", action="store_true", help="name the stages")
    given = parser.parse_args()
    stages = chosen(given)
    if given.list:
        print("\n".join(f"{stage.name:<36}{stage.limit:>5.0f} s" for stage in stages))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    work_dir = Path(tempfile.mkdtemp(prefix="sft-gpu-"))
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, work_dir, ignore_errors=True)
        output = stack.enter_context(given.output.open("a")) if given.output else None
        session = Session(given, work_dir, output)
        stack.callback(session.close)
        try:
            session.run(stages)
        except KeyboardInterrupt:
            sys.exit(130)
    counts = ", ".join(f"{number} {status}" for status, number in session.counts.items())
    print(f"{len(stages)} stages in {time.monotonic() - began:.0f} s: {counts}")
    sys.exit(bool(session.counts.get("failed") or session.counts.get("timeout")))


if __name__ == "__main__":
    main()
