"""Show how far a long operation is: a bar on a terminal, otherwise a line in the log every 30 s.

Only rank 0 shows anything, on stderr. No thread runs for it: ``update`` draws the bar and writes
the lines, and reads only the clock while neither is due. Of operations within each other only the
innermost has a bar, so that there is one line on the screen to erase.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from sft import process

logger = logging.getLogger("sft")

T = TypeVar("T")

LINE_EVERY = 30.0  # seconds between two lines of an operation in a log
DRAW_EVERY = 0.1  # seconds between two drawings of a bar
DRAW_AFTER = 0.5  # seconds of an operation without a bar, because most operations are done by then
ERASE = "\r\x1b[K"  # what terminals erase the line of the cursor by
MARGIN = 3  # columns right of a bar, into which the terminal writes ^C without starting a new line
NARROWEST = 5  # columns of a bar; where there are fewer, only figures are shown

_screen = threading.RLock()  # merging updates from several threads
_open: list[Progress] = []  # the innermost operation is the last


def on_terminal() -> bool:
    """Return whether this process may draw on stderr: on rank 0, and not on a plain terminal."""
    capable = os.environ.get("TERM", "dumb") != "dumb"
    return process.rank() == 0 and capable and sys.stderr.isatty()


class Progress:
    """One operation. ``progress`` makes and closes it; a callback may do so itself.

    Attributes:
        done: Units that are done; may be estimated.
        note: What the bar shows behind the time left, such as the loss.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "",
        *,
        done: int = 0,
        lines: bool = True,
        at_once: bool = False,
    ) -> None:
        """Begin an operation.

        Args:
            what: What is done, such as ``merging``.
            total: Units to do; None: not known, so that no time left is shown.
            unit: The plural of the unit; ``bytes`` are shown as kB, MB, ...
            done: Units that were done before, such as the steps before a checkpoint.
            lines: Whether a log gets lines; False where the operation writes its own.
            at_once: Draw the bar before the first update: the first unit may take long.
        """
        self.what, self.total, self.unit, self.note = what, total, unit, ""
        self.done = self._first = float(done)
        self.began = time.monotonic()
        self._after_first: tuple[float, float] | None = None  # time and units of the first update
        self._drawn = False
        self._draws = on_terminal()
        self._writes = lines and process.rank() == 0 and not self._draws
        wait = LINE_EVERY if self._writes else 0.0 if at_once else DRAW_AFTER
        self._due = self.began + wait if self._draws or self._writes else float("inf")
        with _screen:
            if _open:
                _open[-1]._erase()
            _open.append(self)
        if at_once and self._draws:
            self.update(0)

    def update(self, count: float = 1) -> None:
        """Count units as done. With 0, the operation is still alive, and its bar drawn again."""
        line = ""
        with _screen:
            self.done += count
            now = time.monotonic()
            if count and self._after_first is None:
                self._after_first = now, self.done
            if now >= self._due and _open and _open[-1] is self:
                self._due = now + (DRAW_EVERY if self._draws else LINE_EVERY)
                if self._draws:
                    self._draw()
                elif self.total is None or self.done < self.total:
                    line = self.line(now)
        if line:  # not under the lock, which the log's handler takes too
            logger.info("%s", line)

    def close(self) -> None:
        """Erase the bar. What was drawn leaves nothing on the screen."""
        with _screen:
            self._erase()
            if self in _open:
                _open.remove(self)

    def seconds_left(self, now: float) -> float | None:
        """Estimate the seconds left by the mean pace; None if that cannot be told.

        The first update is left out as soon as there are others: it may include a start.
        """
        start, before = self._after_first or (self.began, self._first)
        if self.done <= before:
            start, before = self.began, self._first
        if self.total is None or self.done <= before:
            return None
        return max(0.0, self.total - self.done) * (now - start) / (self.done - before)

    def line(self, now: float) -> str:
        """Return the line of a log."""
        text = f"{self.what}: {self._counted(' of ')}"
        if self.total:
            text += f" ({min(1.0, self.done / self.total):.0%})"
        left = self.seconds_left(now)
        behind = f"{duration(left)} left" if left is not None else duration(now - self.began)
        return f"{text}, {behind}"

    def bar(self, columns: int, now: float, ascii_only: bool = False) -> str:
        """Return the bar for a terminal of so many columns; what does not fit is left out."""
        from tqdm.std import Bar, tqdm

        left, width = self.seconds_left(now), max(1, columns - MARGIN)
        clock = tqdm.format_interval
        time_shown = clock(now - self.began) if left is None else f"{clock(left)} left"
        parts = [self._counted("/"), time_shown, *([self.note] if self.note else [])]
        share = min(1.0, self.done / self.total) if self.total else None
        head, tail = f"{self.what} {share or 0.0:4.0%}", ", ".join(parts)
        room = width - len(f"{head}|| {tail}")
        if share is not None and room >= NARROWEST:
            drawn = Bar(share, room, Bar.ASCII if ascii_only else Bar.UTF)
            return f"{head}|{drawn}| {tail}"
        full = f"{self.what} {tail}"
        return full if len(full) <= width else tail[:width]

    def _counted(self, of: str) -> str:
        from tqdm import tqdm

        shown = tqdm.format_sizeof if self.unit == "bytes" else "{:,.0f}".format
        unit = "B" if self.unit == "bytes" else f" {self.unit}"
        counts = [self.done, *([self.total] if self.total else [])]
        return of.join(map(shown, counts)) + unit

    def _draw(self) -> None:
        coded = "utf" in (getattr(sys.stderr, "encoding", None) or "").lower()
        self._drawn = True
        _put("\r" + self.bar(_columns(), time.monotonic(), not coded) + "\x1b[K")

    def _erase(self) -> None:
        if self._drawn:
            self._drawn = False
            _put(ERASE)


@contextlib.contextmanager
def progress(
    what: str, total: int | None = None, unit: str = "", **options: Any
) -> Iterator[Progress]:
    """Show an operation while the block runs; for the arguments see ``Progress``."""
    shown = Progress(what, total, unit, **options)
    try:
        yield shown
    finally:
        shown.close()


def tracked(items: Iterable[T], what: str, total: int | None = None, unit: str = "") -> Iterator[T]:
    """Yield the items, and count each when the next one is asked for."""
    with progress(what, total, unit) as shown:
        for item in items:
            yield item
            shown.update()


def beat(*_: object) -> None:
    """Draw the innermost bar again: no unit is done, but work goes on. A hook of a model's."""
    if _open:
        _open[-1].update(0)


def close_all() -> None:
    """Close the operations that an error has left open: of callbacks, and of iterators."""
    for shown in reversed(_open.copy()):
        shown.close()


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Erase the bar while something else is written to the terminal, and draw it again below."""
    with _screen:
        shown = _open[-1] if _open and _open[-1]._drawn else None
        if shown is not None:
            shown._erase()
        try:
            yield
        finally:
            if shown is not None:
                shown._draw()


class LogHandler(logging.StreamHandler[Any]):
    """Writes log lines above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        with hidden():
            super().emit(record)


def duration(seconds: float) -> str:
    """Format seconds: 42 s, 3 min 5 s, 2 h 4 min, 3 d 2 h."""
    whole = round(seconds)
    for size, unit, next_size, next_unit in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // next_size} {next_unit}"
    return f"{whole} s"


def _columns() -> int:
    with contextlib.suppress(OSError, ValueError):
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    return 80


def _put(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be closed
        sys.stderr.write(text)
        sys.stderr.flush()
