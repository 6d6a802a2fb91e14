"""Checkpoint folders: written completely or not at all, verified, and chosen for a resume.

``checkpoint.state`` has their content. This module does not import torch, so that a run that cannot
be resumed is refused before a large library loads.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sft.config.plain import read_json
from sft.errors import CheckpointError, RunError
from sft.files import PARTIAL, damage_of, delete_folder, finish_folder, inventory, write_text

TRAINER_STATE = "trainer_state.json"  # the name that the Trainer reads
MANIFEST = "manifest.json"  # written last: names, sizes and hashes of all other files
ASIDE = ".set_aside"  # the suffix of checkpoints newer than the one that the user went back to


def path_of(output_dir: str | Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return Path(output_dir) / f"checkpoint-{step}"


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name; -1 if it is not the name of a checkpoint."""
    number = path.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else -1


def require_run(output_dir: Path) -> None:
    """Check that the run's folder still exists; writing into it would make a new, empty one.

    Raises:
        RunError: It was removed or renamed while the run trained.
    """
    if not output_dir.is_dir():
        raise RunError(
            f"the run's folder {output_dir} is gone: it was removed or renamed while the run "
            "trained\n    fix: give the folder its name back, then give the same command again to "
            "resume the run; without the folder that command starts from step 0"
        )


def finish(partial: Path, final: Path, facts: dict[str, Any]) -> None:
    """Write the manifest, and rename the folder to its final name.

    Args:
        partial: The folder that ``begin_folder`` made.
        final: The checkpoint's path; a folder that exists there is replaced.
        facts: Stored in the manifest with the sizes and hashes of the files.
    """
    content = {**facts, "files": inventory(partial)}
    write_text(partial / MANIFEST, json.dumps(content, indent=2) + "\n")
    finish_folder(partial, final)


def write_trainer_state(partial: Path, state: Any) -> None:
    """Write the Trainer's own state: steps, epochs, everything logged."""
    state.save_to_json(str(partial / TRAINER_STATE))


def rotate(output_dir: Path, keep: int | None, best: str | None) -> None:
    """Delete all but the best and the newest checkpoints, so that ``keep`` remain; None: all.

    The best and the newest one are never deleted: with ``keep=1``, two remain if they differ.
    """
    if keep is None:
        return
    paths = checkpoints(output_dir)
    spared = {path for path in paths if best and path.name == Path(best).name}
    spared |= set(paths[:1])
    others = [path for path in paths if path not in spared]
    for path in others[max(keep - len(spared), 0) :]:
        delete_folder(path)


def checkpoints(output_dir: Path) -> list[Path]:
    """List the checkpoints of a run, newest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if step_of(path) >= 0]
    found = [path for path in found if path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def manifest(path: Path) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        CheckpointError: The manifest is missing or damaged.
    """
    content = _manifest(path)
    if isinstance(content, str):
        raise _unusable(path, content)
    return content


def _manifest(path: Path) -> dict[str, Any] | str:
    """Read a manifest; a text says why it cannot be read."""
    if not (path / MANIFEST).exists():
        return f"{MANIFEST} is missing, so the folder is not complete"
    try:
        content = read_json(path / MANIFEST)
        assert isinstance(content, dict) and isinstance(content["files"], dict)
        assert all({"bytes", "xxh3"} <= dict(said).keys() for said in content["files"].values())
    except (ValueError, KeyError, TypeError, AssertionError):
        return f"{MANIFEST} is damaged"
    return content


def damage(path: Path, fingerprints: Collection[str] = ()) -> str | None:
    """Compare step and run, and the size and hash of every file, with the manifest.

    Args:
        path: The checkpoint.
        fingerprints: Those of the run that it must belong to; empty: of any run.

    Returns:
        Why the checkpoint cannot be used, such as the first file that is damaged; None: it can.
    """
    content = _manifest(path)
    if isinstance(content, str):
        return content
    step = content.get("step", step_of(path))
    if step != step_of(path):
        return f"its {MANIFEST} is that of step {step}, so the folder was renamed"
    # The manifests of earlier versions do not name the run.
    if fingerprints and content.get("run") not in (None, *fingerprints):
        return "it is a checkpoint of a different run, which was copied into this folder"
    return damage_of(path, content["files"])


def verify(path: Path) -> None:
    """Require that a checkpoint is complete and undamaged.

    Raises:
        CheckpointError: It is not; the message names the first file that is wrong.
    """
    if reason := damage(path):
        raise _unusable(path, reason)


def _unusable(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be used: {reason}\n"
        "    fix: restore the file, or delete this checkpoint to use the one before it"
    )


def choose(
    output_dir: Path, named: str | None, fingerprints: Collection[str] = ()
) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Choose the checkpoint to resume from, and list the ones that are skipped, with the reason.

    Args:
        output_dir: The run's folder.
        named: The value of ``resume.checkpoint``; None: the newest complete checkpoint.
        fingerprints: Those of the run; empty: checkpoints of any run are taken.

    Raises:
        CheckpointError: The named checkpoint is missing or cannot be used, or none can be used.
    """
    if named is not None:
        path = output_dir / Path(named).name
        there = ", ".join(found.name for found in checkpoints(output_dir)) or "no checkpoint"
        if step_of(path) < 0 or not path.is_dir():
            raise CheckpointError(
                f"resume.checkpoint={named}: {output_dir} has {there}\n"
                "    fix: name one of these, or leave out resume.checkpoint to use the newest"
            )
        if reason := damage(path, fingerprints):
            raise CheckpointError(
                f"resume.checkpoint={named}: {reason}\n"
                f"    fix: name a different one ({there}), or leave out resume.checkpoint to use "
                "the newest complete one"
            )
        return path, []
    passed_over: list[tuple[Path, str]] = []
    for path in checkpoints(output_dir):
        reason = damage(path, fingerprints)
        if reason is None:
            return path, passed_over
        passed_over.append((path, reason))
    if passed_over:
        raise CheckpointError(
            f"no checkpoint in {output_dir} can be used:\n"
            + "\n".join(f"    {path.name}: {why}" for path, why in passed_over)
            + "\n    fix: restore the files, or use overwrite=true to start again from step 0"
        )
    return None, []


def tidy(output_dir: Path, resumed: Path | None) -> None:
    """Delete partly written checkpoints, and rename those that are newer than the resumed one."""
    for path in output_dir.glob(f"checkpoint-*{PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)
    if resumed is not None:
        for path in checkpoints(output_dir):
            if step_of(path) > step_of(resumed):
                aside = path.with_name(path.name + ASIDE)
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
