"""What ranks do together, and what one of them does for all."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from sft import checkpoint
from sft.errors import CheckpointError, RunError

TIMEOUT = 1800  # seconds that a rank waits for the others; also the default of ddp_timeout

_store: Any = None  # rank 0 may be its server, for as long as it is referred to
_meetings = itertools.count()


def from_rank_zero(decide: Callable[[], Any]) -> Any:
    """Decide on rank 0 and return its decision on every rank, before there is a process group.

    Args:
        decide: Returns what JSON can hold.

    Raises:
        RunError: The ranks do not find each other.
    """
    if _alone():
        return decide()
    decision = json.dumps(decide()) if os.environ["RANK"] == "0" else ""
    with _meeting("rank 0", TIMEOUT) as (store, key):
        if decision:
            store.set(key, decision)
        return json.loads(store.get(key))


def exchange(value: Any, timeout: float = TIMEOUT) -> list[Any]:
    """Collect a value from every rank, in rank order, before there is a process group.

    Args:
        value: What JSON can hold.
        timeout: Seconds to wait for the other ranks.

    Raises:
        RunError: The ranks do not find each other.
    """
    if _alone():
        return [value]
    ranks = int(os.environ["WORLD_SIZE"])
    with _meeting("the other ranks", timeout) as (store, key):
        store.set(f"{key}/{os.environ['RANK']}", json.dumps(value))
        return [json.loads(store.get(f"{key}/{rank}")) for rank in range(ranks)]


def _alone() -> bool:
    return "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1


@contextlib.contextmanager
def _meeting(whom: str, timeout: float) -> Iterator[tuple[Any, str]]:
    """Open the launcher's key-value store, with a key that all ranks use for this meeting only.

    The store exists before the process group. It outlives restarts of the ranks, so the key names
    the restart too.
    """
    global _store
    restarts, key = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), str(next(_meetings))
    try:
        _store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
        yield PrefixStore(f"sft/{restarts}", _store), key
    except (ValueError, dist.DistError) as error:
        raise RunError(
            f"rank {os.environ['RANK']} cannot reach {whom}: {str(error).splitlines()[0]}\n"
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
