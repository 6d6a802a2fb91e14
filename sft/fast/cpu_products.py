"""Products of 16-bit factors on a CPU: by PyTorch's kernels, or in float32 with one rounding.

If the processor lacks bf16 or fp16, PyTorch emulates the products number by number: with AVX2, they
take 8 times as long as float32 forward and a hundred times backward (benchmarks/RESULTS.md). If it
has bf16 but no matrix unit for it, PyTorch's bf16 kernels can still be slower than its float32
ones. Each way multiplies 16-bit factors, sums in float32 and rounds once; the ways differ only in
the order of summation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

NATIVE = "native"  # PyTorch's 16-bit kernels
WIDENED = "widened"  # the factors are converted to float32, and the result is rounded
# As WIDENED, but oneDNN multiplies with bf16 instructions, which represent bf16 factors exactly.
SHORTENED = "widened, bf16 instructions"

# Capabilities of processors, of which one is enough: x86's, then ARM's.
CAPABILITIES = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
# The index of the left factor among the arguments, and the number of results in the precision of
# the factors: attention also returns a float32 normaliser.
PRODUCTS = {
    **dict.fromkeys(("mm", "mm.out", "bmm", "bmm.out", ATTENTION), (0, 1)),
    **dict.fromkeys(("addmm", "addmm_", "baddbmm"), (1, 1)),
    f"{ATTENTION}_backward": (0, 3),
}
# Rows of the left factor. With fewer, as in generation, converting a layer's weights takes longer
# than multiplying them, and PyTorch's kernel is fast if it reads the weights along their rows.
ROWS = 16

_library: Any = None  # keeps the registered kernels alive; None: none are registered
_ways: dict[torch.dtype, str] = {}  # read at each call; the default is NATIVE


def cpu_has(dtype: torch.dtype) -> bool:
    """Return whether this processor has instructions for products in a 16-bit precision."""
    can = torch.cpu.get_capabilities()
    return any(can.get(name) for name in CAPABILITIES[dtype])


def ways(dtype: torch.dtype) -> list[str]:
    """List the ways in which this processor can compute 16-bit products, the default first."""
    if not cpu_has(dtype):
        return [WIDENED]
    on_x86 = dtype == torch.bfloat16 and not torch.cpu.get_capabilities().get("bf16")
    return [NATIVE, WIDENED, *([SHORTENED] if on_x86 else [])]


def widen_products(dtype: torch.dtype, way: str | None = None) -> None:
    """Set the way in which PyTorch computes 16-bit products on this CPU, for the whole process.

    Args:
        dtype: The factors' precision; float32 changes nothing.
        way: One of ``ways(dtype)``; any other value, or None, selects the first of them.
    """
    if dtype not in CAPABILITIES:
        return
    possible = ways(dtype)
    way = way if way in possible else possible[0]
    if way != NATIVE:
        _register()
    _ways[dtype] = way


def _register() -> None:
    """Replace PyTorch's kernels, once: PyTorch 2.11 refuses to replace a replaced kernel."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for name, (left, results) in PRODUCTS.items():
        stock = torch.library.get_kernel(f"aten::{name}", "CPU")
        kernel = _widened(stock, left, results, name.startswith(ATTENTION), name.endswith("_"))
        with warnings.catch_warnings():  # PyTorch warns that a kernel is replaced
            warnings.simplefilter("ignore", UserWarning)
            _library.impl(name, kernel, "CPU", with_keyset=True)


def _widened(
    stock: Any, left: int, results: int, exact: bool = False, in_place: bool = False
) -> Callable[..., Any]:
    """Make a kernel that computes a product in the way that is set for its factors' precision.

    Args:
        stock: PyTorch's kernel.
        left: The index of the left factor among the arguments.
        results: The number of results in the precision of the factors.
        exact: Some factors are intermediate float32 results, such as attention's weights, which
            bf16 instructions would round; do not use them.
        in_place: The result replaces the first argument.
    """

    def run(keys: Any, *args: Any, **kwargs: Any) -> Any:
        dtype = args[left].dtype
        way = _ways.get(dtype, NATIVE)
        if way == NATIVE:
            return stock.call_boxed(keys, *args, **kwargs)
        # Two factors, or three with a summand or value; attention's mask may have a different type.
        factors = [value for value in args[:3] if isinstance(value, torch.Tensor)]
        few = args[left].shape[-2] < ROWS and args[left + 1].stride(-2) == 1
        if few or any(factor.dtype != dtype for factor in factors):
            return stock.call_boxed(keys, *args, **kwargs)

        def widen(value: Any) -> Any:
            narrow = isinstance(value, torch.Tensor) and value.dtype == dtype
            return value.float() if narrow else value

        out = args[0] if in_place else kwargs.get("out")
        wide = {name: widen(value) for name, value in kwargs.items()}
        with bf16_instructions() if way == SHORTENED and not exact else nullcontext():
            found = stock.call_boxed(keys, *map(widen, args), **wide)
        if out is not None:
            return out.copy_(found)
        if isinstance(found, torch.Tensor):
            return found.to(dtype)
        return *(x.to(dtype) for x in found[:results]), *found[results:]

    return run


@contextmanager
def bf16_instructions() -> Iterator[None]:
    """Within the block, allow oneDNN to multiply float32 matrices with bf16 instructions."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
