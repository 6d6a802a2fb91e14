"""Signals that ask a run to stop: it saves at the end of the step, and says how it ended."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import sys
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Any

from sft import process

STOPPED = 75  # sysexits.h calls it a temporary failure: the same command goes on
INTERRUPTED = 130  # what shells report after Ctrl-C
PR_SET_PDEATHSIG = 1  # linux/prctl.h
WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Signals:
    """While it is entered, notes the first signal instead of dying of it.

    A second Ctrl-C ends at once. Other signals are sent more than once by those who mean it once
    (a scheduler to every process, and torchrun again to its ranks), so their repetition is nothing.
    """

    received: int | None = None
    entered = 0  # how many objects of this process are entered

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._process = os.getpid()
        _watch_forks()
        Signals.entered += 1
        for number in WATCHED:
            if signal.getsignal(number) is not signal.SIG_IGN:  # that is how nohup works
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
            # The first rank that ends makes the launcher send SIGTERM to the others, which have
            # yet to write run.json and to say why.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader worker, forked a moment ago
            return
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None and process.rank() == 0:
            hint = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
            name = signal.Signals(number).name
            # os.write: logging may be in the middle of a line, whose lock is held.
            line = f"{name}: saving at the end of this step{hint}\n"
            with contextlib.suppress(OSError):  # a terminal that is closed
                os.write(sys.stderr.fileno(), line.encode())
        self.received = number


@functools.cache  # once for the process: what is registered stays
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_leave_group)


def _leave_group() -> None:
    """Take a loader worker out of its rank's process group, as soon as it is forked.

    torchrun, a scheduler, ``timeout`` and a terminal signal the whole group. A worker that dies of
    it would take its rank down before the rank has saved.
    """
    if Signals.entered:
        os.setpgid(0, 0)


def end_with_rank(init: Callable[[int], object], worker: int) -> None:
    """Start a loader worker that is killed with its rank: it would keep the run's lock."""
    _die_with_parent(signal.SIGKILL)
    init(worker)


def end_with_launcher(environ: Mapping[str, str] = os.environ) -> None:
    """Let a rank get SIGTERM, and so save and end, when its torchrun dies without a word to it."""
    if "TORCHELASTIC_RUN_ID" in environ:
        _die_with_parent(signal.SIGTERM)


def _die_with_parent(number: int) -> None:
    """Ask Linux for a signal when the parent dies."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before
        signal.raise_signal(number)
