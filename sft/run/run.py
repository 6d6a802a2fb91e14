"""A run's folder: used by one process at a time, resumed or refused, with the status of the run."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import process
from sft.checkpoint import folders
from sft.config import compare, saved, secrets, zero
from sft.config.rules import Choice
from sft.config.settings import Config
from sft.errors import RunError
from sft.files import empty, write_text
from sft.run import ends, record, resume
from sft.run.lock import LOCK, Lock
from sft.run.provenance import provenance

if TYPE_CHECKING:
    from sft.data.prepared import Prepared
    from sft.plan.choices import Choices

logger = logging.getLogger("sft")


class Run:
    """The folder of one run: rank 0 writes it, every rank reads it."""

    def __init__(self, config: Config) -> None:
        assert config.output_dir is not None
        self.config = config
        self.dir = Path(config.output_dir)
        self.began = time.time()
        self.identity: dict[str, str] = {}
        self.choices: dict[str, Any] = {}
        self.fingerprint = ""  # see record.fingerprint; claim() sets it, on rank 0
        self.resumed: Path | None = None
        self._accepted: list[str] = []
        self._record: dict[str, Any] = {}
        self._found: str | None = None  # run.json as resume_point() read it
        self._lock = Lock(self.dir)
        self._log: logging.Handler | None = None

    def resume_point(self) -> Path | None:
        """Decide whether to start, resume or refuse the run, without writing anything.

        Raises:
            RunError: The run is finished or has different settings, or the folder cannot be used.
            CheckpointError: The checkpoint that is named, or every checkpoint, cannot be used.
        """
        # resume.checkpoint applies to the first start only; after a restart, continue from the
        # newest checkpoint.
        named = None if process.restarted() else self.config.resume.checkpoint
        self._found = record.text(self.dir)
        there = next(path for path in (self.dir, *self.dir.absolute().parents) if path.exists())
        if not os.access(there, os.W_OK):
            raise RunError(
                f"{self.dir} cannot be written to\n    fix: output_dir=FOLDER that you may write to"
            )
        if self.dir.exists() and not self.dir.is_dir():
            raise RunError(f"{self.dir} is a file\n    fix: output_dir=FOLDER")
        if not self.dir.exists() or {path.name for path in self.dir.iterdir()} <= {LOCK}:
            if named is not None:
                raise RunError(
                    f"resume.checkpoint={named}: there is no run in {self.dir}\n"
                    "    fix: output_dir=FOLDER of the run"
                )
            return None
        if not (self.dir / record.SETTINGS).is_file():
            raise RunError(
                f"{self.dir} holds files that are not a run's\n    fix: output_dir=NEW_FOLDER"
            )
        if process.rank() == 0:
            self._lock.refuse_if_taken()
        if self.config.overwrite and not process.restarted():
            return None
        self.config.overwrite = False
        allowed = set(self.config.resume.allow)
        before = record.settings(self.dir)
        self.config.template.date = self.config.template.date or before["template"].get("date")
        now = dataclasses.asdict(self.config)
        differences = compare.differences(before, now)
        self._accept(f"{self.dir} holds a run with different settings", differences, allowed)
        resume.require_extended(self.dir, differences)
        own = record.read(self.dir).get("fingerprints", [])
        found, passed_over = folders.choose(self.dir, named, own)
        for path, why in passed_over:
            logger.info("%s is not used: %s", path, why)
        if found is None:
            logger.info("starting again from step 0, because %s has no checkpoint", self.dir)
        else:
            ranks, stage = process.world_size(), zero.stage(zero.read(self.config.zero))
            logger.info("resuming from %s%s", found, resume.changed(found, ranks, stage))
        self.resumed = found
        return found

    def begun_identity(self) -> dict[str, str]:
        """Return the identity of the run that is resumed; empty for a new run."""
        return {} if self.config.overwrite else record.read(self.dir).get("identity", {})

    def identify(self, choices: Choices, prepared: Prepared) -> None:
        """Compare base model, data and precision with those of the run that is resumed.

        The choices and the identity will be written to ``run.json``. Only rank 0 does this.

        Raises:
            RunError: One of them has changed although the settings are the same.
        """
        if process.rank() != 0:
            return
        self.choices = choices.record()
        self.identity = resume.identity(self.config, prepared)
        self.identity |= choices.precision.identity()
        if self.config.overwrite or not (self.dir / record.SETTINGS).is_file():
            return
        resume.require_steps_left(self.dir, self.config, prepared.train.counts.samples)
        before = record.read(self.dir).get("identity", {})
        self.identity = {**before, **self.identity}
        changed = {
            what: f"{what}: {before[what]} there, {now} here"
            for what, now in self.identity.items()
            if before.get(what, now) != now
        }
        self._accept(
            f"the base model, data or precision of {self.dir} has changed",
            changed,
            {*self.config.resume.allow, *resume.NOTED},
        )

    def _accept(self, what: str, differences: dict[str, str], allowed: set[str]) -> None:
        """Record the differences that are allowed, and refuse the others."""
        refused = [line for key, line in differences.items() if key not in allowed]
        if refused:
            new = [key for key in differences if key not in allowed]
            names = ",".join(dict.fromkeys([*self.config.resume.allow, *new]))
            raise RunError(
                f"{what}:\n"
                + "\n".join(f"    {line}" for line in refused)
                + "\n    fix: run_name=NAME for a new run, or overwrite=true to replace this one, "
                f"or 'resume.allow=[{names}]' to resume nevertheless"
            )
        for line in differences.values():
            logger.info("resuming with a difference that is allowed: %s", line)
        self._accepted += differences.values()

    def claim(self) -> None:
        """Lock the folder, and write the settings and the status; on rank 0, after all checks.

        Raises:
            RunError: Another process trains in the folder, or it cannot be written to.
        """
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock.take()
            if record.text(self.dir) != self._found:
                raise RunError(
                    f"another process has trained in {self.dir} meanwhile\n"
                    "    fix: give the same command again, which reads the new state of the folder"
                )
            before = {} if self.config.overwrite else record.read(self.dir)
            stops = ends.earlier(self.dir, before)
            if self.config.overwrite:
                empty(self.dir, keep=[LOCK])
            folders.tidy(self.dir, self.resumed)
            content = {k: v for k, v in self.identity.items() if k not in resume.NOTED}
            self.fingerprint = record.fingerprint(dataclasses.asdict(self.config), content)
            # A run has several where a start was allowed to change settings, data or base.
            fingerprints = [*before.get("fingerprints", []), self.fingerprint]
            self._record = {
                "status": "running",
                "command": process.command_line(secrets.shown),
                "ranks": process.world_size(),
                "identity": self.identity,
                "fingerprints": list(dict.fromkeys(fingerprints)),
                "choices": self.choices,
                **provenance(),
                "started": before.get("started", round(self.began, 1)),
                "stops": stops,
                "resumed": before.get("resumed", []),
                **{name: before[name] for name in record.KEPT if self.resumed and name in before},
            }
            if self.resumed is not None:
                self._record["resumed"].append(
                    {
                        "from": self.resumed.name,
                        "time": round(self.began, 1),
                        "ranks": process.world_size(),
                        "zero": self.config.zero.config,
                        "allowed": self._accepted,
                    }
                )
            # on_alert may hold a secret, and no file may set it.
            settings = dataclasses.replace(self.config, on_alert=None)
            write_text(self.dir / record.SETTINGS, saved.to_yaml(settings))
            self._write()
        except OSError as error:
            raise RunError(
                f"{self.dir} cannot be used: {error}\n    fix: correct that, or output_dir=FOLDER"
            ) from error

    def correct(self, choice: Choice) -> None:
        """Record a choice that a check before the first step has replaced; on rank 0."""
        self.choices |= choice.record()
        self.note(choices=self.choices)

    def note(self, **facts: Any) -> None:
        """Add facts to ``run.json``, on rank 0."""
        self._record |= facts
        if process.rank() == 0:
            self._write()

    def keep_audit(self, prepared: Path) -> None:
        """Copy the audit of the data into the folder, because the cache may be deleted."""
        for source, name in (
            ("data.json", record.AUDIT),
            ("meta.json", record.AUDIT),  # its name in a folder of prepared data
            ("dropped.jsonl", record.DROPPED),
        ):
            if (prepared / source).is_file():
                write_text(self.dir / name, (prepared / source).read_text(encoding="utf-8"))

    def finish(self, **facts: Any) -> None:
        """Write ``"status": "finished"``, which says that all files of the run are complete."""
        now = time.time()
        seconds = round(now - self.began, 1)
        self.note(status="finished", seconds=seconds, ended=round(now, 1), **facts)

    def end(self, status: str, reason: str) -> None:
        """Record that the run ``failed`` or was ``stopped``, and why; it can be resumed."""
        if self._record:
            self._record |= {"status": status, "reason": reason, "ended": round(time.time(), 1)}
            # A full disk or a removed folder; the error in progress says so.
            with contextlib.suppress(OSError, RunError):
                self._write()

    @property
    def claimed(self) -> bool:
        """Whether this process has begun to write the folder; on rank 0."""
        return bool(self._record)

    def log_to_file(self, rank: int) -> None:
        """Write this rank's log lines to a file in the folder too, until release()."""
        self._log = logging.FileHandler(self.dir / f"rank{rank}.log", encoding="utf-8")
        self._log.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(self._log)
        if logger.level == logging.NOTSET:  # in a notebook, where no command has set the level
            logger.setLevel(logging.INFO)

    def release(self) -> None:
        """Unlock the folder and close the log file, so that the process may train another run."""
        if self._log is not None:
            logger.removeHandler(self._log)
            self._log.close()
            self._log = None
        self._lock.release()

    def _write(self) -> None:
        folders.require_run(self.dir)
        record.write(self.dir, self._record)
