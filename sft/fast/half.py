"""Products of 16-bit factors on a CPU: by PyTorch's kernels, or in float32 with one rounding.

Where the processor lacks bf16 or fp16, PyTorch emulates its products number by number: with AVX2,
8 times slower than float32 forward and a hundred times backward (benchmarks/RESULTS.md). Where it
has bf16 but no matrix unit for it, PyTorch's bf16 kernels can still be slower than its float32
ones. Each way gives 16-bit factors, sums in float32, and one rounding; the ways differ in the
order of the sums.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

NATIVE = "native"  # PyTorch's 16-bit kernels
WIDENED = "widened"  # the factors are converted to float32, and the result is rounded
# As widened, and oneDNN multiplies with bf16 instructions, into which bf16 factors fit exactly.
SHORTENED = "widened, bf16 instructions"

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
    **dict.fromkeys(("addmm", "addmm_", "baddbmm"), (1, 1)),
    f"{ATTENTION}_backward": (0, 3),
}
# Of a left factor: with fewer, as in generating, a layer's weights take longer to widen than to
# multiply, which PyTorch does well where they are read along their rows.
ROWS = 16

_library: Any = None  # holds our kernels for the life of the process; None: none are registered
_ways: dict[torch.dtype, str] = {}  # looked up at each call; a precision that is absent is native


def cpu_has(dtype: torch.dtype) -> bool:
    """Tell whether this processor multiplies in a 16-bit precision."""
    can = torch.cpu.get_capabilities()
    return any(can.get(name) for name in CAPABILITIES[dtype])


def ways(dtype: torch.dtype) -> list[str]:
    """List how this processor can compute products in a 16-bit precision, the plainest first."""
    if not cpu_has(dtype):
        return [WIDENED]
    on_x86 = dtype == torch.bfloat16 and not torch.cpu.get_capabilities().get("bf16")
    return [NATIVE, WIDENED, *([SHORTENED] if on_x86 else [])]


def widen_products(dtype: torch.dtype, way: str | None = None) -> None:
    """Choose how PyTorch computes products in a precision on this CPU, for the whole process.

    Args:
        dtype: The factors' precision; float32 is left alone.
        way: One of ``ways(dtype)``. Another one, or None, is the first of these: what the
            processor has, without a measurement.
    """
    if dtype not in CAPABILITIES:
        return
    possible = ways(dtype)
    way = way if way in possible else possible[0]
    if way != NATIVE:
        _register()
    _ways[dtype] = way


def _register() -> None:
    """Put our kernels before PyTorch's, once: PyTorch 2.11 refuses to replace a replacement."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for name, (left, results) in PRODUCTS.items():
        stock = torch.library.get_kernel(f"aten::{name}", "CPU")
        kernel = _widened(stock, left, results, name.startswith(ATTENTION), name.endswith("_"))
        with warnings.catch_warnings():  # that a kernel is replaced
            warnings.simplefilter("ignore", UserWarning)
            _library.impl(name, kernel, "CPU", with_keyset=True)


def _widened(
    stock: Any, left: int, results: int, exact: bool = False, in_place: bool = False
) -> Callable[..., Any]:
    """Make a kernel that computes as its factors' precision is to be computed.

    Args:
        stock: PyTorch's kernel.
        left: Which argument is the left factor.
        results: How many results have the precision of the factors.
        exact: Some factors are results themselves and do not fit into 16 bits, such as
            attention's weights, so that bf16 instructions would round them.
        in_place: The result replaces the first argument.
    """

    def run(keys: Any, *args: Any, **kwargs: Any) -> Any:
        dtype = args[left].dtype
        way = _ways.get(dtype, NATIVE)
        if way == NATIVE:
            return stock.call_boxed(keys, *args, **kwargs)
        # Two, or three with what is added or attended to; attention's mask may be of another type.
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
    """Let oneDNN multiply float32 matrices with bf16 instructions, within the block only."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
