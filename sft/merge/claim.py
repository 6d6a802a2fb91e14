"""The output folder of a merge: complete or absent, and written by one merge at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from sft.errors import MergeError
from sft.files import DISK, new_folder, partial_of
from sft.inference.card import ADAPTER_SETTINGS, base_of, read_card
from sft.merge.report import REPORT
from sft.model.source import source
from sft.run import record

FAILED = ".failed"  # suffix of a merged model that failed the verification
SPARE = 64 << 20  # bytes for the files beside the weights


def check_output(output: Path, overwrite: bool) -> None:
    """Check that the output folder is new, or is a merged model that may be replaced.

    Raises:
        MergeError: It exists, and overwrite is false or it holds no report of a merge.
    """
    if output.exists() and not overwrite:
        raise MergeError(
            f"{output} exists\n    fix: overwrite=true to replace it, or output=NEW_FOLDER"
        )
    for folder in (output, _failed(output)):
        if folder.exists() and not (folder / REPORT).is_file():
            raise MergeError(
                f"{folder} exists without merge_report.json\n    fix: output=NEW_FOLDER"
            )


def bytes_of(size: str) -> int | None:
    """Parse a size as Transformers does; None if it is not a size."""
    from transformers.utils.hub import convert_file_size_to_int

    try:
        found: int = convert_file_size_to_int(size)
    except ValueError:
        return None
    return found if found > 0 else None


def check_adapters(adapters: Sequence[Path], base: str | None) -> None:
    """Check that the adapters and local bases exist, before a large library is imported.

    Args:
        adapters: The adapters' folders.
        base: The base that the command names.

    Raises:
        MergeError: There is no adapter in a folder.
        ModelError: There is no such base.
    """
    for folder in adapters:
        if not (folder / ADAPTER_SETTINGS).is_file():
            fix = "run=FOLDER of a finished LoRA run, or adapter=FOLDER with adapter_config.json"
            if record.weights(folder):
                fix = f"run={folder}"
            raise MergeError(f"there is no adapter in {folder}\n    fix: {fix}")
        source(base_of(folder, read_card(folder), base, trust=False))


def check_space(size: int, output: Path) -> None:
    """Check that the disk has room for the merged model.

    Args:
        size: The size of the weights in bytes.
        output: The output folder, which need not exist.

    Raises:
        MergeError: It has not.
    """
    there = next(path for path in output.absolute().parents if path.exists())
    free = shutil.disk_usage(there).free
    if free < size + SPARE:
        raise MergeError(
            f"the merged model needs {(size + SPARE) / 1e9:.3f} GB, and {there} has "
            f"{free / 1e9:.3f} GB free"
            "\n    fix: output=FOLDER on another disk, or dtype=bfloat16"
        )


@contextlib.contextmanager
def claimed(output: Path) -> Iterator[Path]:
    """Yield the folder to write to, locked, so that a second merge to the same output is refused.

    It gets its final name when the block ends, and is deleted after an error. After a kill it
    remains, and the next merge deletes its files.

    Raises:
        MergeError: A different merge is writing there, the folder is not a merge's, or the disk
            refuses to be written to.
    """
    partial = partial_of(output)
    names = [path.name for path in partial.iterdir()] if partial.exists() else []
    if names and not any(name.startswith(REPORT) for name in names):
        raise MergeError(f"{partial} exists without merge_report.json\n    fix: output=NEW_FOLDER")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial), new_folder(output):
            yield partial
    except OSError as error:
        if error.errno not in DISK:
            raise
        raise MergeError(
            f"{output} cannot be written: {error}\n    fix: solve that, or output=NEW_FOLDER"
        ) from error


def set_aside(partial: Path, output: Path) -> Path:
    """Rename a merged model that failed the verification, so that it can be inspected."""
    failed = _failed(output)
    shutil.rmtree(failed, ignore_errors=True)
    return partial.rename(failed)


def _failed(output: Path) -> Path:
    return output.with_name(output.name + FAILED)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder; the kernel releases the lock when the process ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        message = f"another merge is writing {folder}\n    fix: wait, or output=NEW_FOLDER"
        raise MergeError(message) from None
    finally:
        os.close(handle)
