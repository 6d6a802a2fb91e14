"""Measure how fast this CPU multiplies in float32 and in each way of bf16, and choose one."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from sft.fast import cpu_products, linear

FLOAT32 = "float32"
# How many times as fast as the preferred way a different one must be. float32 rounds least, and two
# starts on one machine must choose the same way, although its speed varies.
MARGIN = 1.15
# The first layer of a small model's MLP: one product forward and one backward are 2.4 GFLOP.
TOKENS, INPUTS, OUTPUTS = 256, 768, 3072
ROUNDS = 3  # the first warms up
NAMES = {
    FLOAT32: "float32",
    cpu_products.NATIVE: "bf16",
    cpu_products.WIDENED: "bf16 as float32",
    cpu_products.SHORTENED: "bf16 as float32 by bf16 instructions",
}


def speeds() -> dict[str, float]:
    """Return GFLOP/s of ``FLOAT32`` and each way of bf16, with PyTorch's number of threads."""
    return _speeds(torch.get_num_threads())


@functools.cache
def _speeds(threads: int) -> dict[str, float]:
    """Measure once for each number of threads.

    To limit the effect of other processes, CPU time is measured, the ways alternate, and the
    fastest round of each counts. float32 is measured as frozen layers compute it, see
    ``sft.fast.linear``.
    """
    shapes = (TOKENS, INPUTS), (TOKENS, OUTPUTS), (OUTPUTS, INPUTS)
    x, gradient, weight = (torch.ones(shape) for shape in shapes)  # draws no random numbers
    short = [value.bfloat16() for value in (x, gradient, weight)]

    def native() -> None:
        _multiply(*short)

    def widened() -> None:
        for result in _multiply(*(value.float() for value in short)):
            result.bfloat16()

    def shortened() -> None:
        with cpu_products.bf16_instructions():
            widened()

    ways: dict[str, list[Callable[[], object]]] = {
        FLOAT32: [lambda: _multiply(x, gradient, weight)]
    }
    if linear.amd_with_avx512():
        forward, backward = linear.pack(weight)
        ways[FLOAT32].append(
            lambda: (linear.product(x, forward, None), linear.product(gradient, backward, None))
        )
    functions = {
        cpu_products.NATIVE: native,
        cpu_products.WIDENED: widened,
        cpu_products.SHORTENED: shortened,
    }
    ways |= {way: [functions[way]] for way in cpu_products.ways(torch.bfloat16)}
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):
        for name, alternatives in ways.items():
            seconds[name] = min(seconds[name], *map(_seconds, alternatives))
    operations = threads * 2 * 2 * TOKENS * INPUTS * OUTPUTS
    return {name: operations / took / 1e9 for name, took in seconds.items()}


def _multiply(
    x: torch.Tensor, gradient: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return F.linear(x, weight), gradient @ weight


def _seconds(function: Callable[[], object]) -> float:
    with torch.no_grad():
        began = time.process_time()
        function()
        return time.process_time() - began


def fastest(speeds: Mapping[str, float], order: Sequence[str]) -> str:
    """Choose the first way, or a later one that is more than ``MARGIN`` times as fast."""
    chosen = order[0]
    for name in order[1:]:
        if speeds[name] > MARGIN * speeds[chosen]:
            chosen = name
    return chosen


def said(speeds: Mapping[str, float]) -> str:
    """Format the measured speeds, the fastest first."""
    found = sorted(speeds, key=lambda name: -speeds[name])
    return ", ".join(f"{NAMES[name]} {speeds[name]:.0f}" for name in found) + " GFLOP/s"
