"""Checkpoints on disk: complete under their name or absent, and which one a run goes on from.

What one holds is in ``checkpoint.state``. This module imports no torch: a run that must not go on
is refused before anything heavy is loaded.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sft.errors import CheckpointError
from sft.files import hash_of, to_disk, write_text

TRAINER_STATE = "trainer_state.json"  # the name that the Trainer reads
MANIFEST = "manifest.json"  # written last: names, sizes and hashes of all other files
PARTIAL = ".partial"  # the suffix of a folder that is being written, or being deleted
ASIDE = ".set_aside"  # of what came after a checkpoint that the user went back to


def path_of(output_dir: str | Path, step: int) -> Path:
    """Name the checkpoint of a step."""
    return Path(output_dir) / f"checkpoint-{step}"


def step_of(path: Path) -> int:
    """Read the step from a checkpoint's name; -1 where it is no checkpoint's."""
    number = path.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else -1


def begin(final: Path) -> Path:
    """Make the folder to write into."""
    partial = final.with_name(final.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    return partial


def finish(partial: Path, final: Path, facts: dict[str, Any] | None = None) -> None:
    """Let a folder that was written appear under its final name, once all of it is on the disk.

    Args:
        partial: What ``begin`` made.
        final: The name; a folder of an earlier time is replaced.
        facts: Kept in a manifest beside the files' sizes and hashes; None: no manifest.
    """
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    for path in files:
        to_disk(path)
    if facts is not None:
        listed = {
            str(path.relative_to(partial)): {"bytes": path.stat().st_size, "xxh3": hash_of(path)}
            for path in files
        }
        write_text(partial / MANIFEST, json.dumps({**facts, "files": listed}, indent=2) + "\n")
    to_disk(partial)
    if final.exists():
        delete(final)
    partial.rename(final)
    to_disk(final.parent)


def write_trainer_state(partial: Path, state: Any) -> None:
    """Write the Trainer's own state: steps, epochs, everything logged."""
    state.save_to_json(str(partial / TRAINER_STATE))


def abandon(final: Path) -> None:
    """Remove what was written of a folder that cannot be finished."""
    shutil.rmtree(final.with_name(final.name + PARTIAL), ignore_errors=True)


def delete(path: Path) -> None:
    """Remove a checkpoint; a kill midway leaves nothing under its name."""
    doomed = path.with_name(path.name + PARTIAL + "-old")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def rotate(output_dir: Path, keep: int, best: str | None) -> None:
    """Keep the newest checkpoints and the best one; at most ``keep`` in all."""
    paths = checkpoints(output_dir)
    spared = {Path(best).name} if best else set()
    others = [path for path in paths if path.name not in spared]
    room = keep - (len(paths) - len(others))
    for path in others[max(room, 1) :]:
        delete(path)


def checkpoints(output_dir: Path) -> list[Path]:
    """List the checkpoints of a run, newest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if step_of(path) >= 0]
    return sorted(found, key=step_of, reverse=True)


def manifest(path: Path) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        assert isinstance(content["files"], dict)
    except FileNotFoundError:
        raise CheckpointError(f"has no {MANIFEST}: it is not complete") from None
    except (ValueError, KeyError, TypeError, AssertionError):
        raise CheckpointError(f"{MANIFEST} is damaged") from None
    assert isinstance(content, dict)
    return content


def verify(path: Path) -> None:
    """Hold every file against the manifest.

    Raises:
        CheckpointError: With the first thing that is wrong.
    """
    for name, said in manifest(path)["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{name} is missing")
        if file.stat().st_size != said["bytes"]:
            raise CheckpointError(
                f"{name} has {file.stat().st_size:,} bytes, not {said['bytes']:,}"
            )
        if hash_of(file) != said["xxh3"]:
            raise CheckpointError(f"{name} is damaged: its hash is another")


def choose(output_dir: Path, named: str | None) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Find the checkpoint to go on from, and those that were passed over, with the reason.

    Args:
        output_dir: The run's folder.
        named: The one that the user asks for; None: the newest that is complete.

    Raises:
        CheckpointError: The named one is missing or damaged, or all there are are damaged.
    """
    if named is not None:
        path = output_dir / Path(named).name
        there = ", ".join(found.name for found in checkpoints(output_dir)) or "no checkpoint"
        if step_of(path) < 0 or not path.is_dir():
            raise CheckpointError(
                f"resume.checkpoint={named}: {output_dir} has {there}\n"
                "    fix: name one of these, or leave it out for the newest"
            )
        try:
            verify(path)
        except CheckpointError as error:
            raise CheckpointError(
                f"resume.checkpoint={named}: {error}\n"
                f"    fix: name another ({there}), or leave it out for the newest that is complete"
            ) from None
        return path, []
    passed_over = []
    for path in checkpoints(output_dir):
        try:
            verify(path)
        except CheckpointError as error:
            passed_over.append((path, str(error)))
        else:
            return path, passed_over
    if passed_over:
        raise CheckpointError(
            f"no checkpoint in {output_dir} is whole:\n"
            + "\n".join(f"    {path.name}: {why}" for path, why in passed_over)
            + "\n    fix: put the files back, or overwrite=true to start anew"
        )
    return None, []


def tidy(output_dir: Path, resumed: Path | None) -> None:
    """Remove what a kill left half written, and set aside what came after the one resumed."""
    for path in output_dir.glob(f"checkpoint-*{PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)
    if resumed is not None:
        for path in checkpoints(output_dir):
            if step_of(path) > step_of(resumed):
                aside = path.with_name(path.name + ASIDE)
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
