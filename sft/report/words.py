"""Times, settings and flags as words for a page."""

from __future__ import annotations

import time
from typing import Any

from sft import html
from sft.config.rules import typed
from sft.config.secrets import HIDDEN, without_secrets
from sft.report.folder import Folder, number

LATEST = 1e11  # seconds; a later year has more than four digits


def when(seconds: Any) -> str:
    """Return a time as a text, in this machine's zone."""
    value = number(seconds)
    if not 0 <= value < LATEST:
        return "-"
    return time.strftime("%Y-%m-%d\u00a0%H:%M", time.localtime(value))


def duration(seconds: Any) -> str:
    """Return a length of time as a text of two units."""
    value = number(seconds)
    if value != value or value < 0:
        return "-"
    for unit, part, size in (("d", "h", 86400), ("h", "min", 3600), ("min", "s", 60)):
        if value >= size:
            rest = int(value % size // {"h": 3600, "min": 60, "s": 1}[part])
            return f"{html.whole(value // size)} {unit}" + (f" {rest} {part}" if rest else "")
    return f"{value:.3g} s"


def hidden(value: Any, key: str) -> str:
    """Return a setting's value as it is typed, without what may be a secret."""
    shown = without_secrets(value, key)
    return HIDDEN if shown == HIDDEN else typed(shown)


def rounded(value: float) -> str:
    """Return a loss with four decimals; a very large one short."""
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def flag(value: str, flagged: bool) -> str:
    """Return a table's cell that is coloured by a verdict."""
    return f'<td class="{"alert" if flagged else "ok"}">{html.text(value)}</td>'


def damages(run: Folder) -> list[str]:
    """Return a sentence for each file that could not be read as a whole."""
    return [f"{name}: {what}" for name, what in run.damaged.items()]


def age_of(seconds: float) -> str:
    """Return how long ago something was, in one unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"
