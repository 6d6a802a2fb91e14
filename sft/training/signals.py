"""Signals that ask a run to stop: it saves at the end of the step and then exits."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from sft import process, progress

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: give the same command again to resume the run
INTERRUPTED = 130  # what shells report after Ctrl-C
WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Signals:
    """A context in which the first signal is recorded and does not end the process.

    A second Ctrl-C ends it at once. Other signals often arrive twice although they are meant once
    (a scheduler signals every process, and torchrun its ranks again), so repetitions are ignored.
    """

    received: int | None = None
    entered = 0  # how many contexts of this process are active

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._process = os.getpid()
        _watch_forks()
        Signals.entered += 1
        for number in WATCHED:
            # Shells make background jobs ignore SIGINT; that must stay so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        Signals.entered -= 1
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if error is not None and process.world_size() > 1:
            # The first rank that ends makes the launcher send SIGTERM to the other ranks. They
            # must still write run.json and report the error.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # in a loader worker that was just forked
            return
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None and process.rank() == 0:
            hint = "; press Ctrl-C again to stop now" if number == signal.SIGINT else ""
            name = signal.Signals(number).name
            # os.write, because the signal may have interrupted logging, which holds a lock.
            # The bar and the terminal's ^C are on the line; the next step draws the bar again.
            line = progress.ERASE if progress.on_terminal() else ""
            line += f"{name}: the run stops after it has saved this step{hint}\n"
            with contextlib.suppress(OSError):  # the terminal may be closed
                os.write(sys.stderr.fileno(), line.encode())
        self.received = number


@functools.cache  # once per process: a registered hook cannot be removed
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_leave_group)


def _leave_group() -> None:
    """Move a loader worker out of its rank's process group as soon as it is forked.

    torchrun, schedulers, ``timeout`` and terminals signal the whole group. A worker that dies of
    the signal would end its rank before the rank has saved.
    """
    if Signals.entered:
        os.setpgid(0, 0)


def end_with_rank(init: Callable[[int], object], worker: int) -> None:
    """Start a loader worker that dies with its rank; otherwise it would hold the run's lock."""
    process.end_with_parent(signal.SIGKILL)
    init(worker)


def end_with_launcher() -> None:
    """Send this rank SIGTERM, so that it saves and ends, if its torchrun dies."""
    if process.from_torchrun():
        process.end_with_parent(signal.SIGTERM)
