"""Whether a run may go on: the same settings, the same base model and the same data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sft.checkpoint import folder as checkpoint
from sft.config.settings import ModelConfig
from sft.errors import CheckpointError, RunError
from sft.files import digest

if TYPE_CHECKING:
    from sft.data.prepared import Prepared

# A run may always be resumed with a different value of these, and the difference is logged. How
# bf16 products are computed on a CPU depends on the processor, and only the order of sums changes.
NOTED = ("products",)


def restarted(environ: Mapping[str, str] = os.environ) -> bool:
    """Say whether torchrun or Slurm started the same command anew, after it had failed."""
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(environ.get(name, "0") not in ("", "0") for name in names)


def changed(path: Path, ranks: int, stage: int) -> str:
    """Say how a checkpoint goes on elsewhere than where it was made.

    Raises:
        CheckpointError: Its optimizer's state cannot.
    """
    made = checkpoint.manifest(path)
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
            f"{path} was made by {there}, and this optimizer's state is kept {made['kind']}: it "
            f"cannot go on on {here}\n    fix: the same ranks and zero=..., or output_dir=ANOTHER"
        )
    return "" if same else f" (made by {there}; now {here})"


def require_same_checkpoint(folder: Path, checkpoint: Path | None) -> None:
    """Compare what all ranks resume from; the process group must exist.

    Args:
        folder: The run's.
        checkpoint: What this rank resumes from; None: nothing.

    Raises:
        RunError: The ranks found different checkpoints.
    """
    from sft.ranks import gather

    if len(set(gather(checkpoint))) > 1:
        raise RunError(
            f"not all ranks see the same checkpoints in {folder}\n"
            "    fix: output_dir=FOLDER on a file system that all nodes share"
        )


def base_identity(model: ModelConfig) -> str:
    """Identify a base model: by its commit on the hub, or a hash of its config and weights.

    Raises:
        ModelError: It is not there or cannot be reached.
    """
    from sft.model.base import commit_of

    folder = Path(str(model.name_or_path))
    if not folder.is_dir():
        return f"commit {commit_of(model)}"
    weights = folder.glob("*.safetensors") if model.pretrained else []
    return digest(sorted(map(str, [folder / "config.json", *weights])), folder)


def identity(model: ModelConfig, prepared: Prepared) -> dict[str, str]:
    """Identify what is trained, and on what, by content.

    Returns:
        ``base``: see ``base_identity``; ``data``: a hash of the samples as they were tokenised.
        The run adds ``precision`` and ``products`` of ``model.Precision``.
    """
    sets = [prepared.train.dataset] + ([prepared.eval.dataset] if prepared.eval else [])
    files = [file["filename"] for dataset in sets for file in dataset.cache_files]
    data = digest(files, Path(files[0]).parent)
    return {"base": base_identity(model), "data": data}
