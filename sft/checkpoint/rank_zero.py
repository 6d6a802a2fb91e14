"""Rank 0 writes a folder for all ranks: it is complete, or every rank raises the error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from sft.checkpoint import folders
from sft.errors import CheckpointError, SftError
from sft.files import abandon_folder
from sft.ranks import gather


class RankZero:
    """Runs tasks on rank 0 only, and raises their error on all ranks when the block ends.

    Between the tasks all ranks take part in collective operations: if rank 0 raised its error at
    once, the other ranks would wait for it in the next operation.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.here = not dist.is_initialized() or dist.get_rank() == 0
        self.error: Exception | None = None

    def do(self, task: Callable[..., Any], *args: Any) -> Any:
        """Run a task on rank 0, unless an earlier task has failed."""
        if not self.here or self.error is not None:
            return None
        try:
            return task(*args)
        except Exception as error:  # kept, so that all ranks end together in __exit__
            self.error = error
        return None

    def __enter__(self) -> RankZero:
        self.do(folders.require_run, self.path.parent)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            return
        reason = gather(None if self.error is None else f"{self.error}")[0]
        if reason is None:
            return
        if self.here:
            abandon_folder(self.path)
            known = (OSError, SafetensorError, SftError)
            if self.error is not None and not isinstance(self.error, known):
                raise self.error
        before = next(iter(folders.checkpoints(self.path.parent)), None)
        there = f"the newest checkpoint is {before}" if before else "there is no other checkpoint"
        cause, _, fix = reason.partition("\n    fix: ")
        fix = fix or (
            "free disk space or correct this cause, then give the same command again to resume "
            "the run"
        )
        raise CheckpointError(
            f"{self.path} cannot be saved: {cause}\n    {there}\n    fix: {fix}"
        ) from self.error
