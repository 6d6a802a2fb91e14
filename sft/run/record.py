"""The files of a run's folder: their names, and what they say of the run."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from sft.config.compare import training_settings
from sft.config.plain import read_json
from sft.errors import RunError
from sft.files import to_json, write_text

RECORD = "run.json"  # the status of the run and its facts
SETTINGS = "config.yaml"  # the composed settings
METRICS = "metrics.jsonl"  # what was logged, one JSON object a line
AUDIT = "data.json"  # how rows became samples
DROPPED = "dropped.jsonl"  # the rows that were left out
SAMPLES = "samples.jsonl"  # answers generated while training, one JSON object each
ALERTS = "alerts.jsonl"  # what was wrong while training, one JSON object each
SYSTEM = "system.jsonl"  # the use of the machine: profile=system
PROFILE = "profile"  # the folder of what profile=torch recorded
TRACKED = "trackers.json"  # the id under which trackers know this run, and where each shows it
TRACKERS_LOG = "trackers.log"  # what the trackers' libraries have printed
REPORT = "report.html"  # the page
ADAPTER, MODEL = "adapter", "model"  # the folders of the trained weights; a run has one of them
MERGED = "merged"  # the folder of the merged model
MERGE_REPORT = "merge_report.json"  # in that folder: what the merge was and how it was verified
SWEEP = "sweep.json"  # in the folder of a sweep, whose trials are runs: their results
KEPT = ("forgetting",)  # entries of run.json that a resumed run takes over
# What records of metrics.jsonl say of the machine, and not of what is trained.
MEASURED = frozenset(
    (
        *("time", "tokens_per_second", "seconds_per_step", "seconds_left", "mfu"),
        *("operations_per_second", "memory_resident", "memory_allocated", "memory_reserved"),
        *("memory_device", "seconds_data", "seconds_compute", "seconds_optimizer"),
        *("seconds_evaluation", "seconds_saving", "seconds_other", "eval_seconds"),
        *("exact_match_seconds", "train_runtime", "train_samples_per_second"),
        "train_steps_per_second",
    )
)


def trained(logged: dict[str, Any]) -> dict[str, Any]:
    """Return what a record of metrics.jsonl says of what is trained: equal in two equal runs."""
    return {
        key: value
        for key, value in logged.items()
        # Each set in dataset.eval has its own eval_NAME_seconds.
        if key not in MEASURED and not re.fullmatch(r"eval_.+_seconds", key)
    }


def text(folder: str | Path) -> str | None:
    """Read ``run.json`` as text; None if there is none."""
    file = Path(folder) / RECORD
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None


def read(folder: str | Path) -> dict[str, Any]:
    """Read ``run.json``; empty if there is none.

    Raises:
        RunError: The file is damaged.
    """
    file = Path(folder) / RECORD
    try:
        content = read_json(file, finite=False) if file.is_file() else {}
    except ValueError:
        content = None
    kinds = {
        **{"status": str, "identity": dict, "choices": dict, "resumed": list, "final": dict},
        "fingerprints": list,
    }
    if not isinstance(content, dict) or not all(
        isinstance(content[name], kind) for name, kind in kinds.items() if name in content
    ):
        raise _damaged(file)
    return content


def require_sound(folder: str | Path, fix: str) -> None:
    """Check that ``run.json`` of a run whose weights are to be used is absent or sound.

    Raises:
        RunError: It is damaged, so other files of the run may be too.
    """
    try:
        read(folder)
    except RunError as error:
        raise RunError(f"{error}".partition("\n")[0] + f"\n    fix: {fix}") from error


def _damaged(file: Path) -> RunError:
    return RunError(
        f"{file} is damaged\n    fix: restore the file, or overwrite=true to replace the run"
    )


def write(folder: Path, content: dict[str, Any]) -> None:
    """Write ``run.json``."""
    write_text(folder / RECORD, to_json(content, indent=2) + "\n")


def fingerprint(settings: dict[str, Any], identity: dict[str, str]) -> str:
    """Hash what the trained weights depend on; the manifests of a run's checkpoints name it.

    Args:
        settings: All settings, nested as in config.yaml.
        identity: The base model, the data and the precision.
    """
    what = json.dumps([training_settings(settings), identity], sort_keys=True, default=str)
    return hashlib.sha256(what.encode()).hexdigest()[:32]


def settings(folder: str | Path) -> Any:
    """Read the settings with which the run was started last.

    Raises:
        RunError: The file is damaged.
    """
    import yaml

    from sft.config import saved

    file = Path(folder) / SETTINGS
    try:
        found = saved.settings_of(file)
    except (OSError, ValueError, yaml.YAMLError):
        found = None
    if not found or not isinstance(found, dict):
        raise _damaged(file)
    return found


def weights(folder: str | Path) -> Path | None:
    """Return the folder of the trained adapter or model; None if the run has written neither."""
    paths = (Path(folder) / name for name in (ADAPTER, MODEL))
    return next((path for path in paths if path.is_dir()), None)
