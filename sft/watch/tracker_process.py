"""The process that sends a run to one tracker: python -m sft.watch.tracker_process.

It reads the run's files and never talks to the trainer, so that neither waits for the other: a
tracker that hangs, fails or imports slowly costs a run nothing. The files also say what a killed
process did not send.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from sft.run import record
from sft.watch.tracker_files import TensorBoard, Trackio
from sft.watch.tracker_run import Row, Samples, TrackedRun
from sft.watch.tracker_servers import MLflow, Wandb

POLL = 1.0  # seconds between two looks at the run's files
RETRY = 60.0  # seconds after an error


class Service(Protocol):
    """The run at a tracker, open: made if the tracker does not know its id, else continued.

    What a killed process has sent is not read from notes of ours, which may be older. The tracker
    is asked, or ignores what it has, or its files are replaced.
    """

    where: str  # an address, or the command that shows the run

    def __init__(self, run: TrackedRun) -> None: ...

    def send(self, rows: Sequence[Row]) -> None:
        """Send records; those that the tracker has are left out."""

    def send_samples(self, samples: Samples) -> None:
        """Send all samples."""

    def finish(self, results: dict[str, Any]) -> None:
        """Send how the run ended, and wait until everything is sent."""


SERVICES: dict[str, type[Service]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
    "trackio": Trackio,
}


class Sender:
    """Sends what the run's files have and the tracker does not."""

    def __init__(self, folder: Path, name: str) -> None:
        self.run = TrackedRun(folder)
        self.service = SERVICES[name](self.run)
        self.sent = 0  # records

    def catch_up(self) -> None:
        """Send what the files have got since the last call."""
        if rows := self.run.new_rows():
            self.service.send(rows)
            self.sent += len(rows)
        if samples := self.run.new_samples():
            self.service.send_samples(samples)

    def finish(self) -> None:
        """Send the rest, and how the run ended."""
        self.catch_up()
        self.service.finish(self.run.results())


class Trainer:
    """The process that started this one: told what goes on, and asked whether it has ended."""

    def __init__(self, output: IO[str]) -> None:
        self.output = output
        self.parent = os.getppid()

    def tell(self, **what: Any) -> None:
        """Write a line of JSON; a trainer that was killed does not read it."""
        try:
            self.output.write(json.dumps(what) + "\n")
            self.output.flush()
        except OSError:
            pass

    def has_ended(self, seconds: float) -> bool:
        """Wait until standard input says that the trainer has ended, or for this time.

        A worker of the trainer's data loader may hold the other end of the pipe when the trainer is
        dead, so the parent is looked at, too.
        """
        readable, _, _ = select.select([sys.stdin], [], [], seconds)
        return bool(readable) or os.getppid() != self.parent


def follow(folder: Path, name: str, trainer: Trainer, limit: float) -> int:
    """Send a run to a tracker until the trainer has ended.

    Args:
        folder: The run's folder.
        name: The tracker.
        trainer: The process that started this one.
        limit: Seconds that this process may go on after the trainer; 0: any time.

    Returns:
        The exit code: 1 if something was not sent.
    """
    sender, ended, failed = None, False, 0.0
    while not ended:
        ended = trainer.has_ended(0 if sender is None and not failed else POLL)
        if ended and limit:
            after = threading.Timer(limit, os._exit, (1,))
            after.daemon = True
            after.start()
        if failed and not ended and time.monotonic() < failed + RETRY:
            continue
        try:
            if sender is None:
                sender = Sender(folder, name)
                trainer.tell(where=sender.service.where)
            sender.catch_up()
            if ended:
                sender.finish()
                trainer.tell(sent=sender.sent)
        except Exception as error:
            traceback.print_exc()
            first = str(error).strip().partition("\n")[0]
            trainer.tell(error=f"{type(error).__name__}: {first}" if first else repr(error))
            sender, failed = None, time.monotonic()
            if ended:
                return 1
    return 0


def main() -> int:
    """Follow the run that the command line names: FOLDER TRACKER LIMIT."""
    folder, name, limit = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    os.nice(10)  # where there are few processors, training goes first
    # What the tracker's library prints goes to the log; standard output is for the trainer.
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with (folder / record.TRACKERS_LOG).open("ab") as log:
        # A process of an earlier start may still be sending: one byte of the file for each tracker.
        fcntl.lockf(log, fcntl.LOCK_EX, 1, list(SERVICES).index(name))
        return follow(folder, name, Trainer(output), limit)


if __name__ == "__main__":
    sys.exit(main())
