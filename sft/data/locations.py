"""Read and identify the rows of a location: files, or a dataset of the hub."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.data.arrow_rows import cleaner, without_nulls
from sft.data.folders import Location
from sft.data.readers import JSON_LINES, MAX_ROW_BYTES, read_errors, read_file
from sft.data.rows import BadRow, Row
from sft.errors import DataError
from sft.files import digest, stamp

LINES = (*JSON_LINES, ".csv", ".tsv")
BUFFER = 10_000  # rows in the shuffle buffer of a hub stream


def read(
    where: Location,
    subset: str | None = None,
    split: str = "train",
    stream_seed: int | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> Iterator[Row | BadRow]:
    """Yield the rows of a location.

    JSON is not read through Arrow, whose common type would give every tool call the arguments of
    all the others.

    Args:
        where: Where the rows are.
        subset: The hub dataset's configuration.
        split: The hub dataset's split.
        stream_seed: Download only the rows that are taken: files in an order drawn from this seed,
            hub rows also shuffled in a buffer. None: read all rows, in order.
        max_row_bytes: Bytes of a row in a file, at most.

    Raises:
        DataError: A file or the hub dataset cannot be read.
    """
    files = list(where.files)
    if stream_seed is not None:
        random.Random(stream_seed).shuffle(files)
    for file in files:
        yield from read_file(file, max_row_bytes)
    if not files:
        with _hub_errors(where.path):  # a stream may fail at any row
            rows = _hub_rows(where.path, subset, split, stream_seed)
            known = rows.features  # not in every stream
            clean = cleaner(known.arrow_schema, decoded=True) if known else without_nulls
            for number, values in enumerate(rows, 1):
                yield Row(clean(values), where.path, number)


def estimated_rows(where: Location) -> int | None:
    """Estimate the rows of local files by counting lines; None for URLs and other formats."""
    if where.remote or any(Path(file).suffix.lower() not in LINES for file in where.files):
        return None
    total = 0
    for name in where.files:
        with open(name, "rb") as file:
            while block := file.read(1 << 22):
                total += block.count(b"\n")
    return total or None


def _hub_rows(path: str, subset: str | None, split: str, stream_seed: int | None = None) -> Any:
    from datasets import load_dataset

    if stream_seed is None:
        return load_dataset(path, subset, split=split)
    rows = load_dataset(path, subset, split=split, streaming=True)
    return rows.shuffle(seed=stream_seed, buffer_size=BUFFER)


@contextlib.contextmanager
def _hub_errors(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Datasets, the hub, the network, a script's absence: any kind
        reason = (str(error) or repr(error)).splitlines()[0]
        raise DataError(
            f"the dataset {path} cannot be loaded from the hub: {reason}\n"
            "    fix: check the name and the network; HF_HUB_OFFLINE=1 uses only cached data; "
            "dataset=demo needs no network"
        ) from error


def fingerprint(
    where: Location, subset: str | None = None, split: str = "train", streamed: bool = False
) -> str:
    """Identify rows by content: a new modification time alone does not change the result.

    Streamed files are not read for this: their names, sizes and modification times identify them.

    Raises:
        DataError: The source is missing.
    """
    if where.files and where.remote:
        return " ".join(map(_remote_digest, where.files))
    if where.files and streamed:
        return " ".join(f"{file} {stamp(file)}" for file in where.files)
    if where.files:
        return digest(where.files, Path(where.root))
    with _hub_errors(where.path):
        if not streamed:
            return str(_hub_rows(where.path, subset, split)._fingerprint)
        from datasets import load_dataset_builder

        return f"{load_dataset_builder(where.path, subset).hash} {split}"


def _remote_digest(path: str) -> str:
    import fsspec

    with read_errors(path):
        filesystem, name = fsspec.url_to_fs(path)
        try:
            return str(filesystem.checksum(name))
        except NotImplementedError:
            return str(filesystem.ukey(name))
