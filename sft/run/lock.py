"""The lock of a run's folder: one process at a time trains in it."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from sft.errors import RunError

LOCK = "lock"


class Lock:
    """A lock that one process holds; the kernel frees it if the process dies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: IO[str] | None = None  # open as long as the lock is held

    def refuse_if_taken(self) -> None:
        """Check that no process holds the lock, without taking it.

        Raises:
            RunError: Another process trains in the folder.
        """
        if not (self.folder / LOCK).is_file():
            return
        with (self.folder / LOCK).open() as file:
            self._lock(file, fcntl.LOCK_SH)

    def is_taken(self) -> bool:
        """Return whether a process holds the lock."""
        try:
            self.refuse_if_taken()
        except RunError:
            return True
        return False

    def take(self) -> None:
        """Take the lock.

        Raises:
            RunError: Another process trains in the folder.
        """
        self._file = (self.folder / LOCK).open("w")
        self._lock(self._file, fcntl.LOCK_EX)

    def _lock(self, file: IO[str], kind: int) -> None:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another process trains in {self.folder}\n"
                "    fix: run_name=NAME for a new run, or wait until that process ends"
            ) from None

    def release(self) -> None:
        """Free the lock, so that this process may train a different run."""
        if self._file is not None:
            # Unlock before closing: forked workers share the open file, and would keep the lock.
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()
            self._file = None
