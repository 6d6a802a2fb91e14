"""The earlier ends of a run that is resumed: when each came, at which step, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sft.checkpoint import folders
from sft.files import read_records
from sft.run import record


def earlier(folder: Path, before: dict[str, Any]) -> list[dict[str, Any]]:
    """List the earlier ends of a run, the newest last; before the run's files are changed.

    A process that was killed has left the status ``running``; it ended after the last thing that it
    wrote.

    Args:
        folder: The run's folder.
        before: Its run.json; empty for a new run.
    """
    found: list[dict[str, Any]] = list(before.get("stops", []))
    status = before.get("status")
    if status is None:
        return found
    metrics = folder / record.METRICS
    logged = read_records(metrics) if metrics.is_file() else []
    steps = [folders.step_of(path) for path in folders.checkpoints(folder)]
    steps += [item["step"] for item in logged[-1:] if isinstance(item, dict) and "step" in item]
    written = [path for path in (metrics, folder / record.RECORD) if path.is_file()]
    last = max((path.stat().st_mtime for path in written), default=0.0)
    killed = status == "running"
    end = {
        "step": max(steps, default=0),
        "time": round(last if killed else before.get("ended", last), 1),
        "status": "killed" if killed else status,
        "reason": before.get("reason"),
    }
    return [*found, end]
