"""Functions that all ranks call together: agree on a decision, collect or compare values."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from sft import process
from sft.errors import RunError

TIMEOUT = 1800  # seconds that a rank waits for the others; as the default of ddp_timeout

_store: Any = None  # keep a reference: on rank 0 the object may be the server of the store
_meetings = itertools.count()


def from_rank_zero(decide: Callable[[], Any]) -> Any:
    """Decide on rank 0 and return its decision on every rank; needs no process group.

    Args:
        decide: Returns a value that can be written as JSON.

    Raises:
        RunError: The ranks do not find each other.
    """
    if _alone():
        return decide()
    decision = json.dumps(decide()) if process.rank() == 0 else ""
    with _meeting("rank 0", TIMEOUT) as (store, key):
        if decision:
            store.set(key, decision)
        return json.loads(store.get(key))


def exchange(value: Any, timeout: float = TIMEOUT) -> list[Any]:
    """Collect a value from every rank, in rank order; needs no process group.

    Args:
        value: A value that can be written as JSON.
        timeout: Seconds to wait for the other ranks.

    Raises:
        RunError: The ranks do not find each other.
    """
    if _alone():
        return [value]
    ranks = process.world_size()
    with _meeting("the other ranks", timeout) as (store, key):
        store.set(f"{key}/{process.rank()}", json.dumps(value))
        return [json.loads(store.get(f"{key}/{rank}")) for rank in range(ranks)]


def _alone() -> bool:
    return not process.launched() or process.world_size() == 1


@contextlib.contextmanager
def _meeting(whom: str, timeout: float) -> Iterator[tuple[Any, str]]:
    """Yield the launcher's key-value store, and a key that is the same on all ranks for this call.

    The store exists before the process group. It also survives a restart of the ranks, so its keys
    begin with the number of restarts.
    """
    global _store
    key = str(next(_meetings))
    try:
        _store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
        store = PrefixStore(f"sft/{process.restarts()}", _store)
        yield store, key
        # Without a launcher the store is in the process of rank 0, which must not end before the
        # others have read.
        if store.add(f"{key}/read", 1) == process.world_size():
            store.set(f"{key}/read by all", "")
        if process.rank() == 0:
            store.wait([f"{key}/read by all"])
    except (ValueError, dist.DistError) as error:
        raise RunError(
            f"rank {process.rank()} cannot reach {whom}: {str(error).splitlines()[0]}\n"
            "    fix: read the error of rank 0; start ranks with torchrun, which sets MASTER_ADDR "
            "and MASTER_PORT"
        ) from error


def gather(value: Any) -> list[Any]:
    """Collect a small object from every rank, in rank order; uses the process group."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def trained_bits(model: torch.nn.Module) -> int:
    """Return a checksum of the trained parameters, equal on ranks whose parameters are equal."""
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            words = parameter.detach().float().contiguous().view(torch.int32)
            total += int(words.to(torch.int64).sum().item())
    return total & 0x7FFFFFFFFFFFFFFF
