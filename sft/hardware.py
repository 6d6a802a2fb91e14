"""What the machine has: how much memory this rank may use."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from sft import process


def available() -> int:
    """Return the bytes that this rank may use: of its GPU, or its share of the free memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(process.local_rank())[0])
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")  # of a container, which may have less than the machine
    limit = group / "memory.max"
    if limit.is_file() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int((group / "memory.current").read_text()))
    return free // process.local_world_size()
