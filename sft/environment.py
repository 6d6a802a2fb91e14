"""What the libraries read from the environment, what they may say, and how they are left."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger("sft")

# By logger, the message that is not shown. Every other warning of these libraries is.
SILENCED = {
    # At every import on a CPU with AVX512-BF16. The kernel is for a layout of 4-bit weights that
    # is never used in training: see model.keep_training_layout.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # At every int8 layer's every forward pass; summary.describe_run says it once.
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
    # The Trainer accumulates by itself and tells Accelerate 1; the batch line says what is done.
    "accelerate.accelerator": "Gradient accumulation steps mismatch",
}

_extensions: IO[str] | None = None  # held for life


def prepare(distributed: bool = False) -> None:
    """Set the environment and silence notices; call before anything heavy is imported.

    Args:
        distributed: DeepSpeed is used: it wants a process group for one rank too, and without
            torchrun's variables it would look for MPI.
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

    # Without a process group, the Trainer would spread one process over all GPUs (DataParallel),
    # which TRL refuses: on such a machine too, one process is one rank on one GPU.
    alone = "RANK" not in os.environ
    if alone and (distributed or torch.cuda.device_count() > 1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        # Else Accelerate sets a number of its own, with a warning.
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it guessed

    import datasets
    import huggingface_hub
    import transformers

    for library in ("transformers", "torch", "trl", "peft"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity(logging.ERROR)
    transformers.utils.logging.set_tqdm_hook(_bar)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()


def _is_shown(record: logging.LogRecord) -> bool:
    return SILENCED[record.name] not in str(record.msg)


def _bar(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Make Transformers' progress bars, but for the one that every model load would show."""
    from transformers.utils.logging import EmptyTqdm

    hidden = options.get("desc") == "Loading weights"
    return (EmptyTqdm if hidden else factory)(*args, **options)


@contextlib.contextmanager
def prepared(distributed: bool) -> Iterator[None]:
    """Prepare for one run, and restore afterwards what it changed for the whole process.

    A notebook trains several runs in one process. Accelerate and DeepSpeed keep settings in
    environment variables and module globals, and a run sets PyTorch's threads and the precision
    of float32 products; a later run on other settings would silently use them.
    """
    variables = dict(os.environ)
    prepare(distributed)
    import torch
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    library: Any = torch.backends
    backends = (library, library.mkldnn.matmul)
    threads, precisions = torch.get_num_threads(), [each.fp32_precision for each in backends]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(variables)
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        torch.set_num_threads(threads)
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision
        gc.collect()  # the model and its optimizer, which refer to one another


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
        deepspeed = sys.modules.get("deepspeed.comm.comm")
        if deepspeed is not None and deepspeed.is_initialized():
            deepspeed.destroy_process_group()  # and forget the groups it made
        else:
            dist.destroy_process_group()
