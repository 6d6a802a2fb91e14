"""Read and identify the rows of a path: a file, folder, pattern, URL or hub dataset."""

from __future__ import annotations

import contextlib
import glob
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.data.readers import (
    JSON_LINES,
    TABLES,
    TEXT,
    BadRow,
    Row,
    kind_of,
    read_file,
    remote_errors,
)
from sft.errors import DataError
from sft.files import digest, stamp

LINES = (*JSON_LINES, ".csv", ".tsv")
BUFFER = 10_000  # rows in the shuffle buffer of a hub stream


def read(
    path: str, subset: str | None = None, split: str = "train", stream_seed: int | None = None
) -> Iterator[Row | BadRow]:
    """Yield the rows of a file, folder, pattern, URL or hub dataset.

    JSON is not read through Arrow, whose common type would give every tool call the arguments of
    all the others.

    Args:
        path: Where the rows are.
        subset: The hub dataset's configuration.
        split: Split of a hub dataset, or of one that ``save_to_disk`` wrote.
        stream_seed: Download only the rows that are taken: files in an order drawn from this seed,
            hub rows also shuffled in a buffer. None: read all rows, in order.

    Raises:
        DataError: The source is missing or its kind is unknown.
    """
    local = Path(path).expanduser()
    if local.is_dir() and _saved(local):
        yield from _from_disk(local, split)
    elif files := files_of(path):
        if stream_seed is not None:
            random.Random(stream_seed).shuffle(files)
        for file in files:
            yield from read_file(file)
    else:
        with _hub_errors(path):  # a stream may fail at any row
            rows = _hub_rows(path, subset, split, stream_seed)
            for number, values in enumerate(rows, 1):
                yield Row(values, path, number)


def files_of(path: str) -> list[str]:
    """List the files that a path names, in order; an empty list if it is a hub id.

    Raises:
        DataError: The path can only be a file or folder, and does not exist.
    """
    if "://" in path:
        return _remote(path)
    local = Path(path).expanduser()
    if local.is_file():
        return [str(local)]
    if local.is_dir():
        return _folder(local)
    if found := sorted(glob.glob(str(local), recursive=True)):
        return [file for file in found if Path(file).is_file()]
    if kind_of(path) or local.is_absolute() or path.startswith(".") or glob.has_magic(path):
        raise DataError(
            f"there is no file or folder {path}\n"
            f"    fix: dataset.path=FILE; a relative path starts at {Path.cwd()}"
        )
    return []


def _folder(folder: Path) -> list[str]:
    texts = sorted(file for file in folder.rglob("*") if kind_of(file.name) in TEXT)
    if texts:
        return [str(file) for file in texts]
    tables = sorted(file for file in folder.rglob("*") if kind_of(file.name))
    kinds = sorted({str(kind_of(file.name)) for file in tables})
    if len(kinds) != 1:
        found = (
            f"files of several kinds: {', '.join(kinds)}" if kinds else "no file of a known kind"
        )
        raise DataError(
            f"the folder {folder} holds {found}\n    fix: dataset.path='{folder}/*.jsonl', or "
            f"a folder with files of one kind: {', '.join((*TEXT, *TABLES))}"
        )
    return [str(file) for file in tables]


def _remote(path: str) -> list[str]:
    import fsspec

    with remote_errors(path):
        files = fsspec.open_files(path)
        names = [file.fs.unstrip_protocol(file.path) for file in files]
    if not names:
        raise DataError(f"there is no file at {path}\n    fix: dataset.path=URL of a file")
    return names


def estimated_rows(path: str) -> int | None:
    """Estimate the rows of local files by counting lines; None for URLs and other formats."""
    files = [] if "://" in path else files_of(path)
    if any(Path(file).suffix not in LINES for file in files):
        return None
    total = 0
    for name in files:
        with open(name, "rb") as file:
            while block := file.read(1 << 22):
                total += block.count(b"\n")
    return total or None


def _saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _from_disk(folder: Path, split: str) -> Iterator[Row]:
    """Yield the rows of a dataset that ``save_to_disk`` wrote."""
    from datasets import DatasetDict, load_from_disk

    rows = load_from_disk(str(folder))
    if isinstance(rows, DatasetDict):
        if split not in rows:
            raise DataError(
                f"{folder} has no split {split}; it has {', '.join(rows)}\n"
                f"    fix: dataset.split={next(iter(rows))}"
            )
        rows = rows[split]
    for number, values in enumerate(rows, 1):
        yield Row(values, str(folder), number)


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
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise DataError(
            f"the dataset {path} cannot be loaded from the hub: {reason}\n"
            "    fix: check the name and the network; HF_HUB_OFFLINE=1 uses only cached data; "
            "dataset=demo needs no network"
        ) from error


def fingerprint(
    path: str, subset: str | None = None, split: str = "train", streamed: bool = False
) -> str:
    """Identify rows by content: a new modification time alone does not change the result.

    Streamed files are not read for this: their names, sizes and modification times identify them.

    Raises:
        DataError: The source is missing.
    """
    local = Path(path).expanduser()
    if local.is_dir() and _saved(local):
        files = sorted(str(file) for file in local.rglob("*") if file.is_file())
        return f"{digest(files, local)} {split}"
    if files := files_of(path):
        if "://" in path:
            return " ".join(map(_remote_digest, files))
        if streamed:
            return " ".join(f"{file} {stamp(file)}" for file in files)
        return digest(files, local if local.is_dir() else Path(files[0]).parent)
    with _hub_errors(path):
        if not streamed:
            return str(_hub_rows(path, subset, split)._fingerprint)
        from datasets import load_dataset_builder

        return f"{load_dataset_builder(path, subset).hash} {split}"


def _remote_digest(path: str) -> str:
    import fsspec

    with remote_errors(path):
        filesystem, name = fsspec.url_to_fs(path)
        try:
            return str(filesystem.checksum(name))
        except NotImplementedError:
            return str(filesystem.ukey(name))
