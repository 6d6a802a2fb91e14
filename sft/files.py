"""Write files and folders that are complete or absent, identify files by content, locate the cache.

A new folder is written under its name plus ``.partial`` and renamed when all of it is on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sft.errors import DataError

PARTIAL = ".partial"  # the suffix of a folder that is being written, or being deleted
# Errors of the disk, its permissions or a path on it, which the user can correct.
DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
}
FRESH = 2.0  # seconds; a file that is younger may change again without a new time stamp


def cache_dir() -> Path:
    """Return the cache folder, which may be deleted: $SFT_CACHE_DIR, or ~/.cache/sft."""
    return Path(os.environ.get("SFT_CACHE_DIR") or Path.home() / ".cache" / "sft")


def require_writable(folder: Path) -> None:
    """Make a folder of the cache.

    Raises:
        DataError: It cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise DataError(
            f"the cache folder {folder} cannot be written to: {error.strerror}\n"
            "    fix: SFT_CACHE_DIR=FOLDER in the environment"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file that is complete or absent, also after a power cut."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def to_disk(path: Path) -> None:
    """Wait until the content of a file, or the entries of a folder, are on the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield the folder to write to; it gets its final name, or is deleted after an error.

    After a kill it remains under the name of ``partial_of``, and the next writer deletes its files.
    """
    partial = begin_folder(final)
    try:
        yield partial
        finish_folder(partial, final)
    except BaseException:
        abandon_folder(final)
        raise


def partial_of(final: Path) -> Path:
    """Return the path of a folder while it is written."""
    return final.with_name(final.name + PARTIAL)


def begin_folder(final: Path) -> Path:
    """Make the folder that is written to before it gets its final name; empty it if it exists."""
    partial = partial_of(final)
    partial.mkdir(parents=True, exist_ok=True)
    empty(partial)  # of what a killed process has left
    return partial


def empty(folder: Path, keep: Sequence[str] = ()) -> None:
    """Delete all files and folders in a folder but those with the names to keep."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()


def finish_folder(partial: Path, final: Path) -> None:
    """Rename a written folder to its final name after all of it has reached the disk.

    Args:
        partial: The folder that ``begin_folder`` made.
        final: The final path; a folder that exists there is replaced, and deleted only after the
            new one has its name.
    """
    for path in partial.rglob("*"):
        to_disk(path)
    to_disk(partial)
    replaced = _set_aside(final) if final.exists() else None
    partial.rename(final)
    to_disk(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced)


def abandon_folder(final: Path) -> None:
    """Delete what was written of a folder that will not be finished."""
    shutil.rmtree(partial_of(final), ignore_errors=True)


def delete_folder(path: Path) -> None:
    """Rename a folder, then delete it: a kill leaves no incomplete one under its name."""
    shutil.rmtree(_set_aside(path))


def _set_aside(path: Path) -> Path:
    doomed = path.with_name(f"{path.name}{PARTIAL}-old")
    shutil.rmtree(doomed, ignore_errors=True)
    return path.rename(doomed)


def to_json(record: dict[str, Any], indent: int | None = None, ascii: bool = True) -> str:
    """Return standard JSON, in which NaN and infinity do not exist: they become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(record), indent=indent, ensure_ascii=ascii)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; skip invalid lines, such as the incomplete last line of a killed run."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [record for record in records if isinstance(record, dict)]


def hash_of(file: str | Path) -> str:
    """Hash a file's bytes (XXH3, 128 bits): it detects damage, but is not cryptographic."""
    import xxhash

    hasher = xxhash.xxh3_128()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()


def inventory(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and hash of every file in a folder, by its path in the folder."""
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "xxh3": hash_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def damage_of(folder: Path, listed: Any) -> str | None:
    """Compare a folder's files with their inventory, which was read from a file.

    Returns:
        The first file that is missing or damaged, and how; None: all are as they were written.
    """
    try:
        for name, said in listed.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != said["bytes"]:
                return f"{name} has {file.stat().st_size:,} bytes, not {said['bytes']:,}"
            if hash_of(file) != said["xxh3"]:
                return f"{name} is damaged: its hash is not the one that was written"
    except (AttributeError, KeyError, TypeError, ValueError):
        return "the list of its files is damaged"
    return None


def stamp(file: str) -> str:
    """Return a text that changes with the file: its size, modification time and inode."""
    stat = os.stat(file)
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"


def digest(files: Sequence[str], root: Path) -> str:
    """Hash the names and bytes of files; a hash in the cache is reused if the file is unchanged."""
    import xxhash

    memo_file = cache_dir() / "digests.json"
    try:
        memo = dict(json.loads(memo_file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        memo = {}  # an absent or damaged cache costs only time
    before = len(memo)
    whole = xxhash.xxh3_128()
    for file in files:
        key = f"{os.path.realpath(file)} {stamp(file)}"
        known = memo.get(key)
        if known is None:
            known = hash_of(file)
            # The time stamp of a file that changed just now may not show its next change.
            if os.stat(file).st_mtime < time.time() - FRESH:
                memo[key] = known
        whole.update(f"{os.path.relpath(file, root)} {known}\n".encode(errors="surrogateescape"))
    if len(memo) > before:
        with contextlib.suppress(OSError):
            memo_file.parent.mkdir(parents=True, exist_ok=True)
            write_text(memo_file, json.dumps(memo))
    return whole.hexdigest()


def without_protocol(path: str) -> str:
    """Return a path on this machine without ``file://``; any other unchanged."""
    protocol, separator, name = path.partition("://")
    return name if separator and protocol in ("file", "local") else path
