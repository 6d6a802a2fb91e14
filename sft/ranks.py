"""What ranks do together, and what one of them does for all."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from sft import checkpoint
from sft.errors import CheckpointError, RunError

_store: Any = None  # rank 0 may be its server, for as long as it is referred to
_decisions = itertools.count()


def from_rank_zero(decide: Callable[[], Any]) -> Any:
    """Decide on rank 0, and give every rank its decision, before there is a process group.

    The launcher's key-value store is there from the start. It outlives restarts of the ranks, so
    each start, and each decision of it, has a key of its own.

    Args:
        decide: Gives what JSON can hold.

    Raises:
        RunError: The ranks do not find each other.
    """
    global _store
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return decide()
    restarts, key = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), str(next(_decisions))
    decision = json.dumps(decide()) if os.environ["RANK"] == "0" else ""
    try:
        _store, _, _ = next(rendezvous("env://"))
        store = PrefixStore(f"sft/{restarts}", _store)
        if decision:
            store.set(key, decision)
        return json.loads(store.get(key))
    except (ValueError, dist.DistError) as error:
        raise RunError(
            f"rank {os.environ['RANK']} cannot reach rank 0: {str(error).splitlines()[0]}\n"
            "    fix: see what rank 0 says; start ranks with torchrun, which sets MASTER_ADDR and "
            "MASTER_PORT"
        ) from error


def gather(value: Any) -> list[Any]:
    """Collect a small object from every rank, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def trained_bits(model: torch.nn.Module) -> int:
    """Sum the bits of the trained parameters as integers: equal on ranks that hold the same."""
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            words = parameter.detach().float().contiguous().view(torch.int32)
            total += int(words.to(torch.int64).sum().item())
    return total & 0x7FFFFFFFFFFFFFFF


class RankZero:
    """Does on rank 0 what only that rank does, and lets an error out on all ranks at the end.

    Between its tasks the ranks work together; if rank 0 left at once, the others would wait for it
    for ever.
    """

    def __init__(self, here: bool, path: Path) -> None:
        self.here, self.path = here, path
        self.error: Exception | None = None

    def do(self, task: Callable[..., Any], *args: Any) -> Any:
        """Do a task on rank 0, unless one before it failed."""
        if not self.here or self.error is not None:
            return None
        try:
            return task(*args)
        except Exception as error:
            self.error = error
        return None

    def __enter__(self) -> RankZero:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            return
        reason = gather(None if self.error is None else f"{self.error}")[0]
        if reason is None:
            return
        if self.here:
            checkpoint.abandon(self.path)
            if not isinstance(self.error, (OSError, SafetensorError, CheckpointError)):
                raise self.error  # type: ignore[misc]
        before = next(iter(checkpoint.checkpoints(self.path.parent)), None)
        there = f"the newest checkpoint is {before}" if before else "there is no other checkpoint"
        raise CheckpointError(
            f"{self.path} cannot be saved: {reason}\n    {there}\n"
            "    fix: free some space, or mend what it says; the same command then resumes"
        ) from self.error
