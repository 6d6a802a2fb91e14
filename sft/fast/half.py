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
# Which argument is the left factor, and how many results have the precision of the factors:
# attention's normaliser has not.
PRODUCTS = {
    **dict.fromkeys(("mm", "mm.out", "bmm", "bmm.out", ATTENTION), (0, 1)),
    **dict.fromkeys(("addmm", "baddbmm"), (1, 1)),
    f"{ATTENTION}_backward": (0, 3),
}
# Of a left factor: with fewer, as in generating, a layer's weights take longer to widen than to
# multiply, which PyTorch does well where they are read along their rows.
ROWS = 16

_kernels: list[Any] = []  # ours, held for life


def cpu_has(dtype: torch.dtype) -> bool:
    """Tell whether this processor multiplies in a 16-bit precision."""
    can = torch.cpu.get_capabilities()
    return any(can.get(name) for name in CAPABILITIES[dtype])


@functools.cache
def widen_products(dtype: torch.dtype) -> None:
    """Replace PyTorch's CPU kernels for products in a precision that the processor lacks."""
    if dtype not in CAPABILITIES or cpu_has(dtype):
        return
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    _kernels.append(library)
    for name, (left, results) in PRODUCTS.items():
        stock = torch.library.get_kernel(f"aten::{name}", "CPU")
        kernel = _widened(stock, left, results, dtype)
        with warnings.catch_warnings():  # that a kernel is replaced
            warnings.simplefilter("ignore", UserWarning)
            library.impl(name, kernel, "CPU", with_keyset=True)


def _widened(kernel: Any, left: int, results: int, dtype: torch.dtype) -> Callable[..., Any]:
    """Give a kernel that computes in float32 what is of that precision, and the rest as before."""

    def widen(value: Any) -> Any:
        narrow = isinstance(value, torch.Tensor) and value.dtype == dtype
        return value.float() if narrow else value

    def run(keys: Any, *args: Any, **kwargs: Any) -> Any:
        # Two, or three with what is added or attended to; attention's mask may be of another type.
        factors = [value for value in args[:3] if isinstance(value, torch.Tensor)]
        few = args[left].shape[-2] < ROWS and args[left + 1].stride(-2) == 1
        if few or any(factor.dtype != dtype for factor in factors):
            return kernel.call_boxed(keys, *args, **kwargs)
        out = kwargs.get("out")
        wide = {name: widen(value) for name, value in kwargs.items()}
        found = kernel.call_boxed(keys, *map(widen, args), **wide)
        if out is not None:
            return out.copy_(found)
        if isinstance(found, torch.Tensor):
            return found.to(dtype)
        return *(x.to(dtype) for x in found[:results]), *found[results:]

    return run
