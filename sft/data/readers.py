"""Rows of any source, each with its place, read lazily: a file may be larger than memory."""

from __future__ import annotations

import contextlib
import csv
import glob
import io
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import xxhash

from sft.errors import DataError
from sft.files import write_text

JSON_LINES = (".jsonl", ".ndjson")
TEXT = (".txt", ".md")
TABLES = (".json", *JSON_LINES, ".csv", ".tsv", ".parquet", ".arrow")
LINES = (*JSON_LINES, ".csv", ".tsv")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
SHOWN = 10_000  # characters of a bad row that are kept
FRESH = 2.0  # seconds in which a file may change without its time stamp telling


class Row(NamedTuple):
    """One row, and where it begins: a line, or a row number where there are no lines."""

    values: dict[str, Any]
    file: str
    line: int


class BadRow(NamedTuple):
    """Something that is no row: where it is, why not, and what was there."""

    file: str
    line: int
    reason: str
    text: str


def cache_dir() -> Path:
    """Give the folder for what can be made again: $SFT_CACHE_DIR, or ~/.cache/sft."""
    return Path(os.environ.get("SFT_CACHE_DIR") or Path.home() / ".cache" / "sft")


def read(path: str, subset: str | None = None, split: str = "train") -> Iterator[Row | BadRow]:
    """Yield the rows of a file, folder, pattern, URL or hub dataset.

    JSON is read as it is: Arrow would give every tool call the arguments of all the others.

    Raises:
        DataError: The source is missing or is of no known kind.
    """
    local = Path(path).expanduser()
    if local.is_dir() and _saved(local):
        yield from _from_disk(local, split)
    elif files := files_of(path):
        for file in files:
            yield from _file(file)
    else:
        yield from _hub(path, subset, split)


def files_of(path: str) -> list[str]:
    """List the files that a path names, in order; none if it is a hub id.

    Raises:
        DataError: It can only be a file or folder, and is not there.
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
    if _kind(path) or local.is_absolute() or path.startswith(".") or glob.has_magic(path):
        raise DataError(
            f"there is no file or folder {path}\n    fix: dataset.path=FILE, from {Path.cwd()}"
        )
    return []


def _kind(path: str) -> str | None:
    """Give a file's ending, that of a compressed one too; None if it is not known."""
    suffixes = Path(path.partition("?")[0]).suffixes
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in (*TEXT, *TABLES) else None


def _folder(folder: Path) -> list[str]:
    texts = sorted(file for file in folder.rglob("*") if _kind(file.name) in TEXT)
    if texts:
        return [str(file) for file in texts]
    tables = sorted(file for file in folder.rglob("*") if _kind(file.name))
    kinds = sorted({str(_kind(file.name)) for file in tables})
    if len(kinds) != 1:
        found = (
            f"files of several kinds: {', '.join(kinds)}" if kinds else "no file of a known kind"
        )
        raise DataError(
            f"the folder {folder} holds {found}\n    fix: dataset.path='{folder}/*.jsonl', or "
            f"a folder of one of {', '.join((*TEXT, *TABLES))}"
        )
    return [str(file) for file in tables]


@contextlib.contextmanager
def _remote_errors(path: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}\n    fix: check the address and your access to it"
        ) from error


def _remote(path: str) -> list[str]:
    import fsspec

    with _remote_errors(path):
        files = fsspec.open_files(path)
        names = [file.fs.unstrip_protocol(file.path) for file in files]
    if not names:
        raise DataError(f"there is nothing at {path}\n    fix: dataset.path=URL of a file")
    return names


@contextlib.contextmanager
def _opened(path: str, binary: bool) -> Iterator[IO[Any]]:
    """Open a local or remote file, unpacked where its ending says that it is compressed."""
    import fsspec

    mode = {"mode": "rb"} if binary else {"mode": "rt", "encoding": "utf-8-sig", "newline": ""}
    packed = path.endswith(COMPRESSED)
    with _remote_errors(path):
        file = fsspec.open(path, compression="infer" if packed else None, **mode).open()
    with file:
        yield file


def _file(path: str) -> Iterator[Row | BadRow]:
    kind = _kind(path)
    if kind is None:
        known = ", ".join((*TABLES, *TEXT))
        raise DataError(f"{path} is of no known kind\n    fix: a file that ends in {known}")
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
        reason = f"is no JSON: {error}"
    else:
        if isinstance(values, dict):
            return Row(values, path, line)
        reason = f"is no object but {type(values).__name__}"
    return BadRow(path, line, f"the line {reason}", text.decode("utf-8", "replace").strip()[:SHOWN])


def _json_lines(path: str) -> Iterator[Row | BadRow]:
    with _opened(path, binary=True) as file:
        for line, text in enumerate(file, 1):
            if line == 1:
                text = text.removeprefix(b"\xef\xbb\xbf")
            if not text.isspace():
                yield _object(text, path, line)


