"""Alerts: what goes wrong while a run trains, in its log, in alerts.jsonl, and given to a command.

Nothing here may end a run that trains well: a file that cannot be written and a command that fails
are logged once.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sft.config.watch_settings import AlertConfig
from sft.files import read_records, to_json, write_text
from sft.watch import bounded

logger = logging.getLogger("sft")

LIMIT = 60.0  # seconds that the command on_alert may take
MOST_ROWS = 1000  # row numbers in one alert
# Kinds that follow from what is trained: a resumed run has them again after its checkpoint.
REPEATED = ("nan", "loss_jump")


class Alerts(TrainerCallback):  # type: ignore[misc]
    """Takes alerts. Of each kind there is one, until its cause has gone.

    Every rank has one, so that all ranks know what was alerted already: naming the rows of a step
    is a collective operation. Only the one with a file writes, logs and runs the command.
    """

    def __init__(
        self, settings: AlertConfig, file: Path | None = None, command: str | None = None
    ) -> None:
        """Set up the alerts.

        Args:
            settings: The section alert.
            file: The run's alerts.jsonl on rank 0; None on other ranks.
            command: ``on_alert``.
        """
        self.settings, self.file, self.command = settings, file, command
        self.active: set[str] = set()
        self.alive_at = time.monotonic()
        self.patient = 0  # how many parts of the run are at work that may take long
        self._failed: set[str] = set()
        self._lock = threading.Lock()  # the watchdog is a thread

    def is_new(self, kind: str) -> bool:
        """Return whether there is no alert of this kind whose cause is still there."""
        return kind not in self.active

    def add(self, kind: str, step: int, message: str, rows: Sequence[int] = ()) -> None:
        """Log an alert, write it, and start the command; do nothing unless the kind is new."""
        with self._lock:
            if not self.is_new(kind):
                return
            self.active.add(kind)
            if self.file is None:
                return
            logger.info("alert (%s): %s", kind, message)
            record = {"step": step, "time": round(time.time(), 3), "kind": kind}
            record |= {"message": message, "rows": list(rows[:MOST_ROWS])}
            try:
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(to_json(record) + "\n")
            except OSError as error:
                self._say_once("file", f"{self.file} cannot be written: {error}")
            if self.command is not None:
                self._start(self.command, {**record, "run": str(self.file.parent)})

    def recovered(self, kind: str) -> None:
        """Note that the cause of an alert has gone, so that the next one is new."""
        self.active.discard(kind)

    def alive(self) -> None:
        """Note that the run goes on."""
        self.alive_at = time.monotonic()

    @contextlib.contextmanager
    def patiently(self) -> Iterator[None]:
        """Expect no step to end soon: for work such as saving, which may take long."""
        self.patient += 1
        try:
            yield
        finally:
            self.patient -= 1
            self.alive()

    def state(self) -> list[str]:
        """Return what a checkpoint stores: the alerts that a resumed run must not repeat."""
        return sorted(self.active.intersection(REPEATED))

    def restore(self, saved: list[str]) -> None:
        """Continue from what ``state`` returned."""
        self.active.update(saved)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remove the alerts that a resumed run will have again: those after its checkpoint."""
        if self.file is not None and self.file.is_file():
            kept = [
                record
                for record in read_records(self.file)
                if record["step"] <= state.global_step or record["kind"] not in REPEATED
            ]
            try:
                write_text(self.file, "".join(f"{to_json(record)}\n" for record in kept))
            except OSError as error:
                self._say_once("file", f"{self.file} cannot be written: {error}")

    def _start(self, command: str, record: dict[str, Any]) -> None:
        """Start the command with the alert as JSON on its standard input, and do not wait."""
        try:
            with tempfile.TemporaryFile() as given:
                given.write(to_json(record).encode() + b"\n")
                given.seek(0)
                said = tempfile.TemporaryFile()
                child = subprocess.Popen(
                    [sys.executable, "-I", bounded.__file__, f"{LIMIT}", command],
                    stdin=given,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    start_new_session=True,
                )
        except OSError as error:
            self._say_once("command", f"on_alert: the command cannot be started: {error}")
            return
        threading.Thread(target=self._wait, args=(child, said), daemon=True).start()

    def _wait(self, child: subprocess.Popen[bytes], said: Any) -> None:
        with said:
            if code := child.wait():
                said.seek(0)
                lines = said.read().decode(errors="replace").strip().splitlines()[-1:]
                why = "".join(f": {line}" for line in lines)
                self._say_once("command", f"on_alert: the command ended with code {code}{why}")

    def _say_once(self, what: str, line: str) -> None:
        if what not in self._failed:
            self._failed.add(what)
            logger.info("warning: %s; the run goes on", line)
