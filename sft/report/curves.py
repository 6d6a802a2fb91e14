"""Draw curves over steps as inline SVG that keeps every extreme of ten thousand values.

The SVG stretches with the page, and its lines keep their width. Labels are HTML beside it, so that
text has its size on a phone too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from sft import html
from sft.report.axes import BUCKETS, Axes, Point, short, thinned

LABEL = 8.0  # percent of a chart that the label of a curve takes
MOST_LABELS = 12  # of curves at their ends; further ones have only the legend
ROWS = 14  # steps in the table of a chart's values
_ids = itertools.count(1)


@dataclass(frozen=True)
class Curve:
    """One curve.

    Attributes:
        name: Its name in the legend.
        points: (step, value) in order; a value that is not finite makes a gap.
        look: The number of its colour and its dash pattern.
        dots: Mark each value, of a curve with few.
    """

    name: str
    points: Sequence[Point]
    look: int = 0
    dots: bool = False


def chart(
    title: str,
    curves: Sequence[Curve],
    unit: str = "",
    *,
    marks: Sequence[tuple[float, str]] = (),
    from_zero: bool = False,
    log: bool = False,
    stacked: bool = False,
    ends: bool = False,
    over: str = "step",
) -> str:
    """Draw curves as a figure with a legend, and with their values as a table; "": no value.

    Args:
        title: What the values are.
        curves: The curves.
        unit: The unit of the values.
        marks: Steps that get a vertical line, and what it says.
        from_zero: Let the axis begin at zero.
        log: Use a logarithmic axis if the values are positive and differ by a factor of 8.
        stacked: Fill between each curve and the one before; the curves are sums already.
        ends: Name each curve at its end too.
        over: What the curves go over.
    """
    curves = [curve for curve in curves if any(math.isfinite(v) for _, v in curve.points)]
    if not curves:
        return ""
    if stacked:  # a mean over several steps; one evaluation would set the height of the chart
        curves = [replace(curve, points=_means(curve.points)) for curve in curves]
    axes = Axes(itertools.chain(*(curve.points for curve in curves)), from_zero or stacked, log)
    drawn = "".join(_grid(axes)) + "".join(
        f'<line class="mark" x1="{axes.x(step)}" x2="{axes.x(step)}" y1="0" y2="1000">'
        f"<title>{html.text(what)}</title></line>"
        for step, what in marks
        if axes.left <= step <= axes.right
    )
    for curve in reversed(curves) if stacked else curves:
        drawn += _area(curve, axes) if stacked else _line(curve, axes, band=len(curves) <= 4)
    number, name = next(_ids), html.text(title)
    note = ", ".join(filter(None, [unit, "logarithmic" if axes.log else ""]))
    heading = f"{name} <small>{html.text(note)}</small>" if note else name
    data = f"{axes.left:g},{axes.right:g},{axes.low:.6g},{axes.high:.6g},{axes.log:d}"
    labels = "".join(_labels(axes, curves, ends))
    return (
        f'<figure class="chart{" stack" * stacked}{" ends" * ends}">\n'
        f"<figcaption><h3>{heading}</h3>{_legend(curves, bool(marks))}</figcaption>\n"
        f'<div class="plot"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-labelledby="t{number} d{number}" data-axes="{data}" data-over="{over}">'
        f'<title id="t{number}">{name}</title>'
        f'<desc id="d{number}">{html.text(_described(curves, unit, over))}</desc>{drawn}</svg>'
        f'<div class="labels" aria-hidden="true">{labels}</div>'
        f"<output></output></div>\n{_values(title, curves, unit, over)}</figure>\n"
    )


def _means(points: Sequence[Point]) -> list[Point]:
    return [(bucket.x, bucket.mean) for part in thinned(points, BUCKETS // 2) for bucket in part]


def _grid(axes: Axes) -> Iterator[str]:
    for value in axes.values():
        y = axes.y(value)
        yield f'<line class="grid" x1="0" x2="1000" y1="{y}" y2="{y}"/>'


def _line(curve: Curve, axes: Axes, band: bool) -> str:
    """Draw a curve: its mean as a line and, where values were joined, their range behind it."""
    shape = ""
    parts = thinned(curve.points, BUCKETS if band else BUCKETS // 3)
    for part in parts if band else ():
        if any(bucket.low < bucket.high for bucket in part):
            above = " ".join(f"{axes.x(b.x)},{axes.y(b.high)}" for b in part)
            below = " ".join(f"{axes.x(b.x)},{axes.y(b.low)}" for b in reversed(part))
            shape += f'<polygon class="band c{curve.look % 6}" points="{above} {below}"/>'
    name = html.text(curve.name)
    for part in parts:
        places = [f"{axes.x(b.x)},{axes.y(b.mean)}" for b in part]
        line = " ".join(places)
        look = f"c{curve.look % 6} d{curve.look % 5}"
        shape += f'<polyline class="{look}" data-name="{name}" points="{line}"/>'
        if len(part) == 1 or curve.dots:
            dots = "".join(f"M{place.replace(',', ' ')}h0" for place in places)
            shape += f'<path class="dots c{curve.look % 6}" d="{dots}"/>'
    return shape


def _area(curve: Curve, axes: Axes) -> str:
    """Draw a curve of a stack, filled down to zero; the ones in front cover what is theirs."""
    shape = ""
    for part in thinned(curve.points):
        line = " ".join(f"{axes.x(b.x)},{axes.y(b.mean)}" for b in part)
        if len(part) == 1:
            line = f"0,{axes.y(part[0].mean)} 1000,{axes.y(part[0].mean)}"
        first, last = line.split(" ")[0].split(",")[0], line.split(" ")[-1].split(",")[0]
        look = f"area c{curve.look % 6}"
        shape += f'<polygon class="{look}" points="{first},1000 {line} {last},1000"/>'
        name = html.text(curve.name)
        shape += f'<polyline class="edge" data-name="{name}" points="{line}"/>'
    return shape


def key(look: int) -> str:
    """Draw a line of this look, for a legend."""
    path = f'<path class="c{look % 6} d{look % 5}" d="M0 4h28"/>'
    return f'<svg viewBox="0 0 28 8" aria-hidden="true">{path}</svg>'


def _legend(curves: Sequence[Curve], marks: bool) -> str:
    if len(curves) == 1 and not marks:
        return ""
    items = "".join(f"<li>{key(curve.look)}{html.text(curve.name)}</li>" for curve in curves)
    if marks:
        line = (
            '<svg viewBox="0 0 28 8" aria-hidden="true"><path class="marked" d="M14 -4v16"/></svg>'
        )
        items += f"<li>{line}resumed, or an alert</li>"
    return f'<ul class="keys">{items}</ul>'


def _labels(axes: Axes, curves: Sequence[Curve], ends: bool) -> Iterator[str]:
    for value in axes.values():
        yield f'<span class="y" style="top:{axes.y(value) / 10:.1f}%">{short(value)}</span>'
    for step in axes.steps():
        yield f'<span class="x" style="left:{axes.x(step) / 10:.1f}%">{short(step)}</span>'
    last = [
        (*next(point for point in reversed(curve.points) if math.isfinite(point[1])), curve)
        for curve in (curves if ends and len(curves) <= MOST_LABELS else ())
    ]
    last.sort(key=lambda item: item[1], reverse=True)
    places = [(axes.x(step) / 10, axes.y(value) / 10) for step, value, _ in last]
    for top, (left, _), (*_, curve) in zip(_spread(places), places, last, strict=True):
        where = f"left:{left:.1f}%;top:{top:.1f}%"
        yield f'<span class="end c{curve.look % 6}" style="{where}">{html.text(curve.name)}</span>'


def _spread(places: Sequence[tuple[float, float]]) -> list[float]:
    """Move labels, from the uppermost to the lowest, so that none covers another one.

    Args:
        places: (left, top) of each, in percent of the chart.

    Returns:
        The tops, within the chart if there is room.
    """
    tops: list[float] = []
    for left, top in places:
        above = [one for one, (x, _) in zip(tops, places, strict=False) if abs(x - left) < 5]
        tops.append(max([top, *(one + LABEL for one in above)]))
    for at in reversed(range(len(tops))):  # those that are now too low push the others up again
        below = zip(tops[at + 1 :], places[at + 1 :], strict=True)
        beside = [one for one, (x, _) in below if abs(x - places[at][0]) < 5]
        tops[at] = min([tops[at], 100.0, *(one - LABEL for one in beside)])
    return tops


def _described(curves: Sequence[Curve], unit: str, over: str) -> str:
    """Describe curves in words, for a screen reader."""
    said = []
    for curve in curves:
        points = [point for point in curve.points if math.isfinite(point[1])]
        low, high = (pick(points, key=lambda point: point[1]) for pick in (min, max))
        said.append(
            f"{curve.name}: from {points[0][1]:.4g} at {over} {html.whole(points[0][0])} to "
            f"{points[-1][1]:.4g} at {over} {html.whole(points[-1][0])} {unit}".rstrip()
            + f"; smallest {low[1]:.4g} at {over} {html.whole(low[0])}, largest {high[1]:.4g} at "
            f"{over} {html.whole(high[0])}."
        )
    return " ".join(said)


def _values(title: str, curves: Sequence[Curve], unit: str, over: str) -> str:
    """Return a table of values at some steps, and of what was no number."""
    steps = sorted({step for curve in curves for step, _ in curve.points})
    chosen = steps[:: math.ceil(len(steps) / ROWS)]
    chosen += [steps[-1]] if chosen[-1] != steps[-1] else []
    by_step = [dict(curve.points) for curve in curves]
    rows = [[html.whole(step), *(_value(found.get(step)) for found in by_step)] for step in chosen]
    extremes: tuple[tuple[str, Callable[..., Point]], ...] = (("smallest", min), ("largest", max))
    for label, pick in extremes:
        cells = []
        for curve in curves:
            finite = [point for point in curve.points if math.isfinite(point[1])]
            step, value = pick(finite, key=lambda point: point[1])
            cells.append(f"{value:.4g} <small>at {html.whole(step)}</small>")
        rows.append([label, *cells])
    bad = sum(not math.isfinite(value) for curve in curves for _, value in curve.points)
    note = f'<p class="alert">{bad:,} values are not finite numbers</p>' if bad else ""
    heads = [html.text(" ".join(filter(None, [curve.name, unit]))) for curve in curves]
    inner = html.table([over, *heads], rows, f"{title}: values")
    return f"{note}<details><summary>Values</summary>{inner}</details>\n"


def _value(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if math.isfinite(value) else '<span class="alert">not a number</span>'
