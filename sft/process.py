"""What torchrun, Slurm or the parent told this process; one rank where nothing was told."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from sft.errors import Problem

PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Loaded here, because a process that was just forked must not load a library.
PRCTL = ctypes.CDLL(None).prctl
ERROR_FILE = "SFT_ERROR_FILE"  # the file to which a command that sft started writes its error
# What a launcher sets: the default and the least value.
NUMBERS = {
    "RANK": (0, 0),
    "WORLD_SIZE": (1, 1),
    "LOCAL_RANK": (0, 0),
    "LOCAL_WORLD_SIZE": (1, 1),
    "TORCHELASTIC_RESTART_COUNT": (0, 0),
}


def _number(name: str, environ: Mapping[str, str]) -> int:
    """Return a launcher's number, or its default where ``problems`` reports the value."""
    default, least = NUMBERS[name]
    text = environ.get(name, "")
    return int(text) if text.isdecimal() and int(text) >= least else default


def problems(environ: Mapping[str, str] = os.environ) -> list[Problem]:
    """List the variables of a launcher that hold no number, or one that cannot be."""
    fix = "start the command with torchrun, or unset RANK, WORLD_SIZE and their LOCAL_ forms"
    found = []
    for name, (_, least) in NUMBERS.items():
        text = environ.get(name)
        if text is not None and not (text.isdecimal() and int(text) >= least):
            rule = f"this environment variable must be a whole number of at least {least}"
            found.append(Problem(f"{name}={text}", rule, fix))
    if not found and rank(environ) >= world_size(environ):
        rule = f"must be below WORLD_SIZE, which is {world_size(environ)}"
        found.append(Problem(f"RANK={rank(environ)}", rule, fix))
    return found


def rank(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of this process among all ranks; 0 without a launcher."""
    return _number("RANK", environ)


def world_size(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of ranks on all machines; 1 without a launcher."""
    return _number("WORLD_SIZE", environ)


def local_rank(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of this process among the ranks of its machine; also its GPU's number."""
    return _number("LOCAL_RANK", environ)


def local_world_size(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of ranks on this machine; 1 without a launcher."""
    return _number("LOCAL_WORLD_SIZE", environ)


def node(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of this machine among those of the run; 0 for that of rank 0."""
    given = environ.get("GROUP_RANK", "")  # only torchrun says; others start equally many ranks
    return int(given) if given.isdecimal() else rank(environ) // local_world_size(environ)


def launched(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether a launcher started this process as a rank, maybe as the only one."""
    return "RANK" in environ


def from_torchrun(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun is the parent of this process, which it ends if a rank fails."""
    return "TORCHELASTIC_RUN_ID" in environ


def command_line(hidden: Callable[[str], str] = str) -> str:
    """Return the command that started this process, or its torchrun, as a shell reads it.

    Args:
        hidden: Replaces what must not be shown of a word.
    """
    words = list(sys.orig_argv)
    if from_torchrun():
        try:
            parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
            words = os.fsdecode(parent).rstrip("\0").split("\0")
        except OSError:  # /proc is hidden
            pass
    python, script = Path(words[0]), Path(words[1]) if len(words) > 1 else Path()
    if script.is_absolute() and script.parent == python.parent:  # the interpreter of a program
        words = words[1:]
    name = Path(words[0]).name
    first = name if shutil.which(name) == words[0] else words[0]
    return shlex.join([first, *map(hidden, words[1:])])


def restarts(environ: Mapping[str, str] = os.environ) -> int:
    """Return how often torchrun has restarted the ranks after a failure."""
    return _number("TORCHELASTIC_RESTART_COUNT", environ)


def restarted(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun or Slurm has restarted this command after a failure."""
    return restarts(environ) > 0 or environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def report_failure(message: str, environ: Mapping[str, str] = os.environ) -> None:
    """Write an error to the files in which torchrun and the command that started this one look."""
    if torchrun_file := environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"timestamp": str(int(time.time()))}
        report = {"message": {"message": message, "extraInfo": extra}}
        Path(torchrun_file).write_text(json.dumps(report), encoding="utf-8")
    if sft_file := environ.get(ERROR_FILE):
        Path(sft_file).write_text(message, encoding="utf-8")


def end_with_parent(number: int) -> None:
    """Ask Linux to send this process a signal when its parent dies."""
    parent = os.getppid()
    PRCTL(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # the parent died before the call
        signal.raise_signal(number)
