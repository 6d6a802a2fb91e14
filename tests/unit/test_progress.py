"""How far an operation is: the bar of a terminal, the lines of a log, and what stays on the screen.

The screen of a terminal is read from a real pseudo-terminal, by ``Screen``.
"""

import contextlib
import dataclasses
import io
import logging
import os
import pty
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import shown

from sft import library_bars, progress
from sft.cli.command import start_logging
from sft.data.__main__ import DataConfig
from sft.data.__main__ import main as data
from sft.progress import Progress


class Screen:
    """What a terminal shows of what was written to it: carriage returns and erased lines."""

    def __init__(self) -> None:
        self.master, slave = pty.openpty()
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self.written = b""

    def lines(self) -> list[str]:
        """Return the lines; the last is the one with the cursor."""
        self.stream.flush()
        self.read()
        return shown(self.written.decode())

    def read(self) -> None:
        """Take what was written, so that the terminal's buffer does not fill up."""
        os.set_blocking(self.master, False)
        with contextlib.suppress(BlockingIOError):
            while block := os.read(self.master, 1 << 16):
                self.written += block


@contextlib.contextmanager
def terminal() -> Iterator[Screen]:
    """Make stdout and stderr a terminal on which bars are drawn at each update."""
    with pytest.MonkeyPatch.context() as patch:
        screen = Screen()
        patch.setenv("TERM", "xterm")
        patch.setattr("sys.stderr", screen.stream)
        patch.setattr("sys.stdout", screen.stream)
        patch.setattr(progress, "DRAW_AFTER", 0.0)
        patch.setattr(progress, "DRAW_EVERY", 0.0)
        start_logging()
        try:
            yield screen
        finally:
            progress.close_all()
            logging.getLogger("sft").handlers.clear()


@pytest.fixture(autouse=True)
def no_handlers() -> Iterator[None]:
    yield
    logging.getLogger("sft").handlers.clear()


def test_a_log_line_is_written_above_the_bar() -> None:
    with terminal() as screen:
        with progress.progress("merging", 10, "rows") as bar:
            bar.update(3)
            assert re.fullmatch(r"merging  30%\|█+.* *\| 3/10 rows, 00:00 left", screen.lines()[-1])
            logging.getLogger("sft").info("a line")
            above, line = screen.lines()
            assert above == "a line" and line.startswith("merging  30%|")
            bar.update(4)
            assert len(screen.lines()) == 2 and "7/10 rows" in screen.lines()[-1]
        assert screen.lines() == ["a line", ""]


def test_only_the_innermost_operation_has_a_bar() -> None:
    with terminal() as screen:
        with progress.progress("training", 10, "steps") as training:
            training.update()
            with progress.progress("evaluating", 4, "samples") as evaluating:
                assert screen.lines() == [""]
                evaluating.update()
                training.update()
                progress.beat()
                assert screen.lines()[-1].startswith("evaluating  25%|")
            assert screen.lines() == [""]
            training.note = "loss 0.4994"
            training.update()
            [line] = screen.lines()
            assert "3/10 steps" in line and line.endswith(" left, loss 0.4994")
        assert screen.lines() == [""] and not progress._open


def test_an_operation_that_fails_leaves_an_empty_line() -> None:
    """Also if its bar belongs to a callback, or to an iterator that the error refers to."""
    with terminal() as screen:
        items = progress.tracked(range(3), "reading", 3, "rows")
        callback = Progress("training", 5, "steps", at_once=True)
        assert screen.lines()[-1].startswith("training   0%|")
        try:
            for number in items:
                callback.update()
                if number == 1:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert "1/3 rows" in screen.lines()[-1]
            progress.close_all()
        assert screen.lines() == [""] and not progress._open


def test_ctrl_c_in_a_command_leaves_its_message_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with terminal() as screen:
        monkeypatch.chdir(tmp_path)

        def interrupted(config: DataConfig) -> None:
            with progress.progress("tokenising", 10, "rows", at_once=True) as bar:
                bar.update()
                assert "1/10 rows" in screen.lines()[-1]
                os.write(screen.stream.fileno(), b"^C")  # as the terminal does
                raise KeyboardInterrupt

        with pytest.raises(SystemExit):
            dataclasses.replace(data, run=interrupted)([])
        assert screen.lines()[-2:] == ["error: interrupted", ""]
        assert "^C" not in "".join(screen.lines())


