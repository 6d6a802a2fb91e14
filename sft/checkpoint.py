"""Checkpoints: which is the newest complete one, and whether this run can go on from it."""

from __future__ import annotations

import json
from pathlib import Path

from sft.errors import CheckpointError

MARK = "complete.json"  # written last, when every rank has written its part


def path_of(output_dir: str, step: int) -> Path:
    """Name the checkpoint of a step."""
    return Path(output_dir) / f"checkpoint-{step}"


def mark_complete(path: Path, ranks: int, stage: int) -> None:
    """Say that every rank's part is there, and for how many ranks and which ZeRO stage."""
    partial = path / f"{MARK}.partial"
    partial.write_text(json.dumps({"ranks": ranks, "stage": stage}), encoding="utf-8")
    partial.replace(path / MARK)


def _step(path: Path) -> int:
    number = path.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else -1


def newest(output_dir: str, ranks: int, stage: int) -> tuple[Path | None, list[Path]]:
    """Find the checkpoint to resume from, and the newer ones that a kill left incomplete.

    Raises:
        CheckpointError: It was written by another number of ranks or ZeRO stage.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if _step(path) >= 0]
    passed_over = []
    for path in sorted(folders, key=_step, reverse=True):
        if not (path / MARK).is_file():
            passed_over.append(path)
            continue
        made = json.loads((path / MARK).read_text(encoding="utf-8"))
        if (made["ranks"], made["stage"]) != (ranks, stage):
            raise CheckpointError(
                f"{path} was written by {made['ranks']} ranks under ZeRO stage {made['stage']}; "
                f"this run has {ranks} ranks and stage {stage}\n"
                f"    fix: torchrun --nproc_per_node {made['ranks']} with the same zero=..., "
                "or output_dir=ANOTHER, or overwrite=true to start anew"
            )
        return path, passed_over
    return None, passed_over
