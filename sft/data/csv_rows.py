"""Read tables of text, whatever separates their columns, row by row."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections.abc import Iterator
from typing import IO

from sft.data.rows import SHOWN, BadRow, Row, Rows, too_long
from sft.errors import DataError

SNIFFED = 1 << 16  # characters from which the delimiter is detected
SEPARATOR = re.compile(rb"(?:\xef\xbb\xbf)?sep=([ -~\t])\r?\n")  # a first line of Excel's
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


class _Lines(Iterator[str]):
    """The lines of a table, for ``csv.reader``; refuses a row that is longer than the limit."""

    def __init__(self, file: IO[bytes], path: str, limit: int) -> None:
        self.text = io.TextIOWrapper(file, "utf-8-sig", newline="")
        self.path, self.limit = path, limit
        self.line = self.size = 0  # lines read, and characters since the last row

    def __next__(self) -> str:
        line = self.text.readline(self.limit + 1)
        if not line:
            raise StopIteration
        self.line += 1
        self.size += len(line)
        if self.size > self.limit:
            # What follows cannot be told apart: the end of a quotation may be missing.
            raise DataError(
                f"{self.path}:{self.line}: {too_long('the row', self.limit)}\n"
                '    fix: a missing " may join many rows; or raise dataset.max_row_bytes'
            )
        return line


def table(file: io.BufferedReader, path: str, limit: int, own: str) -> Rows:
    """Yield the rows of a table of text; its first line names the columns.

    Args:
        file: The file, opened.
        path: Its name.
        limit: Characters of a row, at most.
        own: The delimiter that the file's ending says.
    """
    csv.field_size_limit(2**31 - 1)
    said = SEPARATOR.match(file.peek(SNIFFED))
    if said:
        file.read(said.end())
        delimiter = said[1].decode("ascii")
    else:
        delimiter = _delimiter_of(file.peek(SNIFFED)[:SNIFFED], path, own)
    before = 1 if said else 0  # lines that the reader does not see
    lines = _Lines(file, path, limit)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    line = before + 1
    try:
        header = next(rows, [])
        # Spreadsheets write a delimiter for each column that was ever filled.
        header = [name or f"column {number}" for number, name in enumerate(header, 1)]
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise DataError(f"{path} has the column {twice[0]} twice\n    fix: rename one of them")
        lines.size, line = 0, before + rows.line_num + 1
        for fields in rows:
            if len(fields) == len(header):
                yield Row(dict(zip(header, fields, strict=True)), path, line)
            elif fields:
                reason = f"the row has {len(fields)} fields, the header {len(header)}"
                yield BadRow(path, line, reason, json.dumps(fields, ensure_ascii=False)[:SHOWN])
            lines.size, line = 0, before + rows.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{line}: the row cannot be read: {error}\n    fix: correct its quotation marks"
        ) from error


def _delimiter_of(head: bytes, path: str, own: str) -> str:
    """Detect what separates the columns of a table: a comma, semicolon, tab or vertical bar.

    The first line names the columns, so the delimiter is in it. If it is not the one that the
    file's ending says, or if others of the four are in that line too, the first rows must agree.

    Raises:
        DataError: They do not.
    """
    text = head.decode("utf-8-sig", "ignore")
    widths: dict[str, list[int]] = {}
    for delimiter in DELIMITERS:
        with contextlib.suppress(csv.Error):
            found = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
            whole = found[:-1] if len(head) == SNIFFED and len(found) > 1 else found
            widths[delimiter] = [len(row) for row in whole if row]
    in_header = [delimiter for delimiter, sizes in widths.items() if sizes and sizes[0] > 1]
    if in_header in ([], [own]):
        return own
    agreed = [delimiter for delimiter in in_header if len(set(widths[delimiter])) == 1]
    if len(agreed) == 1:
        return agreed[0]
    if own in in_header and not agreed:  # rows of another width are bad rows
        return own
    shown = " or ".join(DELIMITERS[delimiter] for delimiter in in_header)
    raise DataError(
        f"{path}: it cannot be told whether {shown} separate the columns\n"
        "    fix: write it with commas, or as JSON lines"
    )
