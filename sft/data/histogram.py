"""Draw the audit's histogram of lengths, for the page."""

from __future__ import annotations

import math
from collections.abc import Sequence


def histogram(rows: Sequence[Sequence[float]], limit: float | None) -> str:
    """Draw a histogram of lengths as SVG.

    Args:
        rows: Bins of [from, to, count], lengths in tokens, in order.
        limit: ``max_length``, drawn as a line; far beyond the lengths, at the right edge.
    """
    start, end, most = rows[0][0], rows[-1][1], max(row[2] for row in rows)
    far = limit is not None and limit - start > 2 * (end - start)
    if limit is not None and not far:
        end = max(end, limit)

    def x(value: float) -> float:
        return round(64 + 520 * (value - start) / (end - start), 1)

    svg = ""
    for low, high, count in rows:
        height = round(140 * count / most, 1) if most else 0
        svg += f'<rect class="bar" x="{x(low)}" y="{170 - height}" height="{height}" '
        svg += f'width="{max(x(high) - x(low) - 1, 1):.1f}">'
        svg += f"<title>{low:,} to {high:,}: {count:,}</title></rect>\n"
    edges = [*(row[0] for row in rows), rows[-1][1]]
    for edge in edges[:: math.ceil(len(edges) / 9)]:
        svg += f'<text x="{x(edge)}" y="187" text-anchor="middle">{edge:,}</text>\n'
    if limit is not None:
        at, name = 584.0 if far else x(limit), f"max_length {limit:,}{' →' * far}"
        anchor = "start" if at < 200 else "end"
        svg += f'<line class="limit" x1="{at}" x2="{at}" y1="20" y2="170"/>\n'
        svg += f'<text class="limit" x="{at}" y="14" text-anchor="{anchor}">{name}</text>\n'
    return f"""<svg class="drawn" viewBox="0 0 600 212" role="img"
aria-label="Histogram of the lengths of samples in tokens, at most {most:,} in a bin">
<line x1="64" x2="584" y1="30" y2="30"/><line class="axis" x1="64" x2="584" y1="170" y2="170"/>
<text x="56" y="34" text-anchor="end">{most:,}</text><text x="56" y="174" text-anchor="end">0</text>
<text x="324" y="207" text-anchor="middle">tokens</text>
<text transform="translate(12 100) rotate(-90)" text-anchor="middle">samples</text>
{svg}</svg>
"""
