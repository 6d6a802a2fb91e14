"""What torchrun, Slurm or the parent told this process; one rank where nothing was told."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Loaded here, because a process that was just forked must not load a library.
PRCTL = ctypes.CDLL(None).prctl
ERROR_FILE = "SFT_ERROR_FILE"  # the file to which a command that sft started writes its error


def rank(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of this process among all ranks; 0 without a launcher."""
    return int(environ.get("RANK", "0"))


def world_size(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of ranks on all machines; 1 without a launcher."""
    return int(environ.get("WORLD_SIZE", "1"))


def local_rank(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of this process among the ranks of its machine; also its GPU's number."""
    return int(environ.get("LOCAL_RANK", "0"))


def local_world_size(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of ranks on this machine; 1 without a launcher."""
    return int(environ.get("LOCAL_WORLD_SIZE", "1"))


def launched(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether a launcher started this process as a rank, maybe as the only one."""
    return "RANK" in environ


def from_torchrun(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun is the parent of this process, which it ends if a rank fails."""
    return "TORCHELASTIC_RUN_ID" in environ


def restarts(environ: Mapping[str, str] = os.environ) -> int:
    """Return how often torchrun has restarted the ranks after a failure."""
    return int(environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


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
