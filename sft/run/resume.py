"""Checks of a resume: the same base model and data, and ranks that the checkpoint allows."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from sft.checkpoint import folders
from sft.config.settings import Config, ModelConfig
from sft.errors import CheckpointError, RunError
from sft.files import digest
from sft.plan.schedule import planned_steps
from sft.run import record

if TYPE_CHECKING:
    from sft.data.prepared import Prepared

logger = logging.getLogger("sft")

LENGTH = ("train.max_steps", "train.num_train_epochs")  # settings that extend a finished run
PATIENCE = "train.early_stopping_patience"  # extends one that has stopped early
# Entries of the identity that may differ when a run is resumed; the difference is logged. How bf16
# products are computed on a CPU depends on the processor, and changes only the order of sums.
NOTED = ("products",)


def changed(path: Path, ranks: int, stage: int) -> str:
    """Describe how ranks or ZeRO stage differ from a checkpoint's; empty if nothing is to be said.

    Raises:
        CheckpointError: The optimizer's state cannot be restored on these ranks and this stage.
    """
    made = folders.manifest(path)
    if not all(type(made.get(name)) is int for name in ("ranks", "stage")) or made.get(
        "kind"
    ) not in ("elementwise", "by parameter", "by rank"):
        raise CheckpointError(
            f"{path / folders.MANIFEST} does not say which ranks made it: it is not sft's\n"
            "    fix: restore the file, or delete this checkpoint to use the one before it"
        )
    there = f"{made['ranks']} ranks under ZeRO stage {made['stage']}"
    here = f"{ranks} ranks under stage {stage}"
    same = (made["ranks"], made["stage"]) == (ranks, stage)
    stuck = {
        "elementwise": False,
        "by parameter": bool(stage),
        "by rank": not same,
    }[made["kind"]]
    if stuck:
        raise CheckpointError(
            f"{path} was made by {there}, and this optimizer's state is saved {made['kind']}: it "
            f"cannot be restored on {here}\n"
            "    fix: use the same number of ranks and the same zero=, or run_name=NAME for a new "
            "run"
        )
    unnamed = "; an earlier version of sft made it, and its manifest does not name its run"
    return ("" if same else f" (made by {there}; now {here})") + unnamed * ("run" not in made)


def require_same_checkpoint(folder: Path, checkpoint: Path | None) -> None:
    """Check that all ranks resume from the same checkpoint; the process group must exist.

    Args:
        folder: The run's folder.
        checkpoint: The checkpoint that this rank resumes from; None for a new run.

    Raises:
        RunError: The ranks found different checkpoints.
    """
    from sft.ranks import gather

    if len(set(gather(checkpoint))) > 1:
        raise RunError(
            f"not all ranks see the same checkpoints in {folder}\n"
            "    fix: output_dir=FOLDER, on a file system that all nodes share"
        )


def base_identity(model: ModelConfig) -> str:
    """Identify a base model: by its commit on the hub, or a hash of its config and weights.

    Raises:
        ModelError: The model is missing or cannot be reached.
    """
    from sft.model.base import commit_of

    folder = Path(str(model.name_or_path))
    if not folder.is_dir():
        return f"commit {commit_of(model)}"
    weights = folder.glob("*.safetensors") if model.pretrained else []
    return digest(sorted(map(str, [folder / "config.json", *weights])), folder)


def identity(config: Config, prepared: Prepared) -> dict[str, str]:
    """Identify by their content the base model, the data and the adapter that the run starts from.

    Returns:
        ``base``: see ``base_identity``; ``data``: a hash of the samples as they were tokenised;
        ``adapter``: a hash of the weights in ``lora.init_from``, unless a resumed run no longer has
        that folder. The run adds ``precision`` and ``products`` of ``model.Precision``.
    """
    sets = [prepared.train.dataset] + ([prepared.eval.dataset] if prepared.eval else [])
    files = [file["filename"] for dataset in sets for file in dataset.cache_files]
    data = digest(files, Path(files[0]).parent)
    found = {"base": base_identity(config.model), "data": data}
    if config.lora.init_from is not None:
        folder = Path(config.lora.init_from)
        weights = sorted(map(str, folder.glob("*.safetensors")))
        found |= {"adapter": digest(weights, folder)} if weights else {}
    return found


def require_extended(folder: Path, differences: Iterable[str]) -> None:
    """Refuse a finished run, unless more epochs or steps are asked for, or more patience.

    Args:
        folder: The run's folder.
        differences: The names of the settings that differ, all of them allowed.

    Raises:
        RunError: The run is finished and cannot go on.
    """
    before = record.read(folder)
    if before.get("status") != "finished":
        return
    reason = before.get("final", {}).get("stopped_early")
    if reason and PATIENCE not in differences:
        step = before["final"].get("steps")
        raise RunError(
            f"the run in {folder} is finished: it stopped early after step {step}, because "
            f"{reason}\n    fix: run_name=NAME for a new run, or overwrite=true to replace this "
            f"one, or a larger {PATIENCE} (null: no early stop) and 'resume.allow=[{PATIENCE}]' to "
            "continue it"
        )
    if not reason and not set(LENGTH) & set(differences):
        merged = (folder / record.MERGED).exists() or not (folder / record.ADAPTER).exists()
        raise RunError(
            f"the run in {folder} is finished\n"
            "    fix: run_name=NAME for a new run, or overwrite=true to replace this one, or a "
            "larger train.max_steps and 'resume.allow=[train.max_steps]' to continue it (or the "
            "same with train.num_train_epochs)"
            + ("" if merged else f"; python -m sft.merge run={folder} merges its adapter")
        )
    if not folders.checkpoints(folder):
        raise RunError(
            f"the run in {folder} is finished, and has no checkpoint to continue from\n"
            f"    fix: run_name=NAME lora.init_from={folder} for a new run that starts from its "
            "weights"
        )


def require_steps_left(folder: Path, config: Config, samples: int) -> None:
    """Check that a finished run has more steps to make, and say how it goes on.

    Raises:
        RunError: It has made as many steps as are asked for, or more.
    """
    before = record.read(folder)
    final = before.get("final", {}) if before.get("status") == "finished" else {}
    done = final.get("steps", 0)
    if not done or final.get("stopped_early"):
        return
    _, steps = planned_steps(config.train, samples)
    if steps <= done:
        raise RunError(
            f"the run in {folder} is finished: it has made {done} steps, and {steps} are asked "
            f"for\n    fix: train.max_steps={2 * done}, or more train.num_train_epochs"
        )
    logger.info(
        "the finished run is extended from %d to %d steps; from here on, the learning rate is that "
        "of a run of %d steps",
        *(done, steps, steps),
    )
