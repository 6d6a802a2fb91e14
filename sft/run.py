"""A run's folder: claimed once, never trained over, and honest about how far the run came."""

from __future__ import annotations

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
from typing import IO, Any

from omegaconf import OmegaConf

from sft import checkpoint, zero
from sft.checks import world_size
from sft.config import HOME_DIR, Config
from sft.errors import RunError
from sft.files import to_json, write_text

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
# Settings that may differ between the runs of one folder: they change no trained weight.
LOCK = "lock"
HARMLESS = {"overwrite", "output_dir", "run_name", "train.logging_steps", "train.save_total_limit"}

logger = logging.getLogger("sft")


class Run:
    """The folder of one run, as rank 0 writes it and every rank reads it."""

    def __init__(self, config: Config) -> None:
        assert config.output_dir is not None
        self.config = config
        self.dir = Path(config.output_dir)
        self.began = time.time()
        self._record: dict[str, Any] = {}
        self._lock: IO[str] | None = None  # held for life: the kernel frees it when we die

    def resume_point(self) -> Path | None:
        """Decide, reading only, whether to start, to go on, or to refuse.

        Raises:
            RunError: The run is finished, was made with other settings, or the folder is taken.
            CheckpointError: The newest checkpoint is of other ranks or another ZeRO stage.
        """
        if self.dir.exists() and not self.dir.is_dir():
            raise RunError(f"{self.dir} is a file\n    fix: output_dir=FOLDER")
        if not self.dir.exists() or {path.name for path in self.dir.iterdir()} <= {LOCK}:
            return None
        config_file = self.dir / "config.yaml"
        if not config_file.is_file():
            raise RunError(
                f"{self.dir} holds files that are not a run's\n    fix: output_dir=ANOTHER_FOLDER"
            )
        if self.config.overwrite:
            return None
        differences = self._differences(config_file)
        if differences:
            raise RunError(
                f"{self.dir} holds a run with other settings:\n"
                + "\n".join(f"    {line}" for line in differences)
                + "\n    fix: run_name=NAME for a run beside it, or overwrite=true to replace it"
            )
        if self.status() == "finished":
            raise RunError(
                f"{self.dir} is finished\n"
                "    fix: run_name=NAME for another run, or overwrite=true to replace it"
            )
        stage = zero.stage(zero.read(self.config.zero))
        found, passed_over = checkpoint.newest(str(self.dir), world_size(), stage)
        for path in passed_over:
            logger.info("passed over %s: a save that was cut off", path)
        if found is None:
            logger.info("starting again from step 0: %s has no complete checkpoint", self.dir)
        else:
            logger.info("resuming from %s", found)
        return found

    def status(self) -> str:
        """Read how far the run came: ``running``, ``finished``, ``failed`` or ``unknown``."""
        record = self.dir / "run.json"
        if not record.is_file():
            return "unknown"
        return str(json.loads(record.read_text(encoding="utf-8")).get("status", "unknown"))

    def _differences(self, config_file: Path) -> list[str]:
        before = flatten(OmegaConf.to_container(OmegaConf.load(config_file)))
        now = flatten(dataclasses.asdict(self.config))
        return [
            f"{key}: {before.get(key, 'unset')} there, {now.get(key, 'unset')} here"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and key not in HARMLESS
        ]

    def claim(self) -> None:
        """Make the folder this run's; on rank 0, once everything that can refuse has passed.

        Raises:
            RunError: Another process trains in it, or it cannot be written to.
        """
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock = (self.dir / LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another process trains in {self.dir}\n    fix: run_name=NAME, or wait"
            raise RunError(message) from None
        except OSError as error:
            raise RunError(
                f"{self.dir} cannot be used: {error}\n    fix: output_dir=DIR"
            ) from error
        if self.config.overwrite:
            for path in self.dir.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()
        write_text(self.dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(self.config)))
        self._record = {
            "status": "running",
            "command": " ".join(sys.orig_argv),
            "ranks": world_size(),
            "versions": versions(),
            "git": git_commit(),
            "hardware": hardware(),
        }
        self._write()

    def keep_audit(self, prepared: Path) -> None:
        """Keep what was said of the data beside the run, which outlives the cache."""
        for source, name in (
            (prepared / "data.json", "data.json"),
            (prepared / "meta.json", "data.json"),  # of an artefact
            (prepared / "dropped.jsonl", "dropped.jsonl"),
        ):
            if source.is_file():
                write_text(self.dir / name, source.read_text(encoding="utf-8"))

    def finish(self, final: dict[str, Any], **facts: Any) -> None:
        """Write ``"status": "finished"``, the flag that everything is in place."""
        self._record |= {"status": "finished", "seconds": round(time.time() - self.began, 1)}
        self._record |= {"final": final, **facts}
        self._write()

    def fail(self, reason: str) -> None:
        """Keep why the run ended early; it can be resumed."""
        if self._record:
            self._record |= {"status": "failed", "reason": reason}
            self._write()

    def _write(self) -> None:
        write_text(self.dir / "run.json", to_json(self._record, indent=2) + "\n")


def log_to_file(path: Path) -> None:
    """Keep this rank's log in a file of its own."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Give a nested mapping's leaves by dotted key."""
    if not isinstance(node, dict) or not node:
        return {prefix.rstrip("."): node}
    leaves: dict[str, Any] = {}
    for key, value in node.items():
        leaves |= flatten(value, f"{prefix}{key}.")
    return leaves


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
    """Name the toolkit's commit, where it is a clone."""
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
    """Say what the run had: processors, memory (GiB) and GPUs."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpus": os.cpu_count(), "memory_gib": round(memory, 1), "gpus": gpus}
