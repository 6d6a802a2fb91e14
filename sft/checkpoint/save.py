"""Saves a checkpoint: the weights, and all other state that an exact resume needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft.checkpoint import folders, state, tensors
from sft.checkpoint.rank_zero import RankZero
from sft.files import begin_folder


def save(
    path: Path,
    write_weights: Callable[[RankZero, Path], None],
    live: state.Live,
    counts: dict[str, Any],
    trainer_state: Any,
    facts: dict[str, Any],
    keep: int | None,
) -> None:
    """Save a checkpoint, and delete old ones. All ranks must call it.

    Args:
        path: The checkpoint's folder; it gets this name when it is complete.
        write_weights: Writes the weights into a folder.
        live: The objects whose state is saved.
        counts: What this rank has counted since the last logged line.
        trainer_state: The Trainer's own state; its best checkpoint is not deleted.
        facts: Facts for the manifest: the run's fingerprint, step, ranks and ZeRO stage.
        keep: The number of checkpoints to keep; None: all.

    Raises:
        CheckpointError: The checkpoint cannot be written. It is raised on all ranks, and the
            previous checkpoint is untouched.
    """
    with RankZero(path) as main:
        partial = main.do(begin_folder, path)
        write_weights(main, partial)
        writer = main.do(tensors.Writer, partial)
        for key, tensor in state.unsharded(live.optimizer):
            main.do(tensors.Writer.add, writer, key, tensor)
        main.do(tensors.Writer.flush, writer)
        record, streams = state.progress(live, counts)
        main.do(state.write_progress, partial, record, streams)
        main.do(folders.write_trainer_state, partial, trainer_state)
        main.do(folders.finish, partial, path, {**facts, "kind": record["kind"]})
        main.do(folders.rotate, path.parent, keep, trainer_state.best_model_checkpoint)
