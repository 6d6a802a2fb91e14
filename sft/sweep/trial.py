"""One trial of a sweep: a new torchrun, and the result that it left.

Trials do not share a process: DeepSpeed's global state would leak from one trial into the next, and
when a rank fails, the other ranks wait in a collective that the next trial's would match.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sft import child
from sft.config import saved
from sft.config.compare import training_settings
from sft.config.settings import Config, fill_names
from sft.errors import RunError
from sft.run import record
from sft.run.lock import Lock

logger = logging.getLogger("sft")

POLL = 0.5  # seconds between two looks at a lock


@dataclass
class Trial:
    """One run of a sweep. All fields but ``command`` and ``config`` are written to sweep.json.

    Attributes:
        command: Starts the trial.
        config: The composed settings, not yet checked.
        overrides: The settings that differ between the trials, such as ``lora.r=4``.
        output_dir: The run's folder.
        log: The file that its output is appended to.
        status: ``not started``, ``finished`` or ``failed``.
        message: Why it failed, or that it was finished before this sweep.
        final: The final results in its run.json.
        seconds: Wall-clock time it took; None if it did not run.
    """

    command: list[str]
    config: dict[str, Any]
    overrides: list[str]
    output_dir: str
    log: str
    status: str = "not started"
    message: str = ""
    final: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None

    def __str__(self) -> str:
        return " ".join(self.overrides) or "(no setting is swept)"

    def wait(self, title: str) -> None:
        """Wait until no other process trains in the trial's folder.

        Linux ends the trial of a sweep that was killed: see ``child.run``. It saves first, which
        takes some time, and the same sweep may have been started again meanwhile.
        """
        lock = Lock(Path(self.output_dir))
        if lock.is_taken():
            logger.info("%s  waits: another process trains in %s", title, self.output_dir)
        while lock.is_taken():
            time.sleep(POLL)

    def train(self) -> None:
        """Train in a new process and read the result from its files.

        Raises:
            KeyboardInterrupt: The user interrupted; the trial's processes have ended.
        """
        log = Path(self.log)
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        try:
            ended = child.run(self.command, log)
        except KeyboardInterrupt:
            self.status, self.message = "failed", "interrupted"
            raise
        finally:
            self.seconds = round(time.monotonic() - start, 1)
        run = self._record()
        if ended.exit_code == 0 and run.get("status") == "finished":
            self.status, self.final = "finished", run["final"]
            return
        self.status, self.message = "failed", ended.message
        if ended.exit_code == 0:
            self.message = f"exit code 0, but {self.output_dir}/run.json has no status finished"

    def take_over(self) -> bool:
        """Use the results of an earlier finished run with the same settings.

        Returns:
            Whether there is such a run.
        """
        run = self._record()
        if run.get("status") != "finished" or self.config.get("overwrite"):
            return False
        if _settings(record.settings(self.output_dir)) != _settings(self.config):
            return False  # the trial itself is refused, with the list of differences
        self.status, self.message, self.final = "finished", "finished before", run["final"]
        self.seconds = run.get("seconds")
        return True

    def _record(self) -> dict[str, Any]:
        try:
            return record.read(self.output_dir)
        except RunError:  # a damaged file: the trial itself is refused, and says so
            return {}


def _settings(values: Any) -> dict[str, Any] | None:
    """Return the settings that affect training, converted as a run does; None if invalid."""
    try:
        typed = OmegaConf.merge(OmegaConf.structured(Config), saved.escaped(values))
    except OmegaConfBaseException:
        return None
    config: Any = OmegaConf.to_object(typed)
    fill_names(config)
    return training_settings(dataclasses.asdict(config))
