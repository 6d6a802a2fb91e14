"""What a run has left, compared with what another one left; a finished run, cut back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sft.checkpoint import folders
from sft.files import hash_of, read_records
from sft.run import record


def outcome(run: Path) -> dict[str, Any]:
    """Read what a run logged, without times, and hash the weights that it saved."""
    logs = [
        record.trained(logged)
        for logged in read_records(run / record.METRICS)
        if "train_runtime" not in logged  # the Trainer's summary, which covers one process only
    ]
    weights = record.weights(run)
    saved = weights.glob("*.safetensors") if weights is not None else []
    return {"logged": logs, "files": {path.name: hash_of(path) for path in saved}}


def differences(straight: dict[str, Any], resumed: dict[str, Any]) -> list[str]:
    """List the differences between two outcomes, one line each."""
    found = [
        f"step {one['step']}: {key} {one[key]} without interruption, {other.get(key)} resumed"
        for one, other in zip(straight["logged"], resumed["logged"], strict=False)
        for key in one
        if one[key] != other.get(key)
    ]
    if len(straight["logged"]) != len(resumed["logged"]):
        counts = len(straight["logged"]), len(resumed["logged"])
        found.append(f"{counts[0]} lines logged without interruption, {counts[1]} resumed")
    files = straight["files"]
    return found + [
        f"{name} differs" for name in files if files[name] != resumed["files"].get(name)
    ]


def cut_back(run: Path, step: int) -> None:
    """Reduce a finished run to the files that a kill right after a checkpoint would have left.

    Raises:
        CheckpointError: There is no checkpoint of this step.
    """
    folders.verify(folders.path_of(run, step))
    for path in folders.checkpoints(run):
        if folders.step_of(path) > step:
            shutil.rmtree(path)
    if weights := record.weights(run):
        shutil.rmtree(weights)
    record.write(run, {**record.read(run), "status": "running"})
