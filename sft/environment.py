"""Prepare the environment and logging of the libraries for a run, and restore them afterwards."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sft import library_bars, process

logger = logging.getLogger("sft")

# Logger: the message of it that is hidden. All other warnings of these libraries are shown.
SILENCED = {
    # Logged at every import on a CPU with AVX512-BF16. The kernel needs a layout of 4-bit weights
    # that training never uses: see quantization.keep_training_layout.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # Logged at each forward pass of each int8 layer; summary.describe_run reports it once.
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
    # The Trainer accumulates gradients itself and sets 1 in Accelerate; the line "batch:" of the
    # log shows the real value.
    "accelerate.accelerator": "Gradient accumulation steps mismatch",
}

ALONE = "torch" not in sys.modules  # whether the objects of this process are those of a command

_extensions: IO[str] | None = None  # stays open, so that the process holds its lock until it ends


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import libraries without garbage collection, and exclude their objects from it.

    Python would scan their million objects many times while they are imported, and in every later
    collection: 0.8 s of a start. In a process that had torch before sft was imported, such as a
    notebook, collection goes on: its own models may be garbage later.
    """
    first = ALONE and "trl" not in sys.modules and gc.isenabled()
    if first:
        gc.disable()
    try:
        yield
    finally:
        if first:
            gc.freeze()
            gc.enable()


@importing()
def prepare(distributed: bool = False) -> None:
    """Set environment variables and hide notices; call it before the large libraries are imported.

    Args:
        distributed: Whether DeepSpeed is used. It needs a process group even for one rank, and
            without torchrun's variables it would look for MPI.
    """
    for name in SILENCED:
        logging.getLogger(name).addFilter(_is_shown)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        ours = Path(sys.prefix) / "torch_extensions"
        os.environ["TORCH_EXTENSIONS_DIR"] = str(ours)
        if distributed:
            free_compile_locks(ours)
    import torch

    # Without a process group, the Trainer would use all GPUs from one process (DataParallel), which
    # TRL refuses. With it, one process is one rank on one GPU on such a machine too.
    if not process.launched() and (distributed or torch.cuda.device_count() > 1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        # If it is not set, Accelerate sets its own number and logs a warning.
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it guesses

    import datasets
    import huggingface_hub
    import transformers

    # A notebook may have imported huggingface_hub, which reads the variable once: TRL reports runs.
    if os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1":
        huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    for library in ("transformers", "torch", "trl", "peft"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity(logging.ERROR)
    if ALONE:
        library_bars.replace_bars()
    elif not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()


def _is_shown(record: logging.LogRecord) -> bool:
    return SILENCED[record.name] not in str(record.msg)


@contextlib.contextmanager
def prepared(distributed: bool) -> Iterator[None]:
    """Prepare for one run, and restore afterwards what the run changed for the whole process.

    A notebook trains several runs in one process. Accelerate and DeepSpeed store settings in
    environment variables and module globals, and a run sets PyTorch's number of threads and the
    precision of float32 products; a later run with other settings would silently use them.
    """
    variables = dict(os.environ)
    prepare(distributed)
    import torch
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config
    from transformers.utils.import_utils import enable_tf32

    library: Any = torch.backends
    backends = (library, library.mkldnn.matmul)
    threads, precisions = torch.get_num_threads(), [each.fp32_precision for each in backends]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(variables)
        unset_hf_deepspeed_config()
        enable_tf32.cache_clear()  # else the next run's call with the same value would do nothing
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        torch.set_num_threads(threads)
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision
        gc.collect()  # frees the model and its optimizer, which refer to each other


@contextlib.contextmanager
def heap_frozen(*, collect_new: bool) -> Iterator[None]:
    """Exclude the objects that exist already from Python's garbage collection.

    The imported libraries hold about a million of them. A full collection takes 0.1 s to find that
    none is garbage, reading a tokenizer's JSON triggers several, and in forked workers each also
    copies the memory that was shared with this process.

    Args:
        collect_new: Collect the objects that are made within the block. False while libraries are
            imported and a model is built: the collector would scan these objects many times, which
            takes a second, and find nothing to free.
    """
    frozen_before, enabled = gc.get_freeze_count(), gc.isenabled()
    gc.freeze()
    if not collect_new:
        gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        if not frozen_before:  # gc.unfreeze would release what the caller has frozen, too
            gc.unfreeze()


def free_compile_locks(folder: Path) -> None:
    """Remove the lock files of compilations that were killed; later starts would wait for them.

    PyTorch locks a compilation with a file that does not name its owner. So each of our processes
    holds a shared lock on the file in-use, which the kernel releases when the process ends. A
    process that gets this lock exclusively is the only one, so all lock files are stale.
    """
    global _extensions
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _extensions = (folder / "in-use").open("w")
    except OSError:  # the environment is read-only, so nothing can be compiled in it either
        return
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(_extensions, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for lock in folder.glob("*/lock"):
            logger.info("removing %s: the process that created this lock was killed", lock)
            lock.unlink(missing_ok=True)
    fcntl.flock(_extensions, fcntl.LOCK_SH)


def rejoin() -> None:
    """Create the process group under new keys of the store if torchrun has restarted the ranks.

    torchrun's store survives a restart and still has the addresses of the ranks that ended; without
    new keys, the restarted ranks would try to connect to those.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if not process.restarts() or dist.is_initialized():
        return
    store, rank, ranks = next(rendezvous("env://"))
    if torch.cuda.is_available():
        torch.cuda.set_device(process.local_rank())
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=PrefixStore(f"restart{process.restarts()}", store),
        rank=rank,
        world_size=ranks,
    )


def lost_a_rank(error: BaseException) -> bool:
    """Check whether an error means that the connection to a different rank was lost."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )


def end_process_group() -> None:
    """Destroy the process group; otherwise every second run under ZeRO-1 aborts at exit."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        deepspeed = sys.modules.get("deepspeed.comm.comm")
        if deepspeed is not None and deepspeed.is_initialized():
            deepspeed.destroy_process_group()  # also removes the groups that DeepSpeed has created
        else:
            dist.destroy_process_group()
