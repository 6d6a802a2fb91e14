"""Checks of a resume: the same base model and data, and ranks that the checkpoint allows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sft.checkpoint import folders
from sft.config.settings import ModelConfig
from sft.errors import CheckpointError, RunError
from sft.files import digest

if TYPE_CHECKING:
    from sft.data.prepared import Prepared

# Entries of the identity that may differ when a run is resumed; the difference is logged. How bf16
# products are computed on a CPU depends on the processor, and changes only the order of sums.
NOTED = ("products",)


def changed(path: Path, ranks: int, stage: int) -> str:
    """Describe how ranks or ZeRO stage differ from those of a checkpoint; empty if they do not.

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
    return "" if same else f" (made by {there}; now {here})"


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


def identity(model: ModelConfig, prepared: Prepared) -> dict[str, str]:
    """Identify the base model and the data by their content.

    Returns:
        ``base``: see ``base_identity``; ``data``: a hash of the samples as they were tokenised.
        The run adds ``precision`` and ``products`` of ``model.Precision``.
    """
    sets = [prepared.train.dataset] + ([prepared.eval.dataset] if prepared.eval else [])
    files = [file["filename"] for dataset in sets for file in dataset.cache_files]
    data = digest(files, Path(files[0]).parent)
    return {"base": base_identity(model), "data": data}
