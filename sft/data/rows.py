"""What a reader yields: rows, and entries that cannot be used as rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

SHOWN = 10_000  # characters of a bad row that are recorded
MAX_DEPTH = 100  # of lists and objects in a JSON row; Python itself stops at about 1,000


class Row(NamedTuple):
    """One row, and its line number, or its row number in a file without lines."""

    values: dict[str, Any]
    file: str
    line: int


class BadRow(NamedTuple):
    """An entry that cannot be used as a row: its position, the reason and its text."""

    file: str
    line: int
    reason: str
    text: str


Rows = Iterator[Row | BadRow]


def too_long(what: str, limit: int) -> str:
    """Return the reason why an entry above the limit is not read."""
    return f"{what} is longer than dataset.max_row_bytes={limit}"
