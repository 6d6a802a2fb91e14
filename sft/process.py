"""Read rank and world size from the environment that torchrun sets; one rank without it."""

from __future__ import annotations

import os
from collections.abc import Mapping


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
