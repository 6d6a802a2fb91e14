"""Stages of ``gpu.py``: describe the machine, and measure its peak performance."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

from gpu_parts import ROOT, has_gpu, is_tiny, median, wait

# Distribution: the module that it brings. The last three are needed by some stages only.
PACKAGES = {
    **{name: name for name in ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed")},
    **{name: name for name in ("datasets", "numpy", "pyarrow", "fsspec", "filelock", "xxhash")},
    **{name: name for name in ("tiktoken", "psutil", "tqdm", "omegaconf", "rich", "safetensors")},
    "hydra-core": "hydra",
    "triton": "triton",
    "bitsandbytes": "bitsandbytes",
    "flash-attn": "flash_attn",
}
OPTIONAL = {"triton", "bitsandbytes", "flash-attn"}
import_seconds: float | None = None  # that this process took to import everything
PUBLISHED_TFLOPS = 989.4  # bf16, dense, of an H100 or H200 SXM (NVIDIA's data sheet)


def packages() -> dict[str, Any]:
    """List the versions of the packages, and all missing packages."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    absent = [name for name, module in PACKAGES.items() if importlib.util.find_spec(module) is None]
    required = [name for name in absent if name not in OPTIONAL]
    found: dict[str, Any] = {"python": platform.python_version(), **versions}
    if required:
        return {**found, "wrong": [f"missing packages: {', '.join(required)}"]}
    import sft.training.trainer

    assert sft.training.trainer.__file__.startswith(str(ROOT)), (
        f"sft is imported from {sft.__path__}"
    )
    return {**found, "import_seconds": import_seconds, "optional_absent": absent}


def device() -> dict[str, Any]:
    """Describe the hardware, and the compilers that Triton and DeepSpeed would find."""
    import psutil
    import torch

    found: dict[str, Any] = {
        "cpus": os.cpu_count(),
        "memory_gib": psutil.virtual_memory().total / 2**30,
        "disk_free_gib": shutil.disk_usage(os.getcwd()).free / 2**30,
        "executable": sys.executable,
        "compilers": {name: shutil.which(name) for name in ("gcc", "nvcc", "ninja")},
    }
    if has_gpu():
        about = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        found |= {
            "gpu": about.name,
            "capability": f"{about.major}.{about.minor}",
            "processors": about.multi_processor_count,
            "gpu_memory_gib": total / 2**30,
            "gpu_free_gib": free / 2**30,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    from torch.nn.attention import varlen

    found["varlen_attn"] = str(importlib.import_module("inspect").signature(varlen.varlen_attn))
    return found


def timed(run: Callable[[], object], times: int = 7, each: int = 5) -> float:
    """Return the median seconds of a call, after two warm-up calls."""
    run()
    run()
    found = []
    for _ in range(times):
        wait()
        began = time.perf_counter()
        for _ in range(each):
            run()
        wait()
        found.append((time.perf_counter() - began) / each)
    return median(found)


def product_peak(kind: str = "bfloat16", size: int | None = None) -> float:
    """Measure the TFLOP/s of a product of square random matrices."""
    import torch

    size = size or (256 if is_tiny() else 8192)
    where = "cuda" if has_gpu() else "cpu"
    a, b = (torch.randn(size, size, device=where, dtype=getattr(torch, kind)) for _ in range(2))
    return 2 * size**3 / timed(lambda: a @ b) / 1e12


def product() -> dict[str, Any]:
    """Measure the peak speeds of matrix products."""
    import torch

    found = {f"{kind}_tflops": product_peak(kind) for kind in ("bfloat16", "float16", "float32")}
    if has_gpu():
        torch.backends.fp32_precision = "tf32"
        found["tf32_tflops"] = product_peak("float32")
        torch.backends.fp32_precision = "ieee"
    return {**found, "of_published": found["bfloat16_tflops"] / PUBLISHED_TFLOPS}


def memory() -> dict[str, Any]:
    """Measure GB/s of a copy within the device's memory (reads plus writes), and of one to it."""
    import torch

    where = "cuda" if has_gpu() else "cpu"
    size = 1 << (22 if is_tiny() else 31)
    source = torch.empty(size, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    found = {"copy_gb_s": 2 * size / timed(lambda: target.copy_(source)) / 1e9}
    if has_gpu():
        here, size = target[: size // 4], size // 4
        there = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        to_gpu = timed(lambda: here.copy_(there, non_blocking=True))
        from_gpu = timed(lambda: there.copy_(here, non_blocking=True))
        found |= {"to_gpu_gb_s": size / to_gpu / 1e9, "from_gpu_gb_s": size / from_gpu / 1e9}
    return found
