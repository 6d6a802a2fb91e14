"""Commands on processes that need not import the libraries: forked from one that has.

Importing takes each rank eight seconds of a core, and what a test trains one or two. So this is for
tests of what comes out of a run. Tests of how a command starts, restarts or ends start it as a user
does, with ``run_sft`` or torchrun; only so do ranks differ in their hash seed, too.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

TIMEOUT = 300  # seconds
LIBRARIES = ["datasets", "sft.trainer"]  # which bring torch, transformers, trl and peft


def run_warm(
    command: str, *overrides: str, ranks: int = 1, cwd: Path, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m sft.<command>``, or a script, with as many ranks as torchrun would start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "stdout", Path(folder) / "stderr"
        processes = []
        for rank in range(ranks):
            own = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            arguments = (command, overrides, {**os.environ, **own}, cwd, said)
            processes.append(context.Process(target=_rank, args=arguments))
            processes[-1].start()
        code = _ended(processes)
        out, error = (path.read_text(encoding="utf-8") for path in said)
    if check:
        assert code == 0, out + error
    return subprocess.CompletedProcess([command, *overrides], code, out, error)


def _rank(
    command: str,
    overrides: tuple[str, ...],
    environ: dict[str, str],
    cwd: Path,
    said: tuple[Path, Path],
) -> None:
    """Become what ``python -m`` would have been, in a process of its own."""
    for number, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers: a command's default
    sys.argv = [command, *overrides]
    if command.endswith(".py"):
        runpy.run_path(command, run_name="__main__")
    else:
        runpy.run_module(f"sft.{command}", run_name="__main__", alter_sys=True)


def _ended(processes: list[BaseProcess]) -> int:
    """Wait for all; where one fails, end the others as torchrun does and give its exit code."""
    deadline = time.monotonic() + TIMEOUT
    try:
        while alive := [process for process in processes if process.exitcode is None]:
            if any(process.exitcode for process in processes):
                break
            assert time.monotonic() < deadline, f"still running after {TIMEOUT} seconds"
            wait([process.sentinel for process in alive], timeout=1)
        return next((process.exitcode for process in processes if process.exitcode), 0)
    finally:
        for process in processes:
            process.terminate()
            process.join(30)
            process.kill()
            process.join()
