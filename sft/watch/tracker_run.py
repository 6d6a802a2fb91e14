"""What a tracker is sent of a run: the figures, samples and facts in the run's folder."""

from __future__ import annotations

import json
import math
import uuid
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sft.config.secrets import without_secrets
from sft.files import read_records, to_json, write_text
from sft.run import record

COLUMNS = ("step", "prompt", "answer", "reference")  # of the table of samples
# What run.json says from the beginning, and what it says once the run has ended.
FACTS = ("identity", "versions", "git", "hardware", "ranks", "choices")
RESULTS = ("status", "reason", "seconds", "final", "best", "forgetting", "operations", "resumed")

Samples = dict[int, list[dict[str, Any]]]  # answers by step


@dataclass(frozen=True)
class Row:
    """One record of metrics.jsonl.

    Attributes:
        step: Optimizer steps at which it was logged.
        place: Its number among the records of that step, from 0.
        time: When it was logged, in seconds since 1970.
        figures: Its finite numbers, by a name such as ``train/loss`` or ``eval/loss``.
    """

    step: int
    place: int
    time: float
    figures: dict[str, float]


@dataclass
class TrackedRun:
    """A run's folder as a tracker sees it.

    Attributes:
        folder: The run's folder.
    """

    folder: Path
    _offset: int = field(default=0, init=False)  # bytes of metrics.jsonl that have been read
    _last: tuple[int, int] = field(default=(-1, 0), init=False)  # step and place of the last row
    _sent: set[str] = field(default_factory=set, init=False)  # the figures of that step
    _samples: tuple[int, int] | None = field(default=None, init=False)  # as they were last read

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings of the run, nested, without secrets."""
        found: dict[str, Any] = without_secrets(record.settings(self.folder))
        return found

    @cached_property
    def tracker(self) -> dict[str, Any]:
        """The section ``tracker`` of the settings, with their secrets."""
        defaults = {"project": "sft", "group": None, "uri": None}
        return defaults | (record.settings(self.folder).get("tracker") or {})

    @cached_property
    def id(self) -> str:
        """The id under which every tracker knows this run."""
        return str(tracked(self.folder)["id"])

    @property
    def name(self) -> str:
        """The name that trackers show."""
        return self.folder.absolute().name

    @property
    def group(self) -> str | None:
        """The name that joins several runs: the setting, or the sweep of a trial."""
        sweep = self.folder.absolute().parent
        return self.tracker["group"] or (sweep.name if (sweep / record.SWEEP).is_file() else None)

    def facts(self) -> dict[str, Any]:
        """Return the settings, the versions and choices, and the audit, without secrets."""
        found = record.read(self.folder)
        audit = _read(self.folder / record.AUDIT)
        facts = {
            "run": {name: found[name] for name in FACTS if name in found},
            "data": {name: audit[name] for name in audit if name not in ("settings", "template")},
        }
        return {"settings": self.settings, **without_secrets(facts)}

    def results(self) -> dict[str, Any]:
        """Return how the run ended, and the report of the merge, without secrets."""
        found = record.read(self.folder)
        results = {name: found[name] for name in RESULTS if name in found}
        if merged := _read(self.folder / record.MERGED / record.MERGE_REPORT):
            results["merge"] = merged
        shown: dict[str, Any] = without_secrets(results)
        return shown

    def new_rows(self) -> list[Row]:
        """Read the records that metrics.jsonl has got since the last call."""
        file = self.folder / record.METRICS
        if not file.is_file():
            return []
        with file.open("rb") as opened:
            opened.seek(self._offset)
            found = opened.read()
        written = file.stat().st_mtime
        found = found[: found.rfind(b"\n") + 1]  # the last line may not be complete
        self._offset += len(found)
        rows = []
        for line in found.decode("utf-8", errors="replace").splitlines():
            try:
                logged = json.loads(line)
                step = int(logged.pop("step"))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            again = step == self._last[0]
            place = self._last[1] + 1 if again else 0
            self._last = step, place
            self._sent = self._sent if again else set()
            time, figures = logged.pop("time", None) or written, _figures(logged)
            # A step may be recorded twice, and shows each figure once.
            figures = {key: value for key, value in figures.items() if key not in self._sent}
            self._sent |= figures.keys()
            rows.append(Row(step, place, time, figures))
        return rows

    def new_samples(self) -> Samples:
        """Return all samples by step if there are more than at the last call; otherwise none."""
        file = self.folder / record.SAMPLES
        if not file.is_file():
            return {}
        state = file.stat()
        if self._samples == (seen := (state.st_size, state.st_mtime_ns)):
            return {}
        self._samples = seen
        found: Samples = {}
        for answer in read_records(file):
            found.setdefault(answer["step"], []).append(without_secrets(answer))
        return found


def tracked(folder: Path) -> dict[str, Any]:
    """Return what trackers.json says; it is written, with a new id, if there is none.

    ``id`` is the run's id at every tracker, and ``runs`` says where each tracker shows the run. The
    id is on the disk before a tracker gets it, so that a killed run never appears twice.
    """
    file = folder / record.TRACKED
    found = _read(file)
    if "id" not in found:
        found = {"id": uuid.uuid4().hex[:12], "runs": {}}
        write_text(file, to_json(found, indent=2) + "\n")
    return found


def note(folder: Path, name: str, where: str) -> None:
    """Write into trackers.json where a tracker shows the run."""
    found = tracked(folder)
    if found.setdefault("runs", {}).get(name) != where:
        found["runs"][name] = where
        write_text(folder / record.TRACKED, to_json(found, indent=2) + "\n")


def table(samples: Samples) -> list[list[Any]]:
    """Return the rows of a table of samples, whose columns are COLUMNS."""
    return [
        [answer.get(column) for column in COLUMNS]
        for step in sorted(samples)
        for answer in samples[step]
    ]


def _figures(logged: dict[str, Any]) -> dict[str, float]:
    return {
        _shown(key): float(value)
        for key, value in logged.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _shown(key: str) -> str:
    """Name a figure as trackers group them: by what stands before the slash."""
    if key.startswith("eval_"):
        return "eval/" + key.removeprefix("eval_")
    return f"eval/{key}" if key.startswith("exact_match") else f"train/{key}"


def _read(file: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file is absent or damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
