"""Whether a run may go on: the same settings, the same base model and the same data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import checkpoint
from sft.config import ModelConfig
from sft.errors import CheckpointError
from sft.files import digest

if TYPE_CHECKING:
    from sft.data.prepare import Prepared

# Settings that change no trained weight, or not beyond the order of floating-point sums.
HARMLESS = {
    *("overwrite", "output_dir", "run_name", "resume.checkpoint", "resume.allow"),
    *("dataset.num_proc", "dataset.exact_match", "dataset.stop_above", "dataset.warn_above"),
    *("model.attn_implementation", "model.lm_head", "model.frozen_linear"),
    *("zero.config", "zero.overrides"),
    *("train.per_device_train_batch_size", "train.per_device_eval_batch_size"),
    *("train.padding_free", "train.pad_to_multiple_of", "train.gradient_checkpointing"),
    *("train.logging_steps", "train.eval_strategy", "train.eval_steps"),
    *("train.save_strategy", "train.save_steps", "train.save_total_limit"),
    *("train.dataloader_num_workers", "train.on_nan", "train.max_loss_jump", "train.merge"),
}
# What is not a setting and may be allowed to differ too.
CONTENTS = ("base", "data")
# Likewise, and allowed without being asked for, since only the order of sums differs: how bf16
# products are computed, on a processor that cannot compute them as the run began.
NOTED = ("products",)


def restarted(environ: Mapping[str, str] = os.environ) -> bool:
    """Say whether torchrun or Slurm started the same command anew, after it had failed."""
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(environ.get(name, "0") not in ("", "0") for name in names)


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Give a nested mapping's leaves by dotted key."""
    if not isinstance(node, dict) or not node:
        return {prefix.rstrip("."): node}
    leaves: dict[str, Any] = {}
    for key, value in node.items():
        leaves |= flatten(value, f"{prefix}{key}.")
    return leaves


def training_settings(settings: Any) -> dict[str, Any]:
    """Give the settings that decide what is trained, by dotted key."""

    def harmless(key: str) -> bool:
        return key in HARMLESS or any(key.startswith(f"{name}.") for name in HARMLESS)

    return {key: value for key, value in flatten(settings).items() if not harmless(key)}


def differences(before: Any, now: Any) -> dict[str, str]:
    """List the settings that change what is trained, each with a line that says how."""
    old, new = training_settings(before), training_settings(now)
    return {
        key: f"{key}: {old.get(key, 'unset')} there, {new.get(key, 'unset')} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }


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


def base_identity(model: ModelConfig) -> str:
    """Identify a base model: by its commit on the hub, or a hash of its config and weights.

    Raises:
        ModelError: It is not there or cannot be reached.
    """
    from sft.model import commit_of

    folder = Path(str(model.name_or_path))
    if not folder.is_dir():
        return f"commit {commit_of(model)}"
    weights = folder.glob("*.safetensors") if model.pretrained else []
    return digest(sorted(map(str, [folder / "config.json", *weights])), folder)


def identity(model: ModelConfig, prepared: Prepared) -> dict[str, str]:
    """Identify what is trained, and on what, by content.

    Returns:
        ``base``: see ``base_identity``; ``data``: a hash of the samples as they were tokenised.
        ``precision`` and ``products``, of ``model.Precision``, are added by the run.
    """
    sets = [prepared.train.dataset] + ([prepared.eval.dataset] if prepared.eval else [])
    files = [file["filename"] for dataset in sets for file in dataset.cache_files]
    data = digest(files, Path(files[0]).parent)
    return {"base": base_identity(model), "data": data}
