"""Which values of a curve are drawn, and where: thinning, round ticks, and the axes of a chart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

BUCKETS = 240  # across a chart; each keeps its smallest and largest value
Point = tuple[float, float]


class Bucket(NamedTuple):
    """Neighbouring values of a curve: the mean of their steps, and what they range over."""

    x: float
    low: float
    mean: float
    high: float


def thinned(points: Sequence[Point], buckets: int = BUCKETS) -> list[list[Bucket]]:
    """Join neighbouring values so that few remain, and keep the smallest and largest of each group.

    Returns:
        The parts between gaps, in order.
    """
    count = max(1, math.ceil(len(points) / buckets))
    parts: list[list[Bucket]] = []
    for finite, part in itertools.groupby(points, lambda point: math.isfinite(point[1])):
        if finite:
            parts.append([_bucket(group) for group in _groups(list(part), count)])
    return parts


def _groups(points: list[Point], count: int) -> Iterator[list[Point]]:
    for start in range(0, len(points), count):
        yield points[start : start + count]


def _bucket(group: list[Point]) -> Bucket:
    values = [value for _, value in group]
    x = sum(step for step, _ in group) / len(group)
    return Bucket(x, min(values), math.fsum(values) / len(values), max(values))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round values between two, about ``count`` of them."""
    span = (high - low) / max(count - 1, 1)
    if not span > 0 or not math.isfinite(span):
        return [low]
    power = 10.0 ** math.floor(math.log10(span))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= span * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * n for n in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """Return a number for an axis: 12,000 as 12k."""
    if value == 0:
        return "0"
    size = abs(value)
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit and size >= 1e4:
            return f"{value / unit:.4g}{letter}"
    if size >= 1e3:
        return f"{value:,.0f}"
    return f"{value:.3g}" if size >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")


class Axes:
    """Maps steps and values to 0..1000, the coordinates of the SVG."""

    def __init__(self, points: Iterable[Point], from_zero: bool, log: bool) -> None:
        finite = [point for point in points if math.isfinite(point[1])]
        steps = [step for step, _ in finite] or [0.0]
        values = [value for _, value in finite] or [0.0]
        self.left, self.right = min(steps), max(steps)
        low, high = min(values), max(values)
        # With one spike, the rest of the curve would be a line along the axis.
        self.log = log and low > 0 and high / low > 8
        if self.log:
            low, high = math.log10(low), math.log10(high)
        margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        self.low = 0.0 if from_zero and low >= 0 and not self.log else low - margin
        self.high = high + margin

    def x(self, step: float) -> float:
        """Return the place of a step."""
        span = self.right - self.left
        return round(1000 * (step - self.left) / span, 1) if span else 500.0

    def y(self, value: float) -> float:
        """Return the place of a value."""
        value = math.log10(value) if self.log else value
        return round(1000 * (self.high - value) / (self.high - self.low), 1)

    def values(self) -> list[float]:
        """Return the values that get a line and a label."""
        if not self.log:
            return ticks(self.low, self.high)
        powers = range(math.floor(self.low), math.floor(self.high) + 1)
        within = [10.0**power for power in powers if power >= self.low]
        if len(within) < 3:
            every = (10.0**power * part for power in powers for part in (1, 2, 5))
            return [value for value in every if self.low <= math.log10(value) <= self.high]
        return within[:: math.ceil(len(within) / 6)]

    def steps(self) -> list[float]:
        """Return the steps that get a label."""
        return [step for step in ticks(self.left, self.right) if step == int(step)]
