"""A limit of time for what a file from elsewhere makes the process do."""

from __future__ import annotations

import atexit
import os
import re
import signal
import threading
import time
from collections.abc import Iterable, Sequence
from types import FrameType

MATCHING = 10  # seconds; real expressions take milliseconds


class OutOfTime(BaseException):
    """The limit is over. Not an Exception, so that no library takes it for an error of its own."""


class TimeLimit:
    """Raises OutOfTime in its block when that has taken too long.

    A timer raises it, between two instructions of Python or within a regular expression. There is
    no limit where the process gets no signals (another thread) or uses this timer otherwise.

    Args:
        seconds: The limit.
        often: The block is short and runs often, and setting a timer would take as long. So the
            timer is left running when the block ends; when it rings, it is set again for the rest
            of the block of that moment, if there is one.
    """

    current: TimeLimit | None = None
    timer_of: int | None = None  # the process in which the timer runs; a fork has none
    rings: float = 0.0  # when it rings

    def __init__(self, seconds: float, often: bool = False) -> None:
        self.seconds, self.often = seconds, often

    def __enter__(self) -> None:
        self.end = time.monotonic() + self.seconds
        self.outer, TimeLimit.current = TimeLimit.current, self
        if TimeLimit.timer_of != os.getpid() or TimeLimit.rings > self.end:
            _start(self.seconds)

    def __exit__(self, *_: object) -> None:
        TimeLimit.current = self.outer
        if self.outer is None and not self.often:
            _stop()


def slow_pattern(patterns: Iterable[str], texts: Sequence[str]) -> str | None:
    """Match regular expressions with all texts, as PEFT does with the paths of a model's modules.

    An expression such as ``(a+)+b`` would take it years.

    Returns:
        The first one that is not valid, or with which more than ``MATCHING`` seconds are over, and
        the reason; None if there is none.
    """
    with TimeLimit(MATCHING):
        for pattern in patterns:
            try:
                matches = re.compile(pattern).fullmatch
                for text in texts:
                    matches(text)
            except OutOfTime:
                return f"{pattern} takes more than {MATCHING} s to match the names of all modules"
            except (re.error, RecursionError, OverflowError) as error:
                return f"{pattern} is not a regular expression: {error}"
    return None


def _start(seconds: float) -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGALRM) not in (_ring, signal.SIG_DFL):
        return
    signal.signal(signal.SIGALRM, _ring)
    signal.siginterrupt(signal.SIGALRM, False)  # else a system call of a C library would fail
    signal.setitimer(signal.ITIMER_REAL, seconds)
    TimeLimit.timer_of, TimeLimit.rings = os.getpid(), time.monotonic() + seconds


@atexit.register  # Python's own handlers end first, and then the signal would kill the process
def _stop() -> None:
    if TimeLimit.timer_of == os.getpid():
        signal.setitimer(signal.ITIMER_REAL, 0)
        TimeLimit.timer_of = None


def _ring(number: int, frame: FrameType | None) -> None:
    TimeLimit.timer_of = None
    limit = TimeLimit.current
    if limit is None:
        return
    if time.monotonic() >= limit.end:
        raise OutOfTime
    _start(max(limit.end - time.monotonic(), 0.01))  # zero would stop the timer
