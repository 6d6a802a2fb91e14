"""The memory that this rank may use, and settings that need a GPU."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from sft import process
from sft.config.settings import Config
from sft.errors import ConfigError, Problem


def available() -> int:
    """Return the free bytes of this rank's GPU or, without a GPU, its share of the free memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(process.local_rank())[0])
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")  # a container's limit may be below the machine's memory
    limit = group / "memory.max"
    if limit.is_file() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int((group / "memory.current").read_text()))
    return free // process.local_world_size()


def require(config: Config) -> None:
    """Check that no setting needs a GPU where there is none, before anything is loaded.

    Raises:
        ConfigError: One does.
    """
    offloads = "activation_offloading"
    if config.train.extra.get(offloads) and not torch.cuda.is_available():
        rule = "moves activations from a GPU to the CPU's memory, and this machine has no GPU"
        fix = f"train.gradient_checkpointing=true, without train.extra.{offloads}"
        raise ConfigError([Problem(f"train.extra.{offloads}=true", rule, fix)])