def _json(path: str) -> Iterator[Row | BadRow]:
    """Read an array of objects, an object that holds one, or JSON lines by another name."""
    with _opened(path, binary=False) as file:
        text = file.read()
    head = text.lstrip()[:1]
    start = len(text) - len(text.lstrip())
    if head == "{":
        try:
            values = json.loads(text)
        except ValueError:
            yield from _json_lines(path)
            return
        lists = [key for key, value in values.items() if isinstance(value, list)]
        if len(lists) != 1:
            raise DataError(
                f"{path} is one JSON object with {len(lists)} lists; rows would be one list\n"
                "    fix: an array of objects, or one object a line in a .jsonl file"
            )
        start = re.compile(rf'"{re.escape(lists[0])}"\s*:\s*').search(text).end()  # type: ignore[union-attr]
    elif head != "[":
        raise DataError(f"{path} holds no JSON array or object\n    fix: an array of objects")
    yield from _array(text, start + 1, path)


def _array(text: str, place: int, path: str) -> Iterator[Row | BadRow]:
    """Walk an array's elements, so that each is known by the line it begins in."""
    decoder = json.JSONDecoder()
    blank = re.compile(r"[\s,]*")
    line, counted = 1, 0
    while True:
        place = blank.match(text, place).end()  # type: ignore[union-attr]
        line += text.count("\n", counted, place)
        counted = place
        if text[place : place + 1] == "]":
            return
        try:
            values, end = decoder.raw_decode(text, place)
        except ValueError as error:
            raise DataError(f"{path}:{line}: the JSON is damaged: {error}") from None
        if isinstance(values, dict):
            yield Row(values, path, line)
        else:
            reason = f"the element is no object but {type(values).__name__}"
            yield BadRow(path, line, reason, text[place:end][:SHOWN])
        place = end


def _csv(path: str) -> Iterator[Row | BadRow]:
    csv.field_size_limit(2**31 - 1)
    tabs = _kind(path) == ".tsv"
    with _opened(path, binary=False) as file:
        rows = csv.reader(file, delimiter="\t" if tabs else ",", strict=True)
        header = next(rows, [])
        if len(header) == 1 and ";" in header[0]:
            raise DataError(f"{path} is divided by semicolons\n    fix: save it with commas")
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
        raise DataError(f"{path} is damaged: {error}\n    fix: write or copy it anew") from error


def estimated_rows(path: str) -> int | None:
    """Count the rows of local files by their lines; None for what must be read to be counted."""
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
    """Read what Datasets saved."""
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


def _hub(path: str, subset: str | None, split: str) -> Iterator[Row]:
    for number, values in enumerate(_hub_rows(path, subset, split), 1):
        yield Row(values, path, number)


def _hub_rows(path: str, subset: str | None, split: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(path, subset, split=split)
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise DataError(
            f"the dataset {path} cannot be loaded from the hub: {reason}\n"
            "    fix: check the name and the network; HF_HUB_OFFLINE=1 uses only what is cached; "
            "dataset=demo is embedded"
        ) from error


def fingerprint(path: str, subset: str | None = None, split: str = "train") -> str:
    """Identify rows by content: a touched file is the same, a changed one is not.

    Raises:
        DataError: The source is missing.
    """
    local = Path(path).expanduser()
    if local.is_dir() and _saved(local):
        files = sorted(str(file) for file in local.rglob("*") if file.is_file())
        return f"{_digest(files, local)} {split}"
    if files := files_of(path):
        if "://" in path:
            return " ".join(map(_remote_digest, files))
        return _digest(files, local if local.is_dir() else Path(files[0]).parent)
    return f"{_hub_rows(path, subset, split)._fingerprint}"


def _remote_digest(path: str) -> str:
    import fsspec

    with _remote_errors(path):
        filesystem, name = fsspec.url_to_fs(path)
        try:
            return str(filesystem.checksum(name))
        except NotImplementedError:
            return str(filesystem.ukey(name))


def _digest(files: list[str], root: Path) -> str:
    """Hash names and bytes; what was hashed before and did not change since is not read again."""
    memo_file = cache_dir() / "digests.json"
    try:
        memo = dict(json.loads(memo_file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # absent or damaged: it only saves time
        memo = {}
    before = len(memo)
    whole = xxhash.xxh3_128()
    for file in files:
        stat = os.stat(file)
        key = f"{os.path.realpath(file)} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
        digest = memo.get(key)
        if digest is None:
            hasher = xxhash.xxh3_128()
            with open(file, "rb") as opened:
                while block := opened.read(1 << 22):
                    hasher.update(block)
            digest = hasher.hexdigest()
            # A file may change once more within its time stamp's grain.
            if stat.st_mtime < time.time() - FRESH:
                memo[key] = digest
        whole.update(f"{os.path.relpath(file, root)} {digest}\n".encode())
    if len(memo) > before:
        with contextlib.suppress(OSError):
            memo_file.parent.mkdir(parents=True, exist_ok=True)
            write_text(memo_file, json.dumps(memo))
    return whole.hexdigest()
