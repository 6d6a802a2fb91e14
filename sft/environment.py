"""What the libraries read from the environment, what they may say, and how they are left."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import sys
import warnings
from pathlib import Path
from typing import IO

logger = logging.getLogger("sft")

_extensions: IO[str] | None = None  # held for life


def prepare(distributed: bool = False) -> None:
    """Set the environment and silence notices; call before anything heavy is imported.

    Args:
        distributed: DeepSpeed is used: it wants a process group for one rank too, and without
            torchrun's variables it would look for MPI.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        ours = Path(sys.prefix) / "torch_extensions"
        os.environ["TORCH_EXTENSIONS_DIR"] = str(ours)
        if distributed:
            free_compile_locks(ours)
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


def free_compile_locks(folder: Path) -> None:
    """Remove what compilations that were killed have locked: every later start would wait for it.

    The lock of a compilation is a file, which says nothing of its owner. So each of our processes
    holds a shared lock on the folder, which the kernel frees as it dies: who gets the folder alone
    is the only one, and every file that is there is of the dead.
    """
    global _extensions
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _extensions = (folder / "in-use").open("w")
    except OSError:  # a read-only environment, where nothing can be compiled either
        return
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(_extensions, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for lock in folder.glob("*/lock"):
            logger.info("removing %s: its owner was killed", lock)
            lock.unlink(missing_ok=True)
    fcntl.flock(_extensions, fcntl.LOCK_SH)


def rejoin() -> None:
    """After torchrun restarted the ranks, meet the others under keys that are new.

    torchrun's store outlives the ranks it restarts, and the addresses of the dead are still in it:
    those who start anew would try to reach them.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or dist.is_initialized():
        return
    store, rank, ranks = next(rendezvous("env://"))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=PrefixStore(f"restart{restarts}", store),
        rank=rank,
        world_size=ranks,
    )


def lost_a_rank(error: BaseException) -> bool:
    """Say whether this is how the ranks that live notice that another has died."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )


def end_process_group() -> None:
    """Leave the process group; without it one run in two aborts at exit under ZeRO-1."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
