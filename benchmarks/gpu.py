"""Measure on one GPU, in minutes, everything that the documentation claims.

    python benchmarks/gpu.py [--budget 480] [--output gpu.jsonl] [--only WORD ...] [--skip WORD ...]
        [--tiny] [--list]

It needs one H100 or H200 (a smaller GPU runs the stages that fit), no network, and no file outside
of the repository. Stages run in order of importance: the machine, correctness, speed, memory. Each
stage gives one row, which is printed and appended to ``--output`` (JSON lines, flushed to the disk)
when the stage ends. If a stage raises, crashes or exceeds its time, its row holds the last lines of
the error instead of figures, and later stages run in a new process. Stages that no longer fit into
``--budget`` (seconds) are skipped. ``--only`` and ``--skip`` take parts of stages' names.

Without a GPU, or with ``--tiny``, the shapes are tiny, which only tests the script.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gpu_commands
import gpu_fast
import gpu_machine
import gpu_right
from gpu_runner import Session, Stage, work


def fast(name: str, limit: float, function: Callable[..., dict[str, Any]], *a: Any, **k: Any):
    return Stage(f"fast.{name}", "train", limit, partial(function, f"fast.{name}", *a, **k))


def command(name: str, limit: float, function: Callable[..., dict[str, Any]], *a: Any) -> Stage:
    return Stage(f"right.{name}", "commands", limit, partial(function, *a), beside=True)


def against_trl(shape: str) -> Iterator[Stage]:
    """Yield the stages of sft and TRL alternately, padded or joined, then packed."""
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
    Stage("right.precision.qlora", "train", 40, partial(gpu_right.precision, "fp16", "nf4")),
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
    fast("llama-3.1-8b.peft", 60, gpu_fast.by_peft, "train.gradient_checkpointing=false"),
    fast("llama-3.1-8b.profile", 60, gpu_fast.llama, profiled=2),
    fast("qwen3-0.6b.profile", 60, gpu_fast.ours, "qwen3-0.6b", profiled=2),
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


def chosen(given: argparse.Namespace) -> list[Stage]:
    """Return the stages that ``--only`` and ``--skip`` select, in their order."""
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
        work(sys.argv[2], [*PLANTED, *STAGES])
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
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda got, _: sys.exit(128 + got))
    if given.output is not None:
        try:
            given.output.open("a").close()
        except OSError as error:
            sys.exit(f"error: {given.output} cannot be written: {error}\n    fix: --output FILE")
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
    sys.exit(not session.counts.get("ok") or bool(set(session.counts) & {"failed", "timeout"}))


if __name__ == "__main__":
    main()
