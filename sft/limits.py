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
from typing import Any

MATCHING = 10  # seconds; real expressions take milliseconds


class OutOfTime(BaseException):
    """The limit is over. Not an Exception, so that no library takes it for an error of its own."""


class TimeLimit:
    """Raises OutOfTime in its block when that has taken too long.

    A timer raises it, between two instructions of Python or within a regular expression. There is
    no limit in another thread, which gets no signals. A timer that somebody else has set goes on
    after the block.

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
        if self.outer is None and (_others is not None or not self.often):
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


_others: tuple[Any, float] | None = None  # somebody else's handler, and when their timer rings


def _start(seconds: float) -> None:
    global _others
    if threading.current_thread() is not threading.main_thread():
        return
    handler, left = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0]
    if handler not in (_ring, signal.SIG_DFL):
        _others = handler, time.monotonic() + left if left else 0.0
    signal.signal(signal.SIGALRM, _ring)
    signal.siginterrupt(signal.SIGALRM, False)  # else a system call of a C library would fail
    signal.setitimer(signal.ITIMER_REAL, seconds)
    TimeLimit.timer_of, TimeLimit.rings = os.getpid(), time.monotonic() + seconds


@atexit.register  # Python's own handlers end first, and then the signal would kill the process
def _stop() -> None:
    global _others
    if TimeLimit.timer_of == os.getpid():
        signal.setitimer(signal.ITIMER_REAL, 0)
        TimeLimit.timer_of = None
    if _others is not None:
        handler, rings = _others
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, max(rings - time.monotonic(), 0.01) if rings else 0)
        _others = None


def _ring(number: int, frame: FrameType | None) -> None:
    TimeLimit.timer_of = None
    limit = TimeLimit.current
    if limit is None:
        return
    if time.monotonic() >= limit.end:
        raise OutOfTime
    _start(max(limit.end - time.monotonic(), 0.01))  # zero would stop the timer
