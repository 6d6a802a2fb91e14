"""Send a run to trackers: while it trains, and afterwards by ``replay``.

A tracker is a view of the run's files. For each tracker, rank 0 starts a process that reads them
(``tracker_process``), and at the end waits for it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sft import child, process
from sft.config.packages import TRACKERS
from sft.errors import RunError
from sft.run import record
from sft.run.lock import Lock
from sft.watch.tracker_run import note, tracked

logger = logging.getLogger("sft")

LIMIT = 30.0  # seconds that a tracker may take after the end of a run
GRACE = 5.0  # further seconds, after which its process is killed
# The libraries' own reports on their use are off, and a server that does not answer is given up,
# unless the environment says otherwise.
ENVIRONMENT = {
    **{"DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "MLFLOW_DISABLE_TELEMETRY": "true"},
    **{"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true", "GIT_PYTHON_REFRESH": "quiet"},
    **{"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"},
}

_started: list[Follower] = []  # by this process, and not yet waited for
_noting = threading.Lock()


class Follower:
    """A process that sends a run to one tracker."""

    def __init__(self, folder: Path, name: str, limit: float) -> None:
        self.folder, self.name, self.limit = folder, name, limit
        self.where = self.error = ""
        self.sent = 0
        words = [*child.command("sft.watch.tracker_process"), str(folder), name, str(limit)]
        with (folder / record.TRACKERS_LOG).open("ab") as log:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**ENVIRONMENT, **child.environment()},
                # The terminal's Ctrl-C and a launcher's signals end the run, which the tracker is
                # to be told.
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        """Log where the tracker shows the run, and its first error."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told: dict[str, Any] = json.loads(line)
            self.sent = told.get("sent", self.sent)
            if where := told.get("where"):
                self.where = where
                logger.info("tracker %s: %s", self.name, where)
                with _noting, contextlib.suppress(OSError):
                    note(self.folder, self.name, where)
            if error := told.get("error"):
                if self.limit and not self.error:
                    logger.warning("tracker %s: %s; the run goes on", self.name, error)
                self.error = error

    def end(self) -> None:
        """Tell the process that the run has ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended
            self._process.stdin.write(b"\n")
            self._process.stdin.close()

    def wait(self) -> bool:
        """Wait until everything is sent; return whether it is."""
        try:
            code = self._process.wait(self.limit + GRACE if self.limit else None)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            code = self._process.wait()
        if code and not self.error:
            self.error = "it did not end in time" if self.limit else "its process has died"
        self._reader.join(1)
        return code == 0


def start(folder: Path, tracker: Any) -> None:
    """Start to send a run to the trackers of its settings, on rank 0.

    A failure is logged, and does not end the run.
    """
    names = chosen(tracker) if process.rank() == 0 else []
    try:
        if names:
            tracked(folder)
        _started.extend(Follower(folder, name, LIMIT) for name in names)
    except OSError as error:
        logger.warning("nothing is sent to %s: %s", ", ".join(names), error)


@contextlib.contextmanager
def delivered() -> Iterator[None]:
    """Wait at the end of a run, however it ended, until its trackers have everything."""
    try:
        yield
    finally:
        for follower in _started:
            follower.end()
        while _started:
            follower = _started.pop()
            if not follower.wait():
                logger.warning(
                    "tracker %s does not have all of the run%s\n"
                    "    fix: sft report %s tracker=%s sends the rest; %s has the details",
                    follower.name,
                    f": {follower.error}" if follower.error else "",
                    follower.folder,
                    follower.name,
                    follower.folder / record.TRACKERS_LOG,
                )


def replay(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Send a run, finished or not, to trackers; what a tracker has is not sent again.

    Args:
        folder: The run's folder.
        names: The trackers.

    Returns:
        Where each tracker shows the run.

    Raises:
        RunError: The folder holds no run, the run is sending to the tracker itself, or a tracker
            did not get everything.
    """
    if not (folder / record.SETTINGS).is_file():
        raise RunError(f"{folder} holds no run\n    fix: give the folder of a run")
    own = chosen(record.settings(folder).get("tracker") or {})
    if Lock(folder).is_taken() and (both := [name for name in names if name in own]):
        raise RunError(
            f"the run in {folder} goes on, and sends to {', '.join(both)} itself\n"
            "    fix: wait until it ends"
        )
    tracked(folder)
    followers = [Follower(folder, name, 0) for name in names]
    for follower in followers:
        follower.end()
    failed = [follower for follower in followers if not follower.wait()]
    if failed:
        lines = (
            f"tracker {item.name} does not have all of {folder}: {item.error}" for item in failed
        )
        log = folder / record.TRACKERS_LOG
        fix = f"    fix: correct that, and give the command again; {log} has the details"
        raise RunError("\n".join((*lines, fix)))
    return {follower.name: follower.where for follower in followers}


def chosen(tracker: Any) -> list[str]:
    """Return the trackers of a section ``tracker``: an object or a mapping."""
    values = tracker if isinstance(tracker, dict) else vars(tracker)
    return [name for name in TRACKERS if values.get(name)]
