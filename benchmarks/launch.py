"""Start ``sft.train`` for soak.py, as a user does, or forked from a process with its imports done.

Imports take eight seconds of a core on each rank. A warm start forks the launcher from a process
that has imported the libraries; the launcher runs torchrun's own agent, which forks the ranks. A
cold start is ``torchrun -m sft.train``. Signals and exit codes are real in both.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path


class Cold:
    """A command in a new session."""

    def __init__(self, ranks: int, settings: Sequence[str], log: Path, environ: dict[str, str]):
        words = [sys.executable, "-m"]
        if ranks > 1:
            words += ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
        with log.open("wb") as output:
            self.child = subprocess.Popen(
                [*words, "sft.train", *settings],
                env=environ,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.pid = self.child.pid

    def code(self, seconds: float = 0) -> int | None:
        """Wait for the exit code; None: the command is still running."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(seconds)
        return self.child.poll()


class Warm:
    """The same, forked from a process that has imported the libraries."""

    def __init__(self, ranks: int, settings: Sequence[str], log: Path, environ: dict[str, str]):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["datasets", "sft.training.trainer", "torch.distributed.run"]
        )
        self.child = context.Process(target=_command, args=(ranks, settings, log, environ))
        self.child.start()
        self.pid = self.child.pid

    def code(self, seconds: float = 0) -> int | None:
        wait([self.child.sentinel], seconds)
        return self.child.exitcode


def _command(ranks: int, settings: Sequence[str], log: Path, environ: dict[str, str]) -> None:
    """Run the command in this process: alone, or as torchrun's agent."""
    os.setsid()
    log.write_bytes(b"")
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environ)
    if ranks == 1:
        _rank(settings)
        return
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        *(1, 1, ranks),
        logs_specs=DefaultLogsSpecs(),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, _own_session)(settings)


def _own_session(settings: Sequence[str]) -> None:
    """Prepare a forked rank like one that torchrun executes: a new session, default handlers."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _rank(settings)


def _rank(settings: Sequence[str]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of loader workers: a command's default
    sys.argv = ["train", *settings]
    runpy.run_module("sft.train", run_name="__main__", alter_sys=True)
