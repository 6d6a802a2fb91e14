"""Read what torchrun tells a process in its environment; without torchrun there is one rank."""

from __future__ import annotations

import os
from collections.abc import Mapping


def launched(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether a launcher has started this process as one of its ranks."""
    return "RANK" in environ


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


def restarts(environ: Mapping[str, str] = os.environ) -> int:
    """Return how many times torchrun has restarted the ranks; 0 without it."""
    return int(environ.get("TORCHELASTIC_RESTART_COUNT") or "0")
