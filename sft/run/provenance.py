"""What a run was computed with: versions of the libraries, sft's commit, the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sft.config.paths import HOME_DIR

LIBRARIES = (
    "sft",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "deepspeed",
    "datasets",
    "bitsandbytes",
)


def provenance() -> dict[str, Any]:
    """Return what ``run.json`` says of the software and the hardware."""
    return {"versions": versions(), "git": git_commit(), "hardware": hardware()}


def versions() -> dict[str, str]:
    """List the installed versions that decide what a run computes."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def git_commit() -> str | None:
    """Return sft's commit; None if sft does not run from a git clone."""
    if not (HOME_DIR / ".git").exists():
        return None
    words = ["git", "-C", str(HOME_DIR), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # git is not installed
        return None
    return result.stdout.strip() or None


def hardware() -> dict[str, Any]:
    """List the machine's processors, memory (GiB) and GPUs."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpus": os.cpu_count(), "memory_gib": round(memory, 1), "gpus": gpus}
