"""Read the rows of one file of any known kind lazily, each with its line number."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from sft.data import arrow_rows
from sft.data.csv_rows import table
from sft.data.json_rows import BLOCK, json_file, json_lines
from sft.data.rows import SHOWN, BadRow, Row, Rows, too_long
from sft.errors import DataError, SourceError

JSON_LINES = (".jsonl", ".ndjson")
TEXT = (".txt", ".md")
TABLES = (".json", *JSON_LINES, ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
MAX_ROW_BYTES = 1 << 28  # the default of dataset.max_row_bytes
# What reads a protocol, and the extra of sft that includes it.
PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), ("s3fs", "s3")),
    **dict.fromkeys(("http", "https"), ("aiohttp", "http")),
    **dict.fromkeys(("gs", "gcs"), ("gcsfs", "gcs")),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), ("adlfs", "azure")),
}


def endings_of(path: str) -> tuple[str, str]:
    """Return a file's ending and that of its compression, in lower case; "" if it has none."""
    name = path.partition("?")[0] if "://" in path else path
    suffixes = ["", *(suffix.lower() for suffix in Path(name).suffixes)]
    compression = suffixes.pop() if suffixes[-1] in COMPRESSED else ""
    return suffixes[-1], compression


def kind_of(path: str) -> str | None:
    """Return a file's ending, without that of the compression; None if it is unknown."""
    ending = endings_of(path)[0]
    return ending if ending in (*TEXT, *TABLES) else None


@contextlib.contextmanager
def read_errors(path: str) -> Iterator[None]:
    """Raise a DataError that names the path, whatever a decompressor or file system raises."""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        protocol = path.partition("://")[0].rpartition("::")[2]
        package, extra = PACKAGES.get(protocol, (None, None))
        fix = f"pip install {package}, which the extra sft[{extra}] includes"
        if package is None:
            fix = f"install the package that reads {protocol}://, or copy the data to a local disk"
        raise DataError(f"{path} cannot be read: {error}\n    fix: {fix}") from error
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        raise DataError(
            f"{path} cannot be read: it is not UTF-8: {error}\n"
            f"    fix: iconv -f {encoding} -t UTF-8 {path}, or the encoding that it has"
        ) from error
    except Exception as error:
        fix = "check the address and your access to it" if "://" in path else "write it again"
        reason = str(error) or type(error).__name__
        raise DataError(f"{path} cannot be read: {reason}\n    fix: {fix}") from error


def read_file(path: str, max_row_bytes: int = MAX_ROW_BYTES) -> Rows:
    """Yield the rows of one file, local or remote, compressed or not.

    Args:
        path: The file.
        max_row_bytes: Bytes of a line or row, at most; more are never in memory.

    Raises:
        DataError: The file is empty, damaged or of an unknown kind.
    """
    kind = kind_of(path)
    if kind is None:
        known = ", ".join((*TABLES, *TEXT))
        raise DataError(f"{path} has an unknown file ending\n    fix: a file that ends in {known}")
    with read_errors(path), _opened(path) as file:
        if not file.peek(1):
            raise SourceError(f"{path} is empty", "FILE with at least one row")
        yield from READERS[kind](file, path, max_row_bytes)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[io.BufferedReader]:
    """Open a local or remote file; decompress it if its ending says that it is compressed."""
    import fsspec

    compression = COMPRESSED.get(endings_of(path)[1])
    if compression not in (None, *fsspec.available_compressions()):
        raise DataError(
            f"{path} is compressed with {compression}, which this Python cannot read\n"
            "    fix: pip install zstandard"
        )
    opened = fsspec.open(path, "rb", compression=compression)
    try:
        yield io.BufferedReader(opened.open(), BLOCK)
    finally:
        opened.close()


def _text(file: IO[bytes], path: str, limit: int) -> Rows:
    text = file.read(limit + 1)
    if len(text) > limit:
        shown = text[:SHOWN].decode("utf-8", "replace")
        yield BadRow(path, 1, too_long("the text", limit), shown)
    else:
        yield Row({"text": text.decode("utf-8-sig")}, path, 1)


def _arrow(file: IO[bytes], path: str, limit: int) -> Rows:
    import pyarrow as pa

    read = arrow_rows.parquet if kind_of(path) == ".parquet" else arrow_rows.arrow
    try:
        for number, values in enumerate(read(file, limit), 1):
            if isinstance(values, str):
                yield BadRow(path, number, values, "")
            else:
                yield Row(values, path, number)
    except pa.ArrowException as error:
        raise DataError(f"{path} is damaged: {error}\n    fix: write or copy it again") from error


def _csv(file: io.BufferedReader, path: str, limit: int) -> Rows:
    return table(file, path, limit, "\t" if kind_of(path) == ".tsv" else ",")


READERS: dict[str, Callable[[io.BufferedReader, str, int], Rows]] = {
    **dict.fromkeys(TEXT, _text),
    **dict.fromkeys(JSON_LINES, json_lines),
    **{".json": json_file, ".csv": _csv, ".tsv": _csv, ".parquet": _arrow, ".arrow": _arrow},
}
