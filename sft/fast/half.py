"""16 bits on a CPU that has none: products are computed in float32, and rounded.

Where the processor lacks bf16 or fp16, PyTorch emulates its products number by number: with AVX2,
8 times slower than float32 forward and a hundred times backward (benchmarks/RESULTS.md). Widened,
they are those of hardware that has it: 16-bit factors, sums in float32, one rounding.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

# Names of what a processor can do, of which one is enough: x86's, then ARM's.
CAPABILITIES = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
# How many of its results have the precision of what is multiplied; attention's normaliser has not.
PRODUCTS = dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", ATTENTION), 1)
PRODUCTS[f"{ATTENTION}_backward"] = 3

_kernels: list[torch.library.Library] = []  # ours, held for life


def cpu_has(dtype: torch.dtype) -> bool:
    """Tell whether this processor multiplies in a 16-bit precision."""
    can = torch.cpu.get_capabilities()
    return any(can.get(name) for name in CAPABILITIES[dtype])


@functools.cache
def widen_products() -> None:
    """Replace PyTorch's CPU kernels for products in a precision that the processor lacks."""
    lacking = {dtype for dtype in CAPABILITIES if not cpu_has(dtype)}
    if not lacking:
        return
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    _kernels.append(library)
    for name, results in PRODUCTS.items():
        kernel = _widened(torch.library.get_kernel(f"aten::{name}", "CPU"), results, lacking)
        with warnings.catch_warnings():  # that a kernel is replaced
            warnings.simplefilter("ignore", UserWarning)
            library.impl(name, kernel, "CPU", with_keyset=True)


def _widened(kernel: Any, results: int, lacking: set[torch.dtype]) -> Callable[..., Any]:
    """Give a kernel that computes in float32 what the processor lacks, and the rest as before."""

    def widen(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) else value

    def run(keys: Any, first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        dtype = first.dtype
        if dtype not in lacking:
            return kernel.call_boxed(keys, first, *args, **kwargs)
        wide = {name: widen(value) for name, value in kwargs.items()}
        found = kernel.call_boxed(keys, first.float(), *map(widen, args), **wide)
        if isinstance(found, torch.Tensor):
            return found.to(dtype)
        return *(x.to(dtype) for x in found[:results]), *found[results:]

    return run
