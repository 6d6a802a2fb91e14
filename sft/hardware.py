"""Measure the memory that this rank may use."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from sft import process


def available() -> int:
    """Return the free bytes of this rank's GPU or, without a GPU, its share of the free memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(process.local_rank())[0])
    return free_memory() // process.local_world_size()


def free_memory() -> int:
    """Return the bytes of this machine's memory, or of the container's limit, that are free."""
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")  # a container's limit may be below the machine's memory
    limit = group / "memory.max"
    if limit.is_file() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int((group / "memory.current").read_text()))
    return free
