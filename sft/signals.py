"""Signals that ask a run to stop: it saves at the end of the step, and says how it ended."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

STOPPED = 75  # sysexits.h calls it a temporary failure: the same command goes on
INTERRUPTED = 130  # what shells report after Ctrl-C
WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Signals:
    """While it is entered, notes the first signal instead of dying of it.

    A second Ctrl-C ends at once. Other signals are sent more than once by those who mean it once
    (a scheduler to every process, and torchrun again to its ranks), so their repetition is nothing.
    """

    received: int | None = None

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
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
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None and os.environ.get("RANK", "0") == "0":
            hint = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
            name = signal.Signals(number).name
            # os.write: logging may be in the middle of a line, whose lock is held.
            os.write(
                sys.stderr.fileno(), f"{name}: saving at the end of this step{hint}\n".encode()
            )
        self.received = number
