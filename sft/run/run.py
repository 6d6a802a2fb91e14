"""A run's folder: used by one process at a time, resumed or refused, with the status of the run."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sft import process
from sft.checkpoint import folder as checkpoint
from sft.config import compare, saved, zero
from sft.config.places import HOME_DIR
from sft.config.rules import Choice
from sft.config.settings import Config
from sft.errors import RunError
from sft.files import to_json, write_text
from sft.process import world_size
from sft.run import resume

if TYPE_CHECKING:
    from sft.data.prepared import Prepared
    from sft.plan.choices import Choices

LIBRARIES = (
    "sft",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "deepspeed",
    "datasets",
    "bitsandbytes",
)
LOCK = "lock"

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
        self.resumed: Path | None = None
        self._accepted: list[str] = []
        self._record: dict[str, Any] = {}
        self._found: str | None = None  # run.json as resume_point() read it
        self._lock: IO[str] | None = None  # held until release(); the kernel frees it if we die
        self._log: logging.Handler | None = None

    def resume_point(self) -> Path | None:
        """Decide whether to start, resume or refuse the run, without writing anything.

        Raises:
            RunError: The run is finished or has different settings, or the folder cannot be used.
            CheckpointError: The checkpoint that is named, or every checkpoint, cannot be used.
        """
        # resume.checkpoint applies to the first start only; after a restart, continue from the
        # newest checkpoint.
        named = None if resume.restarted() else self.config.resume.checkpoint
        self._found = self._read()
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
        config_file = self.dir / "config.yaml"
        if not config_file.is_file():
            raise RunError(
                f"{self.dir} holds files that are not a run's\n    fix: output_dir=NEW_FOLDER"
            )
        self._refuse_if_taken()
        if self.config.overwrite and not resume.restarted():
            return None
        self.config.overwrite = False
        before = saved.settings_of(config_file)
        allowed = set(self.config.resume.allow)
        differences = compare.differences(before, dataclasses.asdict(self.config))
        self._accept(f"{self.dir} holds a run with different settings", differences, allowed)
        if self.record().get("status") == "finished":
            raise RunError(
                f"the run in {self.dir} is finished\n"
                "    fix: run_name=NAME for a new run, or overwrite=true to replace this one"
            )
        found, passed_over = checkpoint.choose(self.dir, named)
        for path, why in passed_over:
            logger.info("%s is not used: %s", path, why)
        if found is None:
            logger.info("starting again from step 0, because %s has no checkpoint", self.dir)
        else:
            stage = zero.stage(zero.read(self.config.zero))
            logger.info("resuming from %s%s", found, resume.changed(found, world_size(), stage))
        self.resumed = found
        return found

    def begun_identity(self) -> dict[str, str]:
        """Return the identity of the run that is resumed; empty for a new run."""
        return {} if self.config.overwrite else self.record().get("identity", {})

    def identify(self, choices: Choices, prepared: Prepared) -> None:
        """Compare base model, data and precision with those of the run that is resumed.

        The choices and the identity will be written to ``run.json``. Only rank 0 does this.

        Raises:
            RunError: One of them has changed although the settings are the same.
        """
        if process.rank() != 0:
            return
        self.choices = choices.record()
        self.identity = resume.identity(self.config.model, prepared)
        self.identity |= choices.precision.identity()
        if self.config.overwrite or not (self.dir / "config.yaml").is_file():
            return
        before = self.record().get("identity", {})
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
            names = ",".join(key for key in differences if key not in allowed)
            raise RunError(
                f"{what}:\n"
                + "\n".join(f"    {line}" for line in refused)
                + "\n    fix: run_name=NAME for a new run, or overwrite=true to replace this one, "
                f"or 'resume.allow=[{names}]' to resume nevertheless"
            )
        for line in differences.values():
            logger.info("resuming with a difference that is allowed: %s", line)
        self._accepted += differences.values()

    def record(self) -> dict[str, Any]:
        """Read ``run.json``, the status of the run and its facts; empty if there is none."""
        content = json.loads(self._read() or "{}")
        assert isinstance(content, dict)
        return content

    def _read(self) -> str | None:
        file = self.dir / "run.json"
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def _refuse_if_taken(self) -> None:
        if process.rank() != 0 or not (self.dir / LOCK).is_file():
            return
        with (self.dir / LOCK).open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._taken() from None

    def _taken(self) -> RunError:
        return RunError(
            f"another process trains in {self.dir}\n"
            "    fix: run_name=NAME for a new run, or wait until that process ends"
        )

    def claim(self) -> None:
        """Lock the folder, and write the settings and the status; on rank 0, after all checks.

        Raises:
            RunError: Another process trains in the folder, or it cannot be written to.
        """
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock = (self.dir / LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._read() != self._found:
                raise RunError(
                    f"another process has trained in {self.dir} meanwhile\n"
                    "    fix: give the same command again, which reads the new state of the folder"
                )
            before = {} if self.config.overwrite else self.record()
            if self.config.overwrite:
                self._empty()
            checkpoint.tidy(self.dir, self.resumed)
            self._record = {
                "status": "running",
                "command": " ".join(sys.orig_argv),
                "ranks": world_size(),
                "identity": self.identity,
                "choices": self.choices,
                "versions": versions(),
                "git": git_commit(),
                "hardware": hardware(),
                "resumed": before.get("resumed", []),
            }
            if self.resumed is not None:
                self._record["resumed"].append(
                    {
                        "from": self.resumed.name,
                        "ranks": world_size(),
                        "zero": self.config.zero.config,
                        "allowed": self._accepted,
                    }
                )
            write_text(self.dir / "config.yaml", saved.to_yaml(self.config))
            self._write()
        except BlockingIOError:
            raise self._taken() from None
        except OSError as error:
            raise RunError(
                f"{self.dir} cannot be used: {error}\n    fix: correct that, or output_dir=FOLDER"
            ) from error

    def _empty(self) -> None:
        for path in self.dir.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def correct(self, choice: Choice) -> None:
        """Record a choice that a check before the first step has replaced; on rank 0."""
        if process.rank() == 0:
            self.choices |= choice.record()
            self._write()

    def keep_audit(self, prepared: Path) -> None:
        """Copy the audit of the data into the folder, because the cache may be deleted."""
        for source, name in (
            (prepared / "data.json", "data.json"),
            (prepared / "meta.json", "data.json"),  # its name in a folder of prepared data
            (prepared / "dropped.jsonl", "dropped.jsonl"),
        ):
            if source.is_file():
                write_text(self.dir / name, source.read_text(encoding="utf-8"))

    def finish(self, final: dict[str, Any], **facts: Any) -> None:
        """Write ``"status": "finished"``, which says that all files of the run are complete."""
        self._record |= {"status": "finished", "seconds": round(time.time() - self.began, 1)}
        self._record |= {"final": final, **facts}
        self._write()

    def end(self, status: str, reason: str) -> None:
        """Record that the run ``failed`` or was ``stopped``, and why; it can be resumed."""
        if self._record:
            self._record |= {"status": status, "reason": reason}
            with contextlib.suppress(OSError):  # a full disk; the error in progress says so
                self._write()

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
        if self._lock is not None:
            # Unlock before closing: forked workers share the open file, and would keep the lock.
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._lock.close()
            self._lock = None

    def _write(self) -> None:
        write_text(self.dir / "run.json", to_json(self._record, indent=2) + "\n")


def versions() -> dict[str, str]:
    """List the installed versions that decide what a run computes."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def git_commit() -> str | None:
    """Return sft's commit; None if sft does not run from a git clone."""
    if not (HOME_DIR / ".git").exists():
        return None
    result = subprocess.run(
        ["git", "-C", str(HOME_DIR), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or None


def hardware() -> dict[str, Any]:
    """List the machine's processors, memory (GiB) and GPUs."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpus": os.cpu_count(), "memory_gib": round(memory, 1), "gpus": gpus}
