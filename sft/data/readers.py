"""Read the rows of one file of any known kind lazily, each with its line number."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from sft.errors import DataError

JSON_LINES = (".jsonl", ".ndjson")
TEXT = (".txt", ".md")
TABLES = (".json", *JSON_LINES, ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
BLOCK = 1 << 20  # characters of a JSON array that are read at once
SHOWN = 10_000  # characters of a bad row that are recorded


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


def kind_of(path: str) -> str | None:
    """Return a file's ending, without that of the compression; None if it is unknown."""
    suffixes = Path(path.partition("?")[0]).suffixes
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in (*TEXT, *TABLES) else None


@contextlib.contextmanager
def remote_errors(path: str) -> Iterator[None]:
    """Raise a DataError that names the path if reading fails."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}\n    fix: check the address and your access to it"
        ) from error


@contextlib.contextmanager
def _opened(path: str, binary: bool) -> Iterator[IO[Any]]:
    """Open a local or remote file; decompress it if its ending says that it is compressed."""
    import fsspec

    mode = {"mode": "rb"} if binary else {"mode": "rt", "encoding": "utf-8-sig", "newline": ""}
    packed = path.endswith(COMPRESSED)
    with remote_errors(path):
        file = fsspec.open(path, compression="infer" if packed else None, **mode).open()
    with file:
        yield file


def read_file(path: str) -> Iterator[Row | BadRow]:
    """Yield the rows of one file, local or remote, compressed or not.

    Raises:
        DataError: The file is empty, damaged or of an unknown kind.
    """
    kind = kind_of(path)
    if kind is None:
        known = ", ".join((*TABLES, *TEXT))
        raise DataError(f"{path} has an unknown file ending\n    fix: a file that ends in {known}")
    if "://" not in path and Path(path).stat().st_size == 0:
        raise DataError(f"{path} is empty\n    fix: dataset.path=FILE with at least one row")
    reader = {".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet, ".arrow": _arrow}
    try:
        if kind in TEXT:
            with _opened(path, binary=True) as file:
                yield Row({"text": file.read().decode("utf-8-sig")}, path, 1)
        else:
            yield from reader.get(kind, _json_lines)(path)
    except (UnicodeDecodeError, csv.Error, EOFError) as error:
        raise DataError(f"{path} cannot be read as {kind[1:]}: {error}") from error


def _object(text: bytes, path: str, line: int) -> Row | BadRow:
    try:
        values = json.loads(text)
    except ValueError as error:
        reason = f"is not valid JSON: {error}"
    else:
        if isinstance(values, dict):
            return Row(values, path, line)
        reason = f"is not an object but {type(values).__name__}"
    return BadRow(path, line, f"the line {reason}", text.decode("utf-8", "replace").strip()[:SHOWN])


def _json_lines(path: str) -> Iterator[Row | BadRow]:
    with _opened(path, binary=True) as file:
        for line, text in enumerate(file, 1):
            if line == 1:
                text = text.removeprefix(b"\xef\xbb\xbf")
            if not text.isspace():
                yield _object(text, path, line)


def _json(path: str) -> Iterator[Row | BadRow]:
    """Read an array of objects, an object that holds one array, or JSON lines."""
    with _opened(path, binary=False) as file:
        head = file.read(BLOCK)
        begin = head.lstrip()[:1]
        if begin == "[":
            yield from _array(head, head.index("[") + 1, file, path)
            return
        if begin != "{":
            raise DataError(f"{path} holds no JSON array or object\n    fix: an array of objects")
        text = head + file.read()
    try:
        values = json.loads(text)
    except ValueError:
        yield from _json_lines(path)
        return
    lists = [key for key, value in values.items() if isinstance(value, list)]
    if len(lists) != 1:
        raise DataError(
            f"{path} is one JSON object with {len(lists)} lists; the rows must be its only list\n"
            "    fix: an array of objects, or one object per line in a .jsonl file"
        )
    start = re.compile(rf'"{re.escape(lists[0])}"\s*:\s*\[').search(text)
    assert start is not None
    yield from _array(text, start.end(), io.StringIO(), path)


def _array(text: str, place: int, file: IO[str], path: str) -> Iterator[Row | BadRow]:
    """Yield an array's elements, each with the line in which it begins.

    Args:
        text: The part of the file that has been read.
        place: Position of the first element in ``text``.
        file: The rest of the file; at most one element and one block of it are in memory.
        path: The file's name.
    """
    decoder = json.JSONDecoder()
    blank = re.compile(r"[\s,]*")
    line = 1 + text.count("\n", 0, place)
    while True:
        after = blank.match(text, place).end()  # type: ignore[union-attr]
        line += text.count("\n", place, after)
        place = after
        if text[place : place + 1] == "]":
            return
        damage = "the array is not closed"
        try:
            values, end = decoder.raw_decode(text, place)
        except ValueError as error:
            damage, end = str(error), len(text)
        if end == len(text):  # the next block may continue the element: 12 of 123
            # Read twice as much each time: a long element is not parsed again for every block.
            more = file.read(max(BLOCK, len(text) - place))
            if not more:
                raise DataError(f"{path}:{line}: the JSON is damaged: {damage}")
            text, place = text[place:] + more, 0
            continue
        if isinstance(values, dict):
            yield Row(values, path, line)
        else:
            reason = f"the element is not an object but {type(values).__name__}"
            yield BadRow(path, line, reason, text[place:end][:SHOWN])
        line += text.count("\n", place, end)
        place = end


def _csv(path: str) -> Iterator[Row | BadRow]:
    csv.field_size_limit(2**31 - 1)
    tabs = kind_of(path) == ".tsv"
    with _opened(path, binary=False) as file:
        rows = csv.reader(file, delimiter="\t" if tabs else ",", strict=True)
        header = next(rows, [])
        if len(header) == 1 and ";" in header[0]:
            raise DataError(f"{path} is separated by semicolons\n    fix: save it with commas")
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise DataError(f"{path} has the column {twice[0]} twice\n    fix: rename one of them")
        line = rows.line_num + 1
        for fields in rows:
            if len(fields) == len(header):
                yield Row(dict(zip(header, fields, strict=True)), path, line)
            elif fields:
                reason = f"the row has {len(fields)} fields, the header {len(header)}"
                yield BadRow(path, line, reason, json.dumps(fields, ensure_ascii=False)[:SHOWN])
            line = rows.line_num + 1


def _parquet(path: str) -> Iterator[Row]:
    import pyarrow.parquet

    with _opened(path, binary=True) as file, _damaged(path):
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(1000)
        rows = (values for batch in batches for values in batch.to_pylist())
        for number, values in enumerate(rows, 1):
            yield Row(values, path, number)


def _arrow(path: str) -> Iterator[Row]:
    import pyarrow as pa

    with _opened(path, binary=True) as file, _damaged(path):
        data = io.BytesIO(file.read()) if "://" in path else pa.memory_map(path)
        try:
            batches = iter(pa.ipc.open_stream(data))
        except pa.ArrowInvalid:
            whole = pa.ipc.open_file(data)
            batches = (whole.get_batch(index) for index in range(whole.num_record_batches))
        rows = (values for batch in batches for values in batch.to_pylist())
        for number, values in enumerate(rows, 1):
            yield Row(values, path, number)


@contextlib.contextmanager
def _damaged(path: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except pa.ArrowException as error:
        raise DataError(f"{path} is damaged: {error}\n    fix: write or copy it again") from error
