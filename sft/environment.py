"""What the libraries read from the environment, what they may say, and how they are left."""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from pathlib import Path


def prepare(distributed: bool = False) -> None:
    """Set the environment and silence notices; call before anything heavy is imported.

    Args:
        distributed: DeepSpeed is used: it wants a process group for one rank too, and without
            torchrun's variables it would look for MPI.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Compiled ops stay in this environment: a lock that a killed process left in a folder shared
    # by all would hang every later start.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    import torch

    # Without a process group, the Trainer would spread one process over all GPUs (DataParallel),
    # which TRL refuses: on such a machine too, one process is one rank on one GPU.
    alone = "RANK" not in os.environ
    if alone and (distributed or torch.cuda.device_count() > 1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it guessed

    import datasets
    import huggingface_hub
    import transformers

    for library in ("transformers", "torch", "trl", "peft"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity(logging.ERROR)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()


def end_process_group() -> None:
    """Leave the process group; without it one run in two aborts at exit under ZeRO-1."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