@pytest.mark.parametrize("columns", range(20, 201, 4))
@pytest.mark.parametrize("ascii_only", [False, True])
def test_a_bar_leaves_room_for_what_the_terminal_echoes(columns: int, ascii_only: bool) -> None:
    bar = Progress("training", 250, "steps")
    bar.began -= 17.0
    bar.done, bar.note = 17.0, "loss 0.4994, 12.3k tokens/s"
    text = bar.bar(columns, bar.began + 17.0, ascii_only)
    bar.close()
    assert len(text) <= columns - progress.MARGIN
    assert text.isascii() or not ascii_only
    if columns >= 60:
        assert "17/250 steps, 03:53 left, loss 0.4994, 12.3k tokens/s" in text
    if columns == 80:
        assert text.startswith("training   7%|")


def test_the_time_left_leaves_out_the_first_unit_which_may_include_a_start() -> None:
    operation = Progress("training", 110, "steps", done=10)
    began = operation.began
    assert operation.seconds_left(began + 50) is None
    operation.done, operation._after_first = 11, (began + 50, 11)
    assert operation.seconds_left(began + 50) == pytest.approx(99 * 50)
    operation.done = 21
    assert operation.seconds_left(began + 60) == pytest.approx(89.0)
    operation.done = 120  # more than was estimated
    assert operation.seconds_left(began + 60) == 0
    operation.close()


def test_a_log_has_a_line_every_30_seconds_and_none_of_a_quick_operation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert progress.LINE_EVERY == 30
    start_logging()

    def of(every: float) -> list[str]:
        monkeypatch.setattr(progress, "LINE_EVERY", every)
        with progress.progress("merging", 8_000_000_000, "bytes") as bar:
            bar.began -= 30
            bar.update(2_000_000_000)
            bar._after_first = bar.began, 0
            bar.update(2_000_000_000)
            bar.update(4_000_000_000)  # done: the operation's own line follows
        with progress.progress("reading", None, "rows") as bar:
            bar.update(1234)
        return capsys.readouterr().out.splitlines()

    assert of(30) == []
    assert of(0) == [
        "merging: 2.00G of 8.00GB (25%), 1 min 30 s left",
        "merging: 4.00G of 8.00GB (50%), 30 s left",
        "reading: 1,234 rows, 0 s",
    ]
    monkeypatch.setenv("TERM", "dumb")
    assert not progress.on_terminal()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert of(0) == []


def test_threads_that_log_and_count_at_once_do_not_wait_for_each_other_for_ever() -> None:
    with terminal() as screen:
        with progress.progress("merging", 4000, "rows") as bar:

            def work() -> None:
                for number in range(500):
                    bar.update()
                    if number % 10 == 0:
                        logging.getLogger("sft").info("a line")

            threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
            for thread in threads:
                thread.start()
            deadline = time.monotonic() + 60
            while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
                screen.read()
            assert not any(thread.is_alive() for thread in threads)
            assert bar.done == 2000
        lines = screen.lines()
        assert lines.count("a line") == 200 and lines[-1] == "" and len(lines) == 201


def test_a_terminal_that_is_gone_ends_no_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal():

        class Gone(io.StringIO):
            def isatty(self) -> bool:
                return True

            def write(self, text: str) -> int:
                raise OSError(5, "Input/output error")

        monkeypatch.setattr("sys.stderr", Gone())
        with progress.progress("merging", 2, "rows", at_once=True) as bar:
            bar.update()
        assert bar.done == 1


def test_bars_of_the_hubs_client_become_lines_of_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import enable_progress_bars
    from huggingface_hub.utils.tqdm import tqdm

    enable_progress_bars()  # a test of a notebook may have switched them off

    class Bar(tqdm):  # type: ignore[misc]
        pass

    library_bars._into_log(Bar)
    start_logging()
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with Bar(
        total=4_000_000, unit="B", unit_scale=True, desc="model.safetensors", mininterval=0
    ) as bar:
        bar.update(1_000_000)
    captured = capsys.readouterr()
    assert re.search(r"^model.safetensors: 1.00M of 4.00M B, \S+ left$", captured.out, re.MULTILINE)
    assert not captured.err
    monkeypatch.setattr(progress, "LINE_EVERY", 30.0)
    with Bar(total=4, desc="quick", mininterval=0) as bar:
        bar.update(4)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Bar(total=4).disable
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (7500, "2 h 5 min"), (1e5, "1 d 3 h")],
)
def test_a_duration_has_two_units(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text
